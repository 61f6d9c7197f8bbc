// Rows of the closed-form merge: with D = W_n - W0, the residuals r = [D C_nᵀ]_n, and W0 + r · v.
//
// A block of rows of every matrix passes through the cache once. The difference is taken first, so that a
// small change is not lost between two large products.
#pragma once

#include "common/thread_pool.h"
#include "cpu/low_rank_kernels.h"

namespace ck {
namespace CK_ISA {
namespace {

constexpr int64_t kMergeRows = 32;

template <class T>
struct MergeBuffers {
  T *block, *change, *residual;  // rows of base or of the result that are converted, of D, and of r
  Factor<T>* factors;

  size_t place(int64_t padded, int64_t residuals, int64_t concepts, void* base) {
    Arena arena{static_cast<char*>(base)};
    block = arena.take<T>(kMergeRows * padded);
    change = arena.take<T>(kMergeRows * padded);
    residual = arena.take<T>(kMergeRows * residuals);
    factors = arena.take<Factor<T>>(concepts);
    return arena.used;
  }
};

// change = rows - base; `rows` may be `change`.
template <class T>
void subtract(const Rows<T>& rows, const Rows<T>& base, T* change, int64_t n, int64_t columns) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < columns; j += kLanes<T>) {
      store(change + i * columns + j,
            load<Vec<T>>(rows.data + i * rows.stride + j) - load<Vec<T>>(base.data + i * base.stride + j));
    }
  }
}

template <class T>
void merge_rows(const MergeTask& task, bool apply) {
  const Merge& merge = task.merge;
  const int64_t padded = round_up(merge.width(), kPadding), count = merge.weights.size();
  int64_t wide = 0;  // residuals of a row, each concept's padded
  for (int64_t n = 0; n < count; ++n) wide += task.targets[n].row;
  MergeBuffers<T> m;
  m.place(padded, wide, count, thread_scratch(Scratch::kTask, m.place(padded, wide, count, nullptr)));

  for (int64_t row = task.rows.begin; row < task.rows.end; row += kMergeRows) {
    const int64_t rows = task.rows.end - row < kMergeRows ? task.rows.end - row : kMergeRows;
    const Rows<T> base = padded_rows(merge.base, row, rows, m.block, padded);
    int64_t done = 0, column = 0;
    for (int64_t n = 0; n < count; ++n) {
      const Packed& target = task.targets[n];
      const int64_t constraints = merge.targets[n].size[2];
      subtract(padded_rows(merge.weights[n], row, rows, m.change, padded), base, m.change, rows, padded);
      gemm<T>({m.change, padded, 1, static_cast<const T*>(target.data), target.row, m.residual + column, wide,
               rows, target.row, merge.width(), false});
      if (apply) {
        m.factors[n] = {m.residual + column, wide,
                        static_cast<const T*>(task.basis.data) + done * task.basis.row, task.basis.row,
                        constraints};
      } else {
        Tensor part = merge.out;
        part.data = merge.out.at(0, 0, 0, done);
        part.size[3] = constraints;
        store_rows(m.residual + column, wide, part, 0, 0, row, rows, T(1));
      }
      done += constraints;
      column += target.row;
    }
    if (!apply) continue;
    write_sum<T>({base, m.factors, count, m.block, padded, padded}, merge.out, row, rows, task.stream);
  }
  if (task.stream) finish_stream();
}

}  // namespace
}  // namespace CK_ISA
}  // namespace ck
