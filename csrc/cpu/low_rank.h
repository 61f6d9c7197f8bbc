// What the bindings call for weights: whole operators, checked and split over threads. No result depends on
// their number.
#pragma once

#include "common/low_rank.h"
#include "common/merge.h"

namespace ck {

// Fills sum.out: base is read once and the result written once, whatever the number of terms and their ranks.
void low_rank_sum(const LowRankSum& sum, int threads);

// Fill merge.out.
void merge_residual(const Merge& merge, int threads);
void merge_apply(const Merge& merge, int threads);

// out = XᵀX (E, E), contiguous float64, of X (T, E) of any floating dtype and strides.
void gram(const Tensor& features, const Tensor& out, int threads);

}  // namespace ck
