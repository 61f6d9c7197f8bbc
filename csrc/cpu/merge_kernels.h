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
  char* room = static_cast<char*>(thread_scratch(
      Scratch::kTask, kMergeRows * (2 * padded + wide) * sizeof(T) + count * sizeof(Factor<T>)));
  T* block = reinterpret_cast<T*>(room);
  T* change = block + kMergeRows * padded;
  T* residual = change + kMergeRows * padded;
  Factor<T>* factors = reinterpret_cast<Factor<T>*>(residual + kMergeRows * wide);

  for (int64_t row = task.rows.begin; row < task.rows.end; row += kMergeRows) {
    const int64_t rows = task.rows.end - row < kMergeRows ? task.rows.end - row : kMergeRows;
    const Rows<T> base = padded_rows(merge.base, row, rows, block, padded);
    int64_t done = 0, column = 0;
    for (int64_t n = 0; n < count; ++n) {
      const Packed& target = task.targets[n];
      const int64_t constraints = merge.targets[n].size[2];
      subtract(padded_rows(merge.weights[n], row, rows, change, padded), base, change, rows, padded);
      gemm<T>({change, padded, 1, static_cast<const T*>(target.data), target.row, residual + column, wide,
               rows, target.row, merge.width(), false});
      if (apply) {
        factors[n] = {residual + column, wide, static_cast<const T*>(task.basis.data) + done * task.basis.row,
                      task.basis.row, constraints};
      } else {
        Tensor part = merge.out;
        part.data = merge.out.at(0, 0, 0, done);
        part.size[3] = constraints;
        store_rows(residual + column, wide, part, 0, 0, row, rows, T(1));
      }
      done += constraints;
      column += target.row;
    }
    if (!apply) continue;
    FactorSum<T> s = {base, factors, count, block, padded, padded};
    const bool in_place = lies_ready<T>(merge.out);
    if (in_place) {
      s.out = static_cast<T*>(merge.out.at(0, 0, row));
      s.out_row = merge.out.stride[2];
      s.stream = task.stream;
    }
    add_factors(s, rows);
    if (!in_place) store_rows(block, padded, merge.out, 0, 0, row, rows, T(1));
  }
  if (task.stream) finish_stream();
}

}  // namespace
}  // namespace CK_ISA
}  // namespace ck
