// Compiled once for each instruction set: CK_ISA is its name, the compiler's flags are its meaning.
#include "cpu/kernels.h"

#include "cpu/attention_bf16.h"
#include "cpu/attention_kernels.h"
#include "cpu/eigen_kernels.h"
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

}  // namespace

extern const Kernels table;
const Kernels table = {CK_TEXT(CK_ISA), attention_forward,     attention_backward,
                       partial_bytes,   store_key_value,       store_bias,
                       score_moments,   symmetric_eigenvalues, tridiagonal_vectors};

}  // namespace CK_ISA
}  // namespace ck
