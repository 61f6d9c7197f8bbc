// out = base + Σ u · v on some rows, for factors that lie ready in the type computed in (T).
//
// Tiles of a few rows and vectors go through all factors with their sums in registers, and only then meet the
// base: its row is read once and the result's written once, and rounding errors are those of the change, not
// of the larger weight. While a tile is computed the next columns of its rows are asked for, so that memory
// and arithmetic overlap.
#pragma once

#include "cpu/gemm.h"
#include "cpu/kernels.h"

namespace ck {
namespace CK_ISA {
namespace {

// A tile's sums, a vector of v and a broadcast of u fill the registers.
constexpr int kTileRows = kRegisters == 32 ? 8 : 4;
constexpr int kTileVectors = 3;

template <class T>
struct Factor {
  const T* u;  // (rows, rank)
  int64_t u_row;
  const T* v;  // (rank, columns)
  int64_t v_row;
  int64_t rank;
};

template <class T>
struct FactorSum {
  Rows<T> base;
  const Factor<T>* factors;
  int64_t count;
  T* out;
  int64_t out_row;
  int64_t columns;      // a multiple of kPadding
  bool stream = false;  // out is written past the caches
};

template <class T>
inline void write(T* target, Vec<T> v, bool stream) {
#if defined(__AVX512F__)
  if (stream) return _mm512_stream_si512(reinterpret_cast<__m512i*>(target), bit_cast<__m512i>(v));
#elif defined(__AVX2__)
  if (stream) return _mm256_stream_si256(reinterpret_cast<__m256i*>(target), bit_cast<__m256i>(v));
#endif
  (void)stream;
  store(target, v);
}

// What was written past the caches is seen by other threads after this.
inline void finish_stream() {
#if defined(__F16C__)
  _mm_sfence();
#endif
}

template <class T, int R, int V>
inline void factor_tile(const FactorSum<T>& s, int64_t row, int64_t column, const T* ahead) {
  Vec<T> sum[R][V] = {};
  if (ahead != nullptr) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) __builtin_prefetch(ahead + (row + i) * s.base.stride + j * kLanes<T>, 0, 2);
    }
  }
  for (const Factor<T>* f = s.factors; f != s.factors + s.count; ++f) {
    const T* u = f->u + row * f->u_row;
    const T* v = f->v + column;
    for (int64_t k = 0; k < f->rank; ++k, v += f->v_row) {
      Vec<T> vv[V];
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) vv[j] = load<Vec<T>>(v + j * kLanes<T>);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const T x = u[i * f->u_row + k];
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) sum[i][j] = multiply_add(x, vv[j], sum[i][j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
    const T* base = s.base.data + (row + i) * s.base.stride + column;
    T* out = s.out + (row + i) * s.out_row + column;
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j)
      write(out + j * kLanes<T>, load<Vec<T>>(base + j * kLanes<T>) + sum[i][j], s.stream);
  }
}

// The rows from `row` on in tiles of R rows, what is left in smaller ones.
template <class T, int V, int R = kTileRows>
void factor_panel(const FactorSum<T>& s, int64_t column, const T* ahead, int64_t rows, int64_t row = 0) {
  for (; row + R <= rows; row += R) factor_tile<T, R, V>(s, row, column, ahead);
  if constexpr (R > 1) factor_panel<T, V, R / 2>(s, column, ahead, rows, row);
}

// Panel by panel: a panel of v stays in the first-level cache for all rows.
template <class T>
void add_factors(const FactorSum<T>& s, int64_t rows) {
  for (int64_t column = 0; column < s.columns;) {
    const bool whole = column + kTileVectors * kLanes<T> <= s.columns;
    const int64_t next = column + (whole ? kTileVectors : 1) * kLanes<T>;
    const T* ahead = next < s.columns ? s.base.data + next : nullptr;
    if (whole) {
      factor_panel<T, kTileVectors>(s, column, ahead, rows);
    } else {
      factor_panel<T, 1>(s, column, ahead, rows);
    }
    column = next;
  }
}

