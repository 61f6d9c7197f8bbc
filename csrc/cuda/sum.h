// Partial sums added in their order.
#pragma once

#include "cuda/host.h"

namespace ck {
namespace cuda {

// out[i] = Σ over count parts, each contiguous float32 of out's shape but with rows of `width` columns,
// part_stride apart.
void sum_parts(const Tensor& out, const float* parts, int64_t part_stride, int64_t count, int64_t width,
               Stream stream);

// Zeros in all of `out`: the sum of no parts.
inline void zero(const Tensor& out, Stream stream) {
  sum_parts(out, nullptr, 0, 0, 0, stream);
}

}  // namespace cuda
}  // namespace ck
