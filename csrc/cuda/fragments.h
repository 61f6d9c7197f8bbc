// Products of one warp on tensor cores, in one vocabulary for bf16, fp16 and float32.
//
// A result c is 16 x 8: lane 4g+t holds its rows g and g+8, columns 2t and 2t+1. An operand a is 16 x kStep,
// b is kStep x 8. float32 is multiplied as tf32x3: x = big + small, both tf32, and big·big + big·small +
// small·big; what is left out is about 2^-22 relative. There the summed index of a step is taken in the order
// 0 2 4 6 1 3 5 7, in which a lane's own results c are already an operand a.
#pragma once

#include "cuda/machine.h"

namespace ck {
namespace cuda {

__device__ __forceinline__ int warp_lane() {
  return threadIdx.x % 32;
}

// Elements between rows of a tile in shared memory: an odd number of 16-byte units, so that eight rows lie in
// different banks.
template <class T>
__host__ __device__ constexpr int padded_width(int columns) {
  constexpr int unit = 16 / sizeof(T);
  return ((columns + unit - 1) / unit | 1) * unit;
}

template <class T>
struct Fragments {  // bf16, fp16
  static constexpr int kStep = 16;
  struct A {
    uint32_t r[4];
  };
  struct B {
    uint32_t r[2];
  };

  // a[i][k] = tile[i][k], from its first row and column.
  static __device__ __forceinline__ A load_a(const T* tile, int stride) {
    A a;
    const int lane = warp_lane();
    ldmatrix_x4(a.r, tile + lane % 16 * stride + lane / 16 * 8);
    return a;
  }

  // a[i][k] = tile[k][i]
  static __device__ __forceinline__ A load_a_transposed(const T* tile, int stride) {
    A a;
    const int lane = warp_lane();
    ldmatrix_x4_trans(a.r, tile + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
    return a;
  }

  // b[k][j] = tile[j][k], for N neighbouring results of 8 columns.
  template <int N>
  static __device__ __forceinline__ void load_b(B (&b)[N], const T* tile, int stride) {
    const int lane = warp_lane();
#pragma unroll
    for (int n = 0; n + 1 < N; n += 2) {
      uint32_t r[4];
      ldmatrix_x4(r, tile + (8 * n + lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
      b[n] = {{r[0], r[1]}};
      b[n + 1] = {{r[2], r[3]}};
    }
    if (N % 2) ldmatrix_x2(b[N - 1].r, tile + (8 * (N - 1) + lane % 8) * stride + lane / 8 % 2 * 8);
  }

  // b[k][j] = tile[k][j]
  template <int N>
  static __device__ __forceinline__ void load_b_transposed(B (&b)[N], const T* tile, int stride) {
    const int lane = warp_lane();
#pragma unroll
    for (int n = 0; n + 1 < N; n += 2) {
      uint32_t r[4];
      ldmatrix_x4_trans(r, tile + lane % 16 * stride + 8 * n + lane / 16 * 8);
      b[n] = {{r[0], r[1]}};
      b[n + 1] = {{r[2], r[3]}};
    }
    if (N % 2) ldmatrix_x2_trans(b[N - 1].r, tile + lane % 16 * stride + 8 * (N - 1));
  }

  // Results as an operand: columns [kStep·step, kStep·(step+1)) of c.
  template <int N>
  static __device__ __forceinline__ A from_results(const float (&c)[N][4], int step) {
    const float (&x)[4] = c[2 * step], (&y)[4] = c[2 * step + 1];
    return {{pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(y[0], y[1]), pack2<T>(y[2], y[3])}};
  }

  static __device__ __forceinline__ void multiply(float (&c)[4], const A& a, const B& b) {
    mma_k16<T>(c, a.r, b.r);
  }

  // What is left of a sum over 16·n + 8: c[n] += tile_a[16][8] (tile_b[8·N][8])ᵀ.
  template <int N>
  static __device__ __forceinline__ void multiply_half(float (&c)[N][4], const T* tile_a, const T* tile_b,
                                                       int stride) {
    const int lane = warp_lane();
    uint32_t a[2], b[4];
    ldmatrix_x2(a, tile_a + lane % 16 * stride);
    int n = 0;
#pragma unroll
    for (; n + 3 < N; n += 4) {
      ldmatrix_x4(b, tile_b + (8 * n + lane) * stride);
#pragma unroll
      for (int i = 0; i < 4; ++i) mma_k8<T>(c[n + i], a, b[i]);
    }
#pragma unroll
    for (; n < N; n += 2) {
      uint32_t pair[2];
      const int last = n + 1 < N ? 16 : 8;
      ldmatrix_x2(pair, tile_b + (8 * n + lane % last) * stride);
      mma_k8<T>(c[n], a, pair[0]);
      if (n + 1 < N) mma_k8<T>(c[n + 1], a, pair[1]);
    }
  }
};

template <>
struct Fragments<float> {
  static constexpr int kStep = 8;
  struct A {
    uint32_t big[4], small[4];
  };
  struct B {
    uint32_t big[2], small[2];
  };

  static __device__ __forceinline__ void split(float x, uint32_t& big, uint32_t& small) {
    big = to_tf32(x);
    small = to_tf32(x - __uint_as_float(big));
  }

  static __device__ __forceinline__ A load_a(const float* tile, int stride) {
    A a;
    const int row = warp_lane() / 4, column = warp_lane() % 4 * 2;
    const float2 x = *reinterpret_cast<const float2*>(tile + row * stride + column);
    const float2 y = *reinterpret_cast<const float2*>(tile + (row + 8) * stride + column);
    split(x.x, a.big[0], a.small[0]);
    split(y.x, a.big[1], a.small[1]);
    split(x.y, a.big[2], a.small[2]);
    split(y.y, a.big[3], a.small[3]);
    return a;
  }

  static __device__ __forceinline__ A load_a_transposed(const float* tile, int stride) {
    A a;
    const float* x = tile + warp_lane() % 4 * 2 * stride + warp_lane() / 4;
    split(x[0], a.big[0], a.small[0]);
    split(x[8], a.big[1], a.small[1]);
    split(x[stride], a.big[2], a.small[2]);
    split(x[stride + 8], a.big[3], a.small[3]);
    return a;
  }

  template <int N>
  static __device__ __forceinline__ void load_b(B (&b)[N], const float* tile, int stride) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float2 x =
          *reinterpret_cast<const float2*>(tile + (8 * n + warp_lane() / 4) * stride + warp_lane() % 4 * 2);
      split(x.x, b[n].big[0], b[n].small[0]);
      split(x.y, b[n].big[1], b[n].small[1]);
    }
  }

  template <int N>
  static __device__ __forceinline__ void load_b_transposed(B (&b)[N], const float* tile, int stride) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float* x = tile + warp_lane() % 4 * 2 * stride + 8 * n + warp_lane() / 4;
      split(x[0], b[n].big[0], b[n].small[0]);
      split(x[stride], b[n].big[1], b[n].small[1]);
    }
  }

