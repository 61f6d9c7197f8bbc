// What the bindings call: whole operators, split over threads.
#pragma once

#include "common/tensor.h"

namespace ck {

struct Moments {
  double sum, sum_of_squares;
};

// Σ s and Σ s² of s = q kᵀ over all of (B, H, N, S). The result does not depend on the number of threads.
Moments score_moments(const Tensor& query, const Tensor& key, int threads);

}  // namespace ck
