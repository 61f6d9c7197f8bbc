#include <stdexcept>
#include <string>

#include "common/thread_pool.h"
#include "cpu/eigen.h"
#include "cpu/kernels.h"

namespace ck {
namespace {

// Of float32 and (batch, 1, rows, columns) without gaps.
float* packed(const Tensor& t, const char* name, int64_t batch, int64_t rows, int64_t columns) {
  const bool fits = t.given && t.dtype == DType::kFloat32 && t.size[0] == batch && t.size[1] == 1 &&
                    t.size[2] == rows && t.size[3] == columns;
  const bool together = (columns <= 1 || t.stride[3] == 1) && (rows <= 1 || t.stride[2] == columns) &&
                        (batch <= 1 || t.stride[0] == rows * columns);
  if (!fits || !together)
    throw std::invalid_argument(std::string(name) + " has another dtype, shape or strides than it must have");
  return static_cast<float*>(t.data);
}

EigenTask task(float* numbers, int64_t n) {
  return {n, nullptr, nullptr, numbers, numbers + n, numbers + 2 * n, numbers + 3 * n};
}

}  // namespace

void symmetric_eigenvalues(const Tensor& matrices, const Tensor& reflectors, const Tensor& numbers,
                           int threads) {
  const int64_t batch = matrices.size[0], n = matrices.size[2];
  const float* a = packed(matrices, "matrices", batch, n, n);
  float* v = packed(reflectors, "reflectors", batch, n - 1, n - 1);
  float* out = packed(numbers, "numbers", batch, 4, n);
  const Kernels& isa = kernels();
  parallel_for(threads, batch, [&](int64_t g) {
    EigenTask one = task(out + g * 4 * n, n);
    one.matrix = a + g * n * n;
    one.reflectors = v + g * (n - 1) * (n - 1);
    isa.symmetric_eigenvalues(one);
  });
}

void tridiagonal_vectors(const Tensor& numbers, const Tensor& vectors, int threads) {
  const int64_t n = numbers.size[3], count = vectors.size[2];
  const EigenTask one = task(packed(numbers, "numbers", 1, 4, n), n);
  float* out = packed(vectors, "vectors", 1, count, n);
  if (count > n) throw std::invalid_argument("vectors must not be more than there are eigenvalues");
  constexpr int64_t kSome = 16;  // in every instruction set whole vectors of eigenvalues
  const Kernels& isa = kernels();
  parallel_for(threads, (count + kSome - 1) / kSome, [&](int64_t i) {
    isa.tridiagonal_vectors(one, i * kSome, count - i * kSome < kSome ? count - i * kSome : kSome,
                            out + i * kSome * n);
  });
}

}  // namespace ck
