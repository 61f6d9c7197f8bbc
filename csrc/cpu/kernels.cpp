// Compiled once for each instruction set: CK_ISA is its name, the compiler's flags are its meaning.
#include "cpu/kernels.h"

#include "cpu/attention_bf16.h"
#include "cpu/attention_kernels.h"
#include "cpu/eigen_kernels.h"
#include "cpu/gram_kernels.h"
#include "cpu/low_rank_kernels.h"
#include "cpu/merge_kernels.h"
#include "cpu/score_moments.h"

#define CK_TEXT(name) CK_TEXT_(name)
#define CK_TEXT_(name) #name

namespace ck {
namespace CK_ISA {
namespace {

// float64 tensors are computed in double, all others in float; bfloat16 in pairs where the machine has them.
#define CK_BY_TYPE(function, a, ...)                                       \
  ((a).query.dtype == DType::kFloat64 ? function<double>(a, ##__VA_ARGS__) \
                                      : function<float>(a, ##__VA_ARGS__))

void attention_forward(const Attention& a, int64_t b, Range heads, Range queries) {
#if defined(__AVX512BF16__)
  if (a.query.dtype == DType::kBFloat16) return forward_bf16(a, b, heads, queries);
#endif
  CK_BY_TYPE(forward, a, b, heads, queries);
}

void attention_backward(const Attention& a, const BackwardTask& task) {
#if defined(__AVX512BF16__)
  if (a.query.dtype == DType::kBFloat16) return backward_task<float, BackwardBuffers16>(a, task);
#endif
  if (a.query.dtype == DType::kFloat64) return backward_task<double, BackwardBuffers<double>>(a, task);
  backward_task<float, BackwardBuffers<float>>(a, task);
}

PartialBytes partial_bytes(const Attention& a) {
  return CK_BY_TYPE(partial_sizes, a);
}

void store_key_value(const Attention& a, int64_t b, int64_t h, const char* partials, int64_t count,
                     int64_t stride) {
  CK_BY_TYPE(store_key_value, a, b, h, partials, count, stride);
}

void store_bias(const Attention& a, int64_t b, int64_t h, const char* partials, int64_t count,
                int64_t stride) {
  CK_BY_TYPE(store_bias, a, b, h, partials, count, stride);
}

void pack_rows(const Tensor& matrix, Range rows, void* target, int64_t padded, bool wide) {
  const int64_t count = rows.end - rows.begin;
  if (wide) {
    load_rows(static_cast<double*>(target), padded, matrix, 0, 0, rows.begin, count, 1.0);
  } else {
    load_rows(static_cast<float*>(target), padded, matrix, 0, 0, rows.begin, count, 1.f);
  }
}

void pack_transposed(const Tensor& matrix, void* target, int64_t padded, bool wide) {
  wide ? transposed_matrix<double>(matrix, target, padded) : transposed_matrix<float>(matrix, target, padded);
}

bool is_wide(const Tensor& tensor) {
  return tensor.dtype == DType::kFloat64;
}

void low_rank(const LowRankTask& task) {
  is_wide(task.sum.base) ? low_rank_rows<double>(task) : low_rank_rows<float>(task);
}

void merge_residual(const MergeTask& task) {
  is_wide(task.merge.base) ? merge_rows<double>(task, false) : merge_rows<float>(task, false);
}

void merge_apply(const MergeTask& task) {
  is_wide(task.merge.base) ? merge_rows<double>(task, true) : merge_rows<float>(task, true);
}

}  // namespace

extern const Kernels table;
const Kernels table = {CK_TEXT(CK_ISA),     attention_forward, attention_backward, partial_bytes,
                       store_key_value,     store_bias,        score_moments,      symmetric_eigenvalues,
                       tridiagonal_vectors, pack_rows,         pack_transposed,    low_rank,
                       merge_residual,      merge_apply,       pack_gram,          add_gram};

}  // namespace CK_ISA
}  // namespace ck
