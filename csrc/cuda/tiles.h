// Tiles between global and shared memory, and results of products to global memory.
#pragma once

#include "cuda/fragments.h"

namespace ck {
namespace cuda {

// The matrices of a tensor (B, H, rows, D), contiguous in D. Strides count elements.
struct Matrices {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
  bool wide = false;  // every row starts and ends at a multiple of 16 bytes

  __host__ __device__ explicit operator bool() const { return data != nullptr; }
};

// One of them.
template <class T>
struct Matrix {
  T* data;
  int64_t row;
  int rows, columns;
  bool wide;
};

template <class T>
__device__ __forceinline__ Matrix<T> matrix(const Matrices& of, int b, int h, int rows, int columns) {
  return {static_cast<T*>(of.data) + b * of.batch + h * of.head, of.row, rows, columns, of.wide};
}

// tile[i] = from[first + i] for ROWS rows and COLUMNS columns, zero outside the matrix. It is there after
// copy_async_wait and a barrier.
template <class T, int ROWS, int COLUMNS>
__device__ __forceinline__ void load_tile(T* tile, const Matrix<T>& from, int first) {
  constexpr int kUnit = 16 / sizeof(T), kUnits = COLUMNS / kUnit, kStride = padded_width<T>(COLUMNS);
  static_assert(COLUMNS % kUnit == 0, "a row is a whole number of copies");
  for (int i = threadIdx.x; i < ROWS * kUnits; i += blockDim.x) {
    const int row = i / kUnits, column = i % kUnits * kUnit;
    T* to = tile + row * kStride + column;
    const bool inside = first + row < from.rows && column < from.columns;
    const T* source = inside ? from.data + (first + row) * from.row + column : from.data;
    if (from.wide) {
      copy_async_16(to, source, inside);
    } else {
#pragma unroll
      for (int e = 0; e < kUnit; ++e) {
        to[e] = inside && column + e < from.columns ? source[e] : from_float<T>(0);
      }
    }
  }
}

// Lane t of four gets word j of tile t, where lane t had word t of tile j.
__device__ __forceinline__ void transpose_quad(uint32_t (&word)[4]) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = warp_lane() & bit;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j & bit) continue;
      const uint32_t got = __shfl_xor_sync(0xffffffff, upper ? word[j] : word[j | bit], bit);
      (upper ? word[j] : word[j | bit]) = got;
    }
  }
}

// Rows `first` to first + 16 and columns `column` on of `to`: c, its upper and lower eight rows scaled.
template <class T, int N>
__device__ __forceinline__ void store_results(const Matrix<T>& to, int first, int column,
                                              const float (&c)[N][4], float upper, float lower) {
  const int lane = warp_lane();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first + lane / 4 + 8 * half;
    const float scale = half ? lower : upper;
    const bool inside = row < to.rows;
    T* line = to.data + row * to.row;
    if (!to.wide) {
      if (!inside) continue;
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int j = column + 8 * n + lane % 4 * 2 + e;
          if (j < to.columns) line[j] = from_float<T>(c[n][2 * half + e] * scale);
        }
      }
    } else if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const int j = column + 8 * n + lane % 4 * 2;
        if (inside && j < to.columns) {
          *reinterpret_cast<float2*>(line + j) =
              make_float2(c[n][2 * half] * scale, c[n][2 * half + 1] * scale);
        }
      }
    } else {
      constexpr int kWhole = N / 4 * 4;
#pragma unroll
      for (int n = 0; n < kWhole; n += 4) {
        uint32_t word[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          word[i] = pack2<T>(c[n + i][2 * half] * scale, c[n + i][2 * half + 1] * scale);
        }
        transpose_quad(word);
        const int j = column + 8 * (n + lane % 4);
        if (inside && j < to.columns) {
          *reinterpret_cast<uint4*>(line + j) = make_uint4(word[0], word[1], word[2], word[3]);
        }
      }
#pragma unroll
      for (int n = kWhole; n < N; ++n) {
        const int j = column + 8 * n + lane % 4 * 2;
        if (inside && j < to.columns) {
          *reinterpret_cast<uint32_t*>(line + j) =
              pack2<T>(c[n][2 * half] * scale, c[n][2 * half + 1] * scale);
        }
      }
    }
  }
}

// The same into shared memory, in the type that the next product reads.
template <class T, int N>
__device__ __forceinline__ void store_tile(T* tile, int stride, const float (&c)[N][4]) {
  const int lane = warp_lane();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    T* line = tile + (lane / 4 + 8 * half) * stride + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if constexpr (sizeof(T) == 4) {
        *reinterpret_cast<float2*>(line + 8 * n) = make_float2(c[n][2 * half], c[n][2 * half + 1]);
      } else {
        *reinterpret_cast<uint32_t*>(line + 8 * n) = pack2<T>(c[n][2 * half], c[n][2 * half + 1]);
      }
    }
  }
}

// What store_tile left, rounded as the products see it.
template <class T, int N>
__device__ __forceinline__ void load_results(float (&c)[N][4], const T* tile, int stride) {
  const int lane = warp_lane();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const T* line = tile + (lane / 4 + 8 * half) * stride + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      float2 pair;
      if constexpr (sizeof(T) == 4) {
        pair = *reinterpret_cast<const float2*>(line + 8 * n);
      } else {
        pair = unpack2<T>(*reinterpret_cast<const uint32_t*>(line + 8 * n));
      }
      c[n][2 * half] = pair.x;
      c[n][2 * half + 1] = pair.y;
    }
  }
}

}  // namespace cuda
}  // namespace ck
