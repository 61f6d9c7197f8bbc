// G = XᵀX in double. Slabs of rows that fit in the outer cache are converted to blocks of kGramSide columns;
// then every block of G on or below the diagonal adds the slab's products, in the order of the rows.
#include <algorithm>
#include <vector>

#include "common/matrix.h"
#include "common/thread_pool.h"
#include "cpu/kernels.h"
#include "cpu/low_rank.h"

namespace ck {
namespace {

constexpr int64_t kSlabBytes = 6 << 20;
constexpr int64_t kGroup = 3;  // a task makes kGroup x kGroup blocks of G

struct Group {
  int64_t i, j;  // first blocks
};

}  // namespace

void gram(const Tensor& features, const Tensor& out, int threads) {
  const int64_t rows = features.size[2], width = features.size[3];
  require_matrix("features", features, rows, width);
  require_matrix("out", out, width, width);
  require_dtype("out", out, DType::kFloat64);
  if (width == 0) return;
  const Kernels& isa = kernels();
  const int64_t blocks = (width + kGramSide - 1) / kGramSide, square = kGramSide * kGramSide;
  const int64_t block = kGramDepth * kGramSide;  // doubles of one block of one layer of kGramDepth rows
  const int64_t layers = std::max<int64_t>(
      1,
      std::min((rows + kGramDepth - 1) / kGramDepth, kSlabBytes / int64_t(blocks * block * sizeof(double))));
  double* sums = static_cast<double*>(
      thread_scratch(Scratch::kCall, (blocks * blocks * square + layers * blocks * block) * sizeof(double)));
  double* slab = sums + blocks * blocks * square;
  std::fill(sums, sums + blocks * blocks * square, 0.0);

  // Large tasks first, those on the diagonal last: threads finish a slab together.
  std::vector<Group> groups;
  for (int64_t i = 0; i < blocks; i += kGroup)
    for (int64_t j = 0; j < i; j += kGroup) groups.push_back({i, j});
  for (int64_t i = 0; i < blocks; i += kGroup) groups.push_back({i, i});

  for (int64_t first = 0; first < rows; first += layers * kGramDepth) {
    const int64_t here = std::min(layers, (rows - first + kGramDepth - 1) / kGramDepth);
    const auto layer_rows = [&](int64_t l) {
      const int64_t begin = first + l * kGramDepth;
      return Range{begin, std::min(rows, begin + kGramDepth)};
    };
    parallel_for(threads, here, [&](int64_t l) {
      isa.pack_gram(features, layer_rows(l), slab + l * blocks * block, block);
    });
    parallel_for(threads, groups.size(), [&](int64_t g) {
      for (int64_t l = 0; l < here; ++l) {
        const Range range = layer_rows(l);
        const double* layer = slab + l * blocks * block;
        for (int64_t j = groups[g].j; j < std::min(blocks, groups[g].j + kGroup); ++j)
          for (int64_t i = std::max(j, groups[g].i); i < std::min(blocks, groups[g].i + kGroup); ++i)
            isa.add_gram(layer + i * block, layer + j * block, range.end - range.begin,
                         sums + (i * blocks + j) * square);
      }
    });
  }

  // The lower half into both halves of the result, a square at a time.
  parallel_for(threads, groups.size(), [&](int64_t g) {
    const int64_t side = kGroup * kGramSide, i0 = groups[g].i * kGramSide, j0 = groups[g].j * kGramSide;
    for (int64_t i = i0; i < std::min(width, i0 + side); ++i)
      for (int64_t j = j0; j < std::min(i + 1, j0 + side); ++j) {
        const double x = sums[(i / kGramSide * blocks + j / kGramSide) * square + i % kGramSide * kGramSide +
                              j % kGramSide];
        *static_cast<double*>(out.at(0, 0, i, j)) = x;
        *static_cast<double*>(out.at(0, 0, j, i)) = x;
      }
  });
}

}  // namespace ck
