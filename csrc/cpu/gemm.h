// C = A·B in registers. Every product of the attention is one of these: the operand that is read a scalar at
// a time (A) may lie either way round, the one that is read a vector at a time (B) is packed and padded.
#pragma once

#include "cpu/rows.h"

namespace ck {
namespace CK_ISA {
namespace {

// What the operands are made of: float, double, or two adjacent bfloat16 along the sum in one word, which one
// instruction multiplies and adds to a float.
#if defined(__AVX512BF16__)
typedef uint32_t Pair;

inline Vec<float> multiply_add(Pair x, Vec<Pair> y, Vec<float> sum) {
  return _mm512_dpbf16_ps(sum, bit_cast<__m512bh>(Vec<Pair>{} + x), bit_cast<__m512bh>(y));
}
inline HalfVec<float> multiply_add(Pair x, HalfVec<Pair> y, HalfVec<float> sum) {
  return _mm256_dpbf16_ps(sum, bit_cast<__m256bh>(HalfVec<Pair>{} + x), bit_cast<__m256bh>(y));
}
#endif

template <class T, class V>
inline V multiply_add(T x, V y, V sum) {
  return sum + x * y;
}

template <class E>
using Sum = typename std::conditional<std::is_same<E, double>::value, double, float>::type;

template <class E>
struct Gemm {
  const E* a;  // element (i, k) at a[i * a_row + k * a_step]
  int64_t a_row, a_step;
  const E* b;  // (depth, columns), row-major with b_row elements a row
  int64_t b_row;
  Sum<E>* c;  // (rows, columns), row-major
  int64_t c_row;
  int64_t rows, columns, depth;  // columns is a multiple of kColumnUnit
  bool accumulate;               // C += A·B
  Ahead ahead = {};
};

// Vectors that the widest tile has, a half vector counted as one.
constexpr int kWidest = kRegisters == 32 ? 5 : 3;

// Rows a tile of `vectors` vectors has: the accumulators, one row of B and one broadcast fill the registers.
constexpr int tile_rows(int vectors) {
  const int rows = (kRegisters - vectors - 1) / vectors;
  return rows < 8 ? rows : 8;
}

template <class E, int R, int V, bool Half>
inline void gemm_tile(const Gemm<E>& g, int64_t row, int64_t column) {
  typedef Sum<E> T;
  Vec<T> sum[R][V ? V : 1] = {};
  HalfVec<T> half_sum[R] = {};
  const E* a = g.a + row * g.a_row;
  const E* b = g.b + column;
  for (int64_t k = 0; k < g.depth; ++k, a += g.a_step, b += g.b_row) {
    Vec<E> bv[V ? V : 1];
    HalfVec<E> bh;
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) bv[j] = load<Vec<E>>(b + j * kLanes<E>);
    if (Half) bh = load<HalfVec<E>>(b + V * kLanes<E>);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const E x = a[i * g.a_row];
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) sum[i][j] = multiply_add(x, bv[j], sum[i][j]);
      if (Half) half_sum[i] = multiply_add(x, bh, half_sum[i]);
    }
  }
  T* c = g.c + row * g.c_row + column;
  const int64_t c_row = g.c_row;
  if (g.accumulate) {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) sum[i][j] += load<Vec<T>>(c + i * c_row + j * kLanes<T>);
      if (Half) half_sum[i] += load<HalfVec<T>>(c + i * c_row + V * kLanes<T>);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) store(c + i * c_row + j * kLanes<T>, sum[i][j]);
    if (Half) store(c + i * c_row + V * kLanes<T>, half_sum[i]);
  }
}

// The rows from `row` on in tiles of R rows, what is left in smaller ones.
template <class T, int V, bool Half, int R = tile_rows(V + Half)>
void gemm_panel(const Gemm<T>& g, int64_t column, int64_t row = 0) {
  for (; row + R <= g.rows; row += R) {
    gemm_tile<T, R, V, Half>(g, row, column);
    if (column == 0) g.ahead.fetch(row, R);
  }
  if constexpr (R > 1) gemm_panel<T, V, Half, R / 2>(g, column, row);
}

template <class T, bool Half>
void gemm_panel(const Gemm<T>& g, int64_t column, int64_t vectors) {
  switch (vectors) {
    case 0:
      if constexpr (Half) gemm_panel<T, 0, true>(g, column);
      break;
    case 1:
      gemm_panel<T, 1, Half>(g, column);
      break;
    case 2:
      gemm_panel<T, 2, Half>(g, column);
      break;
    case 3:
      if constexpr (kWidest >= 3 + Half) gemm_panel<T, 3, Half>(g, column);
      break;
    case 4:
      if constexpr (kWidest >= 4 + Half) gemm_panel<T, 4, Half>(g, column);
      break;
    case 5:
      if constexpr (kWidest >= 5 + Half) gemm_panel<T, 5, Half>(g, column);
      break;
  }
}

template <class T>
void gemm_block(const Gemm<T>& g) {
  int64_t vectors = g.columns / kLanes<T>;
  bool half = g.columns % kLanes<T> != 0;
  for (int64_t column = 0; vectors > 0 || half;) {
    // Panels as even as possible: 8 vectors are 4 + 4, not 5 + 3. A half vector rides with the last panel.
    const int64_t panels = (vectors + half + kWidest - 1) / kWidest;
    if (panels == 1 && half) {
      if constexpr (kHalfVectors) gemm_panel<T, true>(g, column, vectors);
      return;
    }
    const int64_t width = (vectors + half + panels - 1) / panels;
    gemm_panel<T, false>(g, column, width);
    vectors -= width;
    column += width * kLanes<T>;
  }
}

// Long sums go in equal blocks: the panel of B stays in the first-level cache, and rounding errors grow with
// the length of a block instead of the whole sum's.
template <class T>
void gemm(Gemm<T> g) {
  constexpr int64_t kDepth = 160;
  const int64_t blocks = g.depth > 0 ? (g.depth + kDepth - 1) / kDepth : 1;  // an empty sum is zero
  const int64_t total = g.depth;
  for (int64_t i = 0, done = 0; i < blocks; ++i) {
    g.depth = total * (i + 1) / blocks - done;
    gemm_block(g);
    g.a += g.depth * g.a_step;
    g.b += g.depth * g.b_row;
    g.accumulate = true;
    g.ahead.rows = 0;
    done += g.depth;
  }
}

}  // namespace
}  // namespace CK_ISA
}  // namespace ck
