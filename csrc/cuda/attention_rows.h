// What a row of scores is known by when one block of threads does not see all of it.
#pragma once

#include "cuda/host.h"

namespace ck {
namespace cuda {

// Of each query of each (b, h), float32: the shift of its exponentials (its greatest score, or 0), one over
// their sum, and D = rowsum(P ∘ dP). An array each, one after the other.
struct RowStats {
  float* data = nullptr;
  int64_t count = 0;  // of an array: B·H·N

  struct Rows {
    RowPair shift, inverse, dot;
  };

  // Of the two rows of a lane; one past the last query has no probabilities.
  __device__ __forceinline__ Rows rows(int64_t group, int first, int queries) const {
    Rows found = {};
    const float* row = data + group * queries + first + warp_lane() / 4;
    if (first + warp_lane() / 4 < queries) {
      found.shift.upper = row[0], found.inverse.upper = row[count], found.dot.upper = row[2 * count];
    }
    if (first + warp_lane() / 4 + 8 < queries) {
      found.shift.lower = row[8], found.inverse.lower = row[count + 8], found.dot.lower = row[2 * count + 8];
    }
    return found;
  }
};

// Fills stats.data, 3 · stats.count numbers.
void row_stats(const Attention& a, const RowStats& stats, Stream stream);

// a.grad_bias = the sums of dS over what shares each number of a dense bias that is not broadcast over keys.
int64_t bias_gradient_scratch(const Attention& a);
void bias_gradient(const Attention& a, const RowStats& stats, float* scratch, Stream stream);

}  // namespace cuda
}  // namespace ck
