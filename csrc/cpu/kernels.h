// The table of kernels that each instruction set offers, and what they are called with.
#pragma once

#include "common/tensor.h"

namespace ck {

// One (b, h): its sums over the scores q kᵀ and over their squares, without building them.
struct MomentsTask {
  Tensor query, key;  // (B, H, N, D), (B, H, S, D)
  int64_t b, h;
  double sum, sum_of_squares;
};

struct Kernels {
  const char* name;
  void (*score_moments)(MomentsTask&);
};

// The kernels of the best instruction set that was built and that this machine runs. The environment variable
// CK_CPU_ISA = portable | avx2 | avx512 forces one; one that is unknown, not built or not supported by the
// machine throws std::runtime_error.
const Kernels& kernels();

// Null-terminated list of the instruction sets that this machine can run, best first.
const Kernels* const* usable_kernels();

}  // namespace ck
