// out = base + Σ scale · u v, every segment and every concept in one launch: each block of threads has a tile
// of the weight, reads it once, adds the products of all terms that change its rows, and writes it once.
#include "cuda/low_rank.h"

#include <stdexcept>
#include <string>

#include "cuda/host.h"

namespace ck {
namespace cuda {
namespace {

constexpr int kRows = 64, kColumns = 64;  // of a tile; 16 rows for each warp
constexpr int kThreads = kRows / 16 * 32;
constexpr int kDepth = 32;  // of the ranks that are in shared memory at a time

struct Factors {
  void *u, *v;  // u from the span's first row on
  int u_row, v_row, rank;
  float scale;
  bool u_wide, v_wide;
};

struct Rows {
  int begin, end, first_tile, first_term;
};

// What one launch can be told; longer sums take several.
constexpr int kMostSpans = 160, kMostTerms = 320;

struct LowRankParams {
  void *base, *out;
  int64_t base_row, out_row;
  bool base_wide, out_wide;
  int width, column_tiles, spans;
  Rows span[kMostSpans + 1];  // the last one says where the tiles and the terms end
  Factors term[kMostTerms];
};

// The span whose rows hold this tile.
__device__ __forceinline__ int span_of(const LowRankParams& p, int tile) {
  int low = 0, high = p.spans;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (p.span[middle].first_tile <= tile ? low : high) = middle;
  }
  return low;
}

template <int N>
__device__ __forceinline__ void add(float (&sum)[N][4], const float (&x)[N][4], float scale) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[n][i] += scale * x[n][i];
  }
}

// T: of the factors, W: of the weight.
template <class T, class W>
__global__ void __launch_bounds__(kThreads) low_rank_kernel(const __grid_constant__ LowRankParams p) {
  constexpr int kDepthStride = padded_width<T>(kDepth), kTileStride = padded_width<T>(kColumns);
  constexpr int kWeightStride = padded_width<W>(kColumns), kResults = kColumns / 8;
  W* const weight = reinterpret_cast<W*>(dynamic_shared());
  T* const u = reinterpret_cast<T*>(weight + kRows * kWeightStride);
  T* const v = u + kRows * kDepthStride;

  const int tile = blockIdx.x / p.column_tiles, column = blockIdx.x % p.column_tiles * kColumns;
  const int index = span_of(p, tile);
  const Rows span = p.span[index];
  const int row = (tile - span.first_tile) * kRows, rows = span.end - span.begin, columns = p.width - column;
  const int warp_row = threadIdx.x / 32 * 16;

  W* const base = static_cast<W*>(p.base) + span.begin * p.base_row + column;
  load_tile<W, kRows, kColumns>(weight, Matrix<W>{base, p.base_row, rows, columns, p.base_wide}, row);
  copy_async_commit();

  float sum[kResults][4], product[kResults][4];
  bool arrived = false;  // the weight's tile
  clear(sum);
  for (int i = span.first_term; i < p.span[index + 1].first_term; ++i) {
    const Factors& term = p.term[i];
    clear(product);
    for (int k = 0; k < term.rank; k += kDepth) {
      if (arrived) __syncthreads();  // the last ranks have been read
      T* const left = static_cast<T*>(term.u) + k;
      T* const right = static_cast<T*>(term.v) + int64_t{k} * term.v_row + column;
      load_tile<T, kRows, kDepth>(u, Matrix<T>{left, term.u_row, rows, term.rank - k, term.u_wide}, row);
      load_tile<T, kDepth, kColumns>(v, Matrix<T>{right, term.v_row, term.rank - k, columns, term.v_wide}, 0);
      copy_async_commit();
      copy_async_wait<0>();
      __syncthreads();
      arrived = true;
#pragma unroll
      for (int step = 0; step < kDepth; step += Fragments<T>::kStep) {
        if (k + step >= term.rank) break;
        multiply_columns<T, true>(product,
                                  Fragments<T>::load_a(u + warp_row * kDepthStride + step, kDepthStride),
                                  v + step * kTileStride, kTileStride);
      }
    }
    add(sum, product, term.scale);
  }
  if (!arrived) {
    copy_async_wait<0>();
    __syncthreads();
  }
  load_results(product, weight + warp_row * kWeightStride, kWeightStride);
  add(sum, product, 1);
  W* const out = static_cast<W*>(p.out) + span.begin * p.out_row + column;
  store_results(Matrix<W>{out, p.out_row, rows, columns, p.out_wide}, row + warp_row, 0, sum, 1, 1);
}