  template <int N>
  static __device__ __forceinline__ A from_results(const float (&c)[N][4], int step) {
    A a;
    split(c[step][0], a.big[0], a.small[0]);
    split(c[step][2], a.big[1], a.small[1]);
    split(c[step][1], a.big[2], a.small[2]);
    split(c[step][3], a.big[3], a.small[3]);
    return a;
  }

  static __device__ __forceinline__ void multiply(float (&c)[4], const A& a, const B& b) {
    mma_tf32(c, a.small, b.big);
    mma_tf32(c, a.big, b.small);
    mma_tf32(c, a.big, b.big);
  }

  template <int N>
  static __device__ __forceinline__ void multiply_half(float (&)[N][4], const float*, const float*, int) {}
};

// How many results of 8 columns are loaded at once: enough to keep the tensor cores busy, few enough for the
// registers.
constexpr int kGroup = 4;

template <int N>
__device__ __forceinline__ void clear(float (&c)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[n][i] = 0;
  }
}

// c[n] += a b for the N results whose operands b lie in `tile`, in groups.
template <class T, bool TRANSPOSED, int N>
__device__ __forceinline__ void multiply_columns(float (&c)[N][4], const typename Fragments<T>::A& a,
                                                 const T* tile, int stride) {
  using F = Fragments<T>;
  constexpr int kWhole = N / kGroup * kGroup, kRest = N - kWhole;
#pragma unroll
  for (int n = 0; n < kWhole; n += kGroup) {
    typename F::B b[kGroup];
    if constexpr (TRANSPOSED) {
      F::load_b_transposed(b, tile + 8 * n, stride);
    } else {
      F::load_b(b, tile + 8 * n * stride, stride);
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) F::multiply(c[n + i], a, b[i]);
  }
  if constexpr (kRest > 0) {
    typename F::B b[kRest];
    if constexpr (TRANSPOSED) {
      F::load_b_transposed(b, tile + 8 * kWhole, stride);
    } else {
      F::load_b(b, tile + 8 * kWhole * stride, stride);
    }
#pragma unroll
    for (int i = 0; i < kRest; ++i) F::multiply(c[kWhole + i], a, b[i]);
  }
}

// c = x yᵀ for 16 rows of x and 8·N rows of y, each DEPTH wide; both tiles have the row stride of that width.
template <class T, int DEPTH, int N>
__device__ __forceinline__ void product_nt(float (&c)[N][4], const T* x, const T* y) {
  using F = Fragments<T>;
  constexpr int kStride = padded_width<T>(DEPTH), kWhole = DEPTH / F::kStep * F::kStep;
  clear(c);
#pragma unroll
  for (int k = 0; k < kWhole; k += F::kStep) {
    multiply_columns<T, false>(c, F::load_a(x + k, kStride), y + k, kStride);
  }
  if constexpr (kWhole < DEPTH) F::multiply_half(c, x + kWhole, y + kWhole, kStride);
}

// c += x y for x given as results of 8·K columns and 8·K rows of y.
template <class T, int K, int N>
__device__ __forceinline__ void product_nn(float (&c)[N][4], const float (&x)[K][4], const T* y, int stride) {
  using F = Fragments<T>;
#pragma unroll
  for (int step = 0; step < 8 * K / F::kStep; ++step) {
    multiply_columns<T, true>(c, F::from_results(x, step), y + step * F::kStep * stride, stride);
  }
}

// c += xᵀ y for ROWS rows of x, 16 columns of it, and of y.
template <class T, int ROWS, int N>
__device__ __forceinline__ void product_tn(float (&c)[N][4], const T* x, int x_stride, const T* y,
                                           int y_stride) {
  using F = Fragments<T>;
#pragma unroll
  for (int k = 0; k < ROWS; k += F::kStep) {
    multiply_columns<T, true>(c, F::load_a_transposed(x + k * x_stride, x_stride), y + k * y_stride,
                              y_stride);
  }
}

}  // namespace cuda
}  // namespace ck