// Whether the rows of a matrix may be read or written as padded rows of T where they lie.
template <class T>
bool lies_ready(const Tensor& t) {
  const DType own = sizeof(T) == sizeof(double) ? DType::kFloat64 : DType::kFloat32;
  return t.dtype == own && t.stride[3] == 1 && t.size[3] % kPadding == 0;
}

// Rows [first, first + n) where they lie, or loaded into `room`.
template <class T>
Rows<T> padded_rows(const Tensor& matrix, int64_t first, int64_t n, T* room, int64_t padded) {
  if (lies_ready<T>(matrix)) return {static_cast<const T*>(matrix.at(0, 0, first)), matrix.stride[2]};
  load_rows(room, padded, matrix, 0, 0, first, n, T(1));
  return {room, padded};
}

// The sum as rows [first, first + n) of a matrix: written where they lie, or by way of s.out.
template <class T>
void write_sum(FactorSum<T> s, const Tensor& matrix, int64_t first, int64_t n, bool stream) {
  if (!lies_ready<T>(matrix)) {
    add_factors(s, n);
    return store_rows(s.out, s.out_row, matrix, 0, 0, first, n, T(1));
  }
  s.out = static_cast<T*>(matrix.at(0, 0, first));
  s.out_row = matrix.stride[2];
  s.stream = stream;
  add_factors(s, n);
}

template <class T>
void transposed_matrix(const Tensor& matrix, void* target, int64_t padded) {
  const int64_t rows = matrix.size[2], columns = matrix.size[3];
  for (int64_t i = 0; i < columns; ++i) {  // a row of the result is a column of the matrix
    Tensor column = matrix;
    load_row(static_cast<T*>(target) + i * padded, column.at(0, 0, 0, i), matrix.dtype, matrix.stride[2],
             rows, padded, T(1));
  }
}

constexpr int64_t kBlockRows = 64;

template <class T>
struct LowRankBuffers {
  T *block, *u;  // rows of base or of the result that are converted, and of every term's u
  Factor<T>* factors;

  size_t place(int64_t padded, int64_t rank, int64_t terms, void* base) {
    Arena arena{static_cast<char*>(base)};
    block = arena.take<T>(kBlockRows * padded);
    u = arena.take<T>(kBlockRows * rank);
    factors = arena.take<Factor<T>>(terms);
    return arena.used;
  }
};

template <class T>
void low_rank_rows(const LowRankTask& task) {
  const LowRankSum& sum = task.sum;
  const int64_t padded = round_up(sum.width(), kPadding), count = task.span.terms.size();
  int64_t rank = 0;  // of all terms together
  for (int term : task.span.terms) rank += sum.terms[term].u.size[3];
  LowRankBuffers<T> m;
  m.place(padded, rank, count, thread_scratch(Scratch::kTask, m.place(padded, rank, count, nullptr)));

  for (int64_t row = task.rows.begin; row < task.rows.end; row += kBlockRows) {
    const int64_t n = task.rows.end - row < kBlockRows ? task.rows.end - row : kBlockRows;
    T* next = m.u;
    for (int64_t f = 0; f < count; ++f) {
      const LowRankSum::Term& term = sum.terms[task.span.terms[f]];
      const Packed& v = task.v[task.span.terms[f]];
      const int64_t r = term.u.size[3];
      load_rows(next, r, term.u, 0, 0, row - term.start, n, T(term.scale));
      m.factors[f] = {next, r, static_cast<const T*>(v.data), v.row, r};
      next += n * r;
    }
    const Rows<T> base = padded_rows(sum.base, row, n, m.block, padded);
    write_sum<T>({base, m.factors, count, m.block, padded, padded}, sum.out, row, n, task.stream);
  }
  if (task.stream) finish_stream();
}

}  // namespace
}  // namespace CK_ISA
}  // namespace ck