struct Variant {
  void (*kernel)(LowRankParams);
  int bytes;
};

template <class T, class W>
Variant variant() {
  return {
      low_rank_kernel<T, W>,
      static_cast<int>(kRows * padded_width<W>(kColumns) * sizeof(W) +
                       (kRows * padded_width<T>(kDepth) + kDepth * padded_width<T>(kColumns)) * sizeof(T))};
}

void check_matrix(const char* name, const Tensor& t, DType dtype) {
  const auto refuse = [name](const char* why) { throw std::invalid_argument(std::string(name) + why); };
  if (t.dtype == DType::kFloat64 || t.dtype == DType::kInt32) refuse(" must be float32, bfloat16 or float16");
  if (t.dtype != dtype) refuse(" must have the dtype of the other factors");
  if (t.size[3] > 1 && t.stride[3] != 1) refuse(" must be contiguous in its rows");
  for (int i = 2; i < 4; ++i) {
    if (t.size[i] > INT32_MAX / 64 || t.stride[i] < 0 || t.stride[i] > INT32_MAX) refuse(" is too large");
  }
}

Factors factors(const LowRankSum::Term& term, int64_t begin) {
  Tensor u = term.u;
  u.data = u.at(0, 0, begin - term.start);
  return {u.data,
          term.v.data,
          static_cast<int>(u.stride[2]),
          static_cast<int>(term.v.stride[2]),
          static_cast<int>(u.size[3]),
          static_cast<float>(term.scale),
          matrices(u).wide,
          matrices(term.v).wide};
}

}  // namespace

void low_rank_sum(const LowRankSum& sum, int device, void* stream) {
  check(sum);
  if (sum.rows() == 0 || sum.width() == 0) return;
  const DType dtype = sum.terms.empty() ? sum.base.dtype : sum.terms[0].u.dtype;
  check_matrix("base", sum.base, sum.base.dtype);
  check_matrix("out", sum.out, sum.base.dtype);
  for (const LowRankSum::Term& term : sum.terms) {
    check_matrix("u", term.u, dtype);
    check_matrix("v", term.v, dtype);
  }
  Variant v;
  with_type(dtype, [&](auto factor) {
    with_type(sum.base.dtype, [&](auto weight) {
      v = variant<typename decltype(factor)::Type, typename decltype(weight)::Type>();
    });
  });

  const DeviceGuard guard(device);
  LowRankParams p = {};
  p.base = sum.base.data, p.out = sum.out.data;
  p.base_row = sum.base.stride[2], p.out_row = sum.out.stride[2];
  p.base_wide = matrices(sum.base).wide, p.out_wide = matrices(sum.out).wide;
  p.width = static_cast<int>(sum.width()), p.column_tiles = divide_up(sum.width(), kColumns);
  int tiles = 0, terms = 0;
  const auto run = [&] {
    if (p.spans == 0) return;
    p.span[p.spans] = {0, 0, tiles, terms};
    launch(v.kernel, int64_t{tiles} * p.column_tiles, kThreads, v.bytes, static_cast<Stream>(stream), p);
    p.spans = tiles = terms = 0;
  };
  const bool in_place = sum.base.data == sum.out.data && p.base_row == p.out_row;
  for (const Span& span : spans(sum)) {
    const int count = static_cast<int>(span.terms.size());
    if (count == 0 && in_place) continue;
    if (count > kMostTerms) {
      throw std::invalid_argument("terms: more than " + std::to_string(kMostTerms) + " change one row");
    }
    if (p.spans == kMostSpans || terms + count > kMostTerms) run();
    p.span[p.spans++] = {static_cast<int>(span.begin), static_cast<int>(span.end), tiles, terms};
    for (const int i : span.terms) p.term[terms++] = factors(sum.terms[i], span.begin);
    tiles += divide_up(span.end - span.begin, kRows);
  }
  run();
}

}  // namespace cuda
}  // namespace ck
