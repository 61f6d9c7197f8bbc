// What the bindings call: whole operators, checked and split over threads. No result depends on their number.
#pragma once

#include "cpu/kernels.h"

namespace ck {

// Fills a.out. Throws std::invalid_argument for shapes or dtypes that do not belong together.
void attention_forward(Attention a, int threads);

// Fills the gradients that a has.
void attention_backward(Attention a, int threads);

struct Moments {
  double sum, sum_of_squares;
};

// Σ s and Σ s² of s = q kᵀ over all of (B, H, N, S).
Moments score_moments(const Tensor& query, const Tensor& key, int threads);

}  // namespace ck
