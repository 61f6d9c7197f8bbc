// score_moments: Σ q·k over all pairs is Σq · Σk, and Σ (q·k)² is tr((QᵀQ)(KᵀK)); both in double.
#pragma once

#include "common/thread_pool.h"
#include "cpu/gemm.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace ck {
namespace CK_ISA {
namespace {

constexpr int64_t kMomentRows = 64;

// sum (padded) = Σ rows, gram (padded rows, padded) = XᵀX for the rows X of tensor[b, h].
inline void row_moments(const Tensor& tensor, int64_t b, int64_t h, int64_t padded, double* rows, double* sum,
                        double* gram) {
  for (int64_t i = 0; i < padded; ++i) sum[i] = 0;
  for (int64_t i = 0; i < padded * padded; ++i) gram[i] = 0;
  for (int64_t first = 0; first < tensor.size[2]; first += kMomentRows) {
    const int64_t n = tensor.size[2] - first < kMomentRows ? tensor.size[2] - first : kMomentRows;
    load_rows(rows, padded, tensor, b, h, first, n, 1.0);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < padded; ++j) sum[j] += rows[i * padded + j];
    }
    gemm<double>({rows, 1, padded, rows, padded, gram, padded, padded, padded, n, true});
  }
}

void score_moments(MomentsTask& task) {
  const int64_t padded = round_up(task.query.size[3], kColumnUnit<double>);
  const int64_t square = padded * padded;
  double* rows = static_cast<double*>(
      thread_scratch(Scratch::kTask, (kMomentRows * padded + 2 * padded + 2 * square) * sizeof(double)));
  double* query_sum = rows + kMomentRows * padded;
  double* key_sum = query_sum + padded;
  double* query_gram = key_sum + padded;
  double* key_gram = query_gram + square;

  row_moments(task.query, task.b, task.h, padded, rows, query_sum, query_gram);
  row_moments(task.key, task.b, task.h, padded, rows, key_sum, key_gram);
  task.sum = task.sum_of_squares = 0;
  for (int64_t i = 0; i < padded; ++i) task.sum += query_sum[i] * key_sum[i];
  for (int64_t i = 0; i < padded * padded; ++i) task.sum_of_squares += query_gram[i] * key_gram[i];
}

}  // namespace
}  // namespace CK_ISA
}  // namespace ck
