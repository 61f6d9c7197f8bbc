// What the closed-form merge (customdiff_kernels/merge/MATH.md) asks of a backend: its passes over the
// weights.
#pragma once

#include <vector>

#include "common/tensor.h"

namespace ck {

// A matrix is a tensor (1, 1, rows, columns) of any strides and floating dtype.
struct Merge {
  Tensor base;                  // W0 (R, E)
  std::vector<Tensor> weights;  // W_n (R, E)
  std::vector<Tensor> targets;  // C_n (s_n, E)
  Tensor basis;                 // v (Σ s_n, E); not of the residuals
  Tensor out;

  int64_t rows() const { return base.size[2]; }
  int64_t width() const { return base.size[3]; }
  int64_t constraints() const {
    int64_t count = 0;
    for (const Tensor& target : targets) count += target.size[2];
    return count;
  }
};

// out = [(W_n - W0) C_nᵀ]_n (R, Σ s_n). std::invalid_argument names what does not belong together.
void check_residual(const Merge& merge);

// out = W0 + [(W_n - W0) C_nᵀ]_n v, of the dtype of W0, and in its memory if wanted.
void check_apply(const Merge& merge);

}  // namespace ck
