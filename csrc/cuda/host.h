// What the launching functions share: descriptions of tensors for the kernels, types, and the split of work.
#pragma once

#include <algorithm>

#include "common/attention.h"
#include "cuda/scores.h"

namespace ck {
namespace cuda {

inline int divide_up(int64_t n, int64_t by) {
  return static_cast<int>((n + by - 1) / by);
}

// What a block of threads may have of shared memory on an A100, the least of those the kernels are for.
constexpr int kMostShared = 163 << 10;

// As few chunks as give `wanted` blocks of threads in all: a small batch is split over its queries, a large
// one reads each K and V once.
inline int chunks_that_fill(int blocks, int64_t groups, int64_t wanted) {
  return std::max<int64_t>(1, std::min<int64_t>(blocks, divide_up(wanted, groups)));
}

inline Matrices matrices(const Tensor& t) {
  if (!t) return {};
  const int64_t unit = 16 / item_size(t.dtype);
  Matrices m = {t.data, t.stride[0], t.stride[1], t.stride[2], t.size[3] % unit == 0};
  m.wide = m.wide && reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
  for (int i = 0; i < 3; ++i) m.wide = m.wide && (t.size[i] <= 1 || t.stride[i] % unit == 0);
  return m;
}

// Contiguous float32 (batch, heads, rows, columns).
inline Matrices scratch_matrices(float* data, int64_t heads, int64_t rows, int64_t columns) {
  return {data, heads * rows * columns, rows * columns, columns, columns % 4 == 0};
}

inline Bias bias_of(const Attention& a) {
  Bias bias;
  const Tensor& from = a.table ? a.table : a.bias;
  if (!from) return bias;
  bias.data = from.data;
  bias.batch = from.stride[0], bias.head = from.stride[1], bias.row = from.stride[2];
  bias.key = from.stride[3];
  bias.narrow = item_size(from.dtype) == 2;
  if (a.table) {
    bias.labels = static_cast<const int32_t*>(a.labels.data);
    bias.labels_batch = a.labels.stride[0];
    bias.regions = static_cast<int>(a.table.size[2]);
  }
  return bias;
}

struct Sizes {
  int batch, heads, queries, keys, dim;

  int64_t groups() const { return static_cast<int64_t>(batch) * heads; }
};

inline Sizes sizes(const Attention& a) {
  return {static_cast<int>(a.batch()), static_cast<int>(a.heads()), static_cast<int>(a.queries()),
          static_cast<int>(a.keys()), static_cast<int>(a.query.size[3])};
}

// What every attention kernel is told.
struct Problem {
  Matrices query, key, value, grad_out;
  Bias bias;
  int heads, queries, keys, dim;
  float scale;
};

// Of an attention whose bias has been expanded (common/attention.h).
inline Problem problem_of(const Attention& a) {
  const Sizes size = sizes(a);
  return {matrices(a.query), matrices(a.key),
          matrices(a.value), matrices(a.grad_out),
          bias_of(a),        size.heads,
          size.queries,      size.keys,
          size.dim,          static_cast<float>(a.scale)};
}

template <class T>
struct As {
  using Type = T;
};

// run(As<T>()) for the type of `dtype`.
template <class Run>
void with_type(DType dtype, const Run& run) {
  if (dtype == DType::kBFloat16) return run(As<bf16>());
  if (dtype == DType::kFloat16) return run(As<fp16>());
  run(As<float>());
}

// Bytes of a layout's table, if all its keys are in one tile and it fits beside the tiles; otherwise 0, and
// the kernels read it where it lies.
inline int64_t staged_bytes(const Bias& bias, bool one_tile, int keys, int tile_bytes, const Device& device) {
  const int64_t bytes = int64_t{4} * bias.regions * keys;
  const bool fits = bytes <= 24 << 10 && tile_bytes + bytes <= device.shared_per_block;
  return one_tile && bias.labels != nullptr && fits ? bytes : 0;
}

// Beside ck::check: what only the CUDA kernels ask for. Throws std::invalid_argument.
void check_covered(const Attention& a);
void check_covered(const char* name, const Tensor& t);

}  // namespace cuda
}  // namespace ck
