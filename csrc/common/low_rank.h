// What every backend's low-rank sum is called with: a weight and any number of changes U·V of some of its
// rows.
#pragma once

#include <vector>

#include "common/tensor.h"

namespace ck {

// out = base + Σ scale · u · v. A matrix is a tensor (1, 1, rows, columns) of any strides.
struct LowRankSum {
  struct Term {
    Tensor u, v;    // (n, r) and (r, E), of any floating dtype
    int64_t start;  // it changes the rows start ... start + n - 1
    double scale;
  };

  Tensor base, out;         // (R, E), of one dtype; they may be the same memory
  std::vector<Term> terms;  // of any number for a row, one included in another or not

  int64_t rows() const { return base.size[2]; }
  int64_t width() const { return base.size[3]; }
};

// Rows that the same terms change: every row is in exactly one span, and spans ascend.
struct Span {
  int64_t begin, end;
  std::vector<int> terms;  // in the order of the sum's, without those of rank 0
};

// Cuts the rows of a checked sum where a term begins or ends.
std::vector<Span> spans(const LowRankSum& sum);

// Throws std::invalid_argument that names what does not belong together: the kernels index memory by these
// sizes.
void check(const LowRankSum& sum);

}  // namespace ck
