// A warp's block of 16 rows of scores: the bias, the softmax, and what the backward needs of it.
//
// Scores are kept in their own units: every finite bias is legal, and times log2(e) some would be infinite.
// A row whose every score is -inf has a softmax of zeros.
#pragma once

#include "cuda/tiles.h"

namespace ck {
namespace cuda {

// A dense bias (B, H, N, S), or the table (B, regions, S) of a layout with the label of each query. Strides
// count elements and are 0 where it is broadcast.
struct Bias {
  const void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, key = 0;
  const int32_t* labels = nullptr;
  int64_t labels_batch = 0;
  int regions = 0;
  bool narrow = false;  // in the query's own 16-bit type, otherwise float32

  __host__ __device__ explicit operator bool() const { return data != nullptr; }
};

// What a row of the bias is chosen by: the query, or its region. A label outside the table counts as the
// nearest one in it, so that no memory but the table's is read.
__device__ __forceinline__ int bias_row(const Bias& bias, int b, int query) {
  if (bias.labels == nullptr) return query;
  const int label = bias.labels[b * bias.labels_batch + query];
  return label < 0 ? 0 : label < bias.regions ? label : bias.regions - 1;
}

template <class T>
__device__ __forceinline__ float bias_at(const Bias& bias, int64_t offset) {
  if (bias.narrow) return to_float(static_cast<const T*>(bias.data)[offset]);
  return static_cast<const float*>(bias.data)[offset];
}

// A layout's table of one batch row in shared memory: (regions, KEYS) float32.
template <class T, int KEYS>
__device__ __forceinline__ void stage_table(float* staged, const Bias& bias, int b, int keys) {
  for (int i = threadIdx.x; i < bias.regions * KEYS; i += blockDim.x) {
    const int row = i / KEYS, key = i % KEYS;
    staged[i] = key < keys ? bias_at<T>(bias, b * bias.batch + row * bias.row + key * bias.key) : 0;
  }
}

// s += bias for queries `first` on and the keys from `first_key` on. `staged`: what stage_table left, or
// null.
template <class T, int N>
__device__ __forceinline__ void add_bias(float (&s)[N][4], const Bias& bias, const float* staged, int b,
                                         int h, int first, int queries, int first_key, int keys) {
  const int lane = warp_lane();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = min(first + lane / 4 + 8 * half, queries - 1);
    const int row = bias_row(bias, b, query);
    if (staged != nullptr) {
      const float* line = staged + row * 8 * N + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const float2 x = *reinterpret_cast<const float2*>(line + 8 * n);
        s[n][2 * half] += x.x;
        s[n][2 * half + 1] += x.y;
      }
    } else {
      const int64_t line = b * bias.batch + h * bias.head + row * bias.row;
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = first_key + 8 * n + lane % 4 * 2 + e;
          if (key < keys) s[n][2 * half + e] += bias_at<T>(bias, line + key * bias.key);
        }
      }
    }
  }
}

// s = s · scale + bias, -inf beyond the last key.
template <class T, bool BIAS, int N>
__device__ __forceinline__ void finish_scores(float (&s)[N][4], float scale, const Bias& bias,
                                              const float* staged, int b, int h, int first, int queries,
                                              int first_key, int keys) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] *= scale;
  }
  if constexpr (BIAS) {
    if (bias) add_bias<T>(s, bias, staged, b, h, first, queries, first_key, keys);
  }
#pragma unroll
  for (int n = 0; n < N; ++n) {
    if (first_key + 8 * n + 8 <= keys) continue;  // the same for the whole warp
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first_key + 8 * n + warp_lane() % 4 * 2 + i % 2 >= keys) s[n][i] = -INFINITY;
    }
  }
}

// One number of each of the two rows that a lane holds: of row g, and of row g + 8.
struct RowPair {
  float upper, lower;

  __device__ __forceinline__ float of(int i) const { return i < 2 ? upper : lower; }
};

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}

template <int N>
__device__ __forceinline__ RowPair row_max(const float (&s)[N][4]) {
  RowPair top = {-INFINITY, -INFINITY};
#pragma unroll
  for (int n = 0; n < N; ++n) {
    top.upper = fmaxf(top.upper, fmaxf(s[n][0], s[n][1]));
    top.lower = fmaxf(top.lower, fmaxf(s[n][2], s[n][3]));
  }
  return {quad_max(top.upper), quad_max(top.lower)};
}

template <int N>
__device__ __forceinline__ RowPair row_sum(const float (&s)[N][4]) {
  RowPair sum = {0, 0};
#pragma unroll
  for (int n = 0; n < N; ++n) {
    sum.upper += s[n][0] + s[n][1];
    sum.lower += s[n][2] + s[n][3];
  }
  return {quad_sum(sum.upper), quad_sum(sum.lower)};
}

// rowsum(x ∘ y)
template <int N>
__device__ __forceinline__ RowPair row_dot(const float (&x)[N][4], const float (&y)[N][4]) {
  RowPair sum = {0, 0};
#pragma unroll
  for (int n = 0; n < N; ++n) {
    sum.upper += x[n][0] * y[n][0] + x[n][1] * y[n][1];
    sum.lower += x[n][2] * y[n][2] + x[n][3] * y[n][3];
  }
  return {quad_sum(sum.upper), quad_sum(sum.lower)};
}

// e^x: the full precision only where the result is float32.
template <class T>
__device__ __forceinline__ float exponential(float x) {
  if constexpr (sizeof(T) == 4) return expf(x);
  return exp2_approx(x * 1.4426950408889634f);
}

// A maximum as a shift: a row of -inf is shifted by 0, and its exponentials are 0, not NaN.
__device__ __forceinline__ RowPair finite(RowPair top) {
  return {top.upper == -INFINITY ? 0.f : top.upper, top.lower == -INFINITY ? 0.f : top.lower};
}

// 1 / sum, and 0 for a row without a key.
__device__ __forceinline__ RowPair inverse(RowPair sum) {
  return {sum.upper == 0 ? 0.f : 1 / sum.upper, sum.lower == 0 ? 0.f : 1 / sum.lower};
}

// s -> e^(s - shift)
template <class T, int N>
__device__ __forceinline__ void exponentials(float (&s)[N][4], RowPair shift) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] = exponential<T>(s[n][i] - shift.of(i));
  }
}

template <int N>
__device__ __forceinline__ void scale_rows(float (&s)[N][4], RowPair factor) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] *= factor.of(i);
  }
}

}  // namespace cuda
}  // namespace ck
