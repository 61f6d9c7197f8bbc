// Low-rank sums on the GPU; raw pointers of the device, a stream, nothing of any framework.
#pragma once

#include "common/low_rank.h"

namespace ck {
namespace cuda {

// Fills sum.out. Factors are of one dtype among themselves; of float32, bfloat16 and float16 all.
void low_rank_sum(const LowRankSum& sum, int device, void* stream);

}  // namespace cuda
}  // namespace ck
