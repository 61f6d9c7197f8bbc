// Two kernels beside the backward: the statistics of rows that are longer than a tile of keys, and the
// gradient of a dense bias, which few trainings want and which therefore computes dS once more.
#include "cuda/attention_rows.h"

#include "cuda/sum.h"

namespace ck {
namespace cuda {
namespace {

struct RowsParams : Problem {
  RowStats stats;
  int blocks, tiles;
  // Of the bias gradient: (batch, heads, queries, keys) float32, contiguous; where all queries share a row,
  // one such row for each block of them: (blocks, batch, heads, keys).
  float* grad;
  int grad_batch, grad_heads, shared_batch, shared_heads;
  bool one_row;
};

template <class T, int DIM, int KEYS>
struct RowsShape {
  static constexpr int kWarps = sizeof(T) * DIM > 640 ? 2 : 4, kQueries = 16 * kWarps;
  static constexpr int kStride = padded_width<T>(DIM);
  static constexpr int kQueryTile = kQueries * kStride, kKeyTile = KEYS * kStride;
  static constexpr int kBytes = 2 * (kQueryTile + kKeyTile) * sizeof(T);
};

template <class T, int DIM, int KEYS>
__global__ void __launch_bounds__(RowsShape<T, DIM, KEYS>::kWarps * 32, 1)
    rows_kernel(const __grid_constant__ RowsParams p) {
  using Shape = RowsShape<T, DIM, KEYS>;
  T* const queries = reinterpret_cast<T*>(dynamic_shared());
  T* const grads = queries + Shape::kQueryTile;
  T* const keys = grads + Shape::kQueryTile;
  T* const values = keys + Shape::kKeyTile;
  const int h = blockIdx.x % p.heads, block = blockIdx.x / p.heads % p.blocks;
  const int b = blockIdx.x / p.heads / p.blocks;
  const int warp_row = threadIdx.x / 32 * 16, first = block * Shape::kQueries + warp_row;

  load_tile<T, Shape::kQueries, DIM>(queries, matrix<T>(p.query, b, h, p.queries, p.dim),
                                     block * Shape::kQueries);
  load_tile<T, Shape::kQueries, DIM>(grads, matrix<T>(p.grad_out, b, h, p.queries, p.dim),
                                     block * Shape::kQueries);
  RowPair top = {-INFINITY, -INFINITY}, sum = {0, 0}, dot = {0, 0};
  for (int tile = 0; tile < p.tiles; ++tile) {
    if (tile > 0) __syncthreads();  // the last tile has been read
    load_tile<T, KEYS, DIM>(keys, matrix<T>(p.key, b, h, p.keys, p.dim), tile * KEYS);
    load_tile<T, KEYS, DIM>(values, matrix<T>(p.value, b, h, p.keys, p.dim), tile * KEYS);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();

    float s[KEYS / 8][4], dp[KEYS / 8][4];
    product_nt<T, DIM>(s, queries + warp_row * Shape::kStride, keys);
    finish_scores<T, true>(s, p.scale, p.bias, nullptr, b, h, first, p.queries, tile * KEYS, p.keys);
    product_nt<T, DIM>(dp, grads + warp_row * Shape::kStride, values);
    const RowPair tile_top = row_max(s);
    const RowPair new_top = {fmaxf(top.upper, tile_top.upper), fmaxf(top.lower, tile_top.lower)};
    const RowPair shift = finite(new_top);
    const RowPair faded = {exponential<T>(top.upper - shift.upper), exponential<T>(top.lower - shift.lower)};
    exponentials<T>(s, shift);
    const RowPair tile_sum = row_sum(s), tile_dot = row_dot(s, dp);
    sum = {sum.upper * faded.upper + tile_sum.upper, sum.lower * faded.lower + tile_sum.lower};
    dot = {dot.upper * faded.upper + tile_dot.upper, dot.lower * faded.lower + tile_dot.lower};
    top = new_top;
  }
  const RowPair shift = finite(top), factor = inverse(sum);
  const int lane = warp_lane();
  if (lane % 4 != 0) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = first + lane / 4 + 8 * half;
    if (query >= p.queries) continue;
    float* to = p.stats.data + (static_cast<int64_t>(b) * p.heads + h) * p.queries + query;
    to[0] = shift.of(2 * half);
    to[p.stats.count] = factor.of(2 * half);
    to[2 * p.stats.count] = dot.of(2 * half) * factor.of(2 * half);
  }
}

// A block of threads owns a block of queries and a tile of keys of one matrix of the bias, and walks the
// heads and batch rows that share it.
template <class T, int DIM, int KEYS>
__global__ void __launch_bounds__(RowsShape<T, DIM, KEYS>::kWarps * 32, 1)
    bias_gradient_kernel(const __grid_constant__ RowsParams p) {
  using Shape = RowsShape<T, DIM, KEYS>;
  T* const queries = reinterpret_cast<T*>(dynamic_shared());
  T* const grads = queries + Shape::kQueryTile;
  T* const keys = grads + Shape::kQueryTile;
  T* const values = keys + Shape::kKeyTile;
  const int block = blockIdx.x % p.blocks, tile = blockIdx.x / p.blocks % p.tiles;
  const int group = blockIdx.x / p.blocks / p.tiles, grad_h = group % p.grad_heads,
            grad_b = group / p.grad_heads;
  const int warp = threadIdx.x / 32, lane = warp_lane(), first = block * Shape::kQueries + 16 * warp;

  float total[KEYS / 8][4];
  clear(total);
  for (int turn = 0; turn < p.shared_heads * p.shared_batch; ++turn) {
    const int h = grad_h + turn % p.shared_heads, b = grad_b + turn / p.shared_heads;
    if (turn > 0) __syncthreads();  // the last turn's tiles have been read
    load_tile<T, Shape::kQueries, DIM>(queries, matrix<T>(p.query, b, h, p.queries, p.dim),
                                       block * Shape::kQueries);
    load_tile<T, Shape::kQueries, DIM>(grads, matrix<T>(p.grad_out, b, h, p.queries, p.dim),
                                       block * Shape::kQueries);
    load_tile<T, KEYS, DIM>(keys, matrix<T>(p.key, b, h, p.keys, p.dim), tile * KEYS);
    load_tile<T, KEYS, DIM>(values, matrix<T>(p.value, b, h, p.keys, p.dim), tile * KEYS);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();

    float prob[KEYS / 8][4], dp[KEYS / 8][4];
    product_nt<T, DIM>(prob, queries + 16 * warp * Shape::kStride, keys);
    finish_scores<T, true>(prob, p.scale, p.bias, nullptr, b, h, first, p.queries, tile * KEYS, p.keys);
    product_nt<T, DIM>(dp, grads + 16 * warp * Shape::kStride, values);
    const RowStats::Rows rows = p.stats.rows(static_cast<int64_t>(b) * p.heads + h, first, p.queries);
    exponentials<T>(prob, rows.shift);
    scale_rows(prob, rows.inverse);
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) total[n][i] += prob[n][i] * (dp[n][i] - rows.dot.of(i));
    }
  }

  const int rows = p.one_row ? 1 : p.queries;
  float* to = p.grad + static_cast<int64_t>(group) * rows * p.keys;
  if (!p.one_row) {
    store_results(Matrix<float>{to, p.keys, p.queries, p.keys, false}, first, tile * KEYS, total, 1, 1);
    return;
  }
  // Rows past the last query have g = 0, hence dS = 0.
  float* const sums = reinterpret_cast<float*>(dynamic_shared());  // (warps, KEYS)
  __syncthreads();                                                 // the tiles have been read
#pragma unroll
  for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = total[n][e] + total[n][2 + e];
      for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(0xffffffff, sum, lanes);
      if (lane < 4) sums[warp * KEYS + 8 * n + lane * 2 + e] = sum;
    }
  }
  __syncthreads();
  to += static_cast<int64_t>(block) * p.grad_batch * p.grad_heads * p.keys;
  for (int i = threadIdx.x; i < KEYS && tile * KEYS + i < p.keys; i += blockDim.x) {
    float sum = 0;
    for (int w = 0; w < Shape::kWarps; ++w) sum += sums[w * KEYS + i];
    to[tile * KEYS + i] = sum;
  }
}

struct Variant {
  void (*rows)(RowsParams);
  void (*bias_gradient)(RowsParams);
  int queries, keys, threads, bytes;
};

template <class T, int DIM, int KEYS>
Variant variant() {
  using Shape = RowsShape<T, DIM, KEYS>;
  static_assert(Shape::kBytes <= kMostShared, "fits an A100");
  return {rows_kernel<T, DIM, KEYS>, bias_gradient_kernel<T, DIM, KEYS>,
          Shape::kQueries,           KEYS,
          32 * Shape::kWarps,        Shape::kBytes};
}

Variant choose(DType dtype, int dim) {
  if (dtype == DType::kFloat32) {
    return dim <= 80    ? variant<float, 80, 32>()
           : dim <= 160 ? variant<float, 160, 32>()
                        : variant<float, 256, 32>();
  }
  if (dtype == DType::kBFloat16) {
    return dim <= 80    ? variant<bf16, 80, 64>()
           : dim <= 160 ? variant<bf16, 160, 64>()
                        : variant<bf16, 256, 64>();
  }
  return dim <= 80    ? variant<fp16, 80, 64>()
         : dim <= 160 ? variant<fp16, 160, 64>()
                      : variant<fp16, 256, 64>();
}

RowsParams params(const Attention& a, const RowStats& stats, const Variant& v) {
  RowsParams p = {problem_of(a)};
  p.stats = stats;
  p.blocks = divide_up(p.queries, v.queries), p.tiles = divide_up(p.keys, v.keys);
  return p;
}

}  // namespace

void row_stats(const Attention& a, const RowStats& stats, Stream stream) {
  const Variant v = choose(a.query.dtype, sizes(a).dim);
  const RowsParams p = params(a, stats, v);
  launch(v.rows, sizes(a).groups() * p.blocks, v.threads, v.bytes, stream, p);
}

int64_t bias_gradient_scratch(const Attention& a) {
  if (!a.grad_bias || a.grad_bias.size[3] == 1) return 0;
  if (a.grad_bias.size[2] != 1) return 0;  // written where it belongs
  const Variant v = choose(a.query.dtype, sizes(a).dim);
  return a.grad_bias.size[0] * a.grad_bias.size[1] * a.grad_bias.size[3] * divide_up(a.queries(), v.queries);
}

void bias_gradient(const Attention& a, const RowStats& stats, float* scratch, Stream stream) {
  const Variant v = choose(a.query.dtype, sizes(a).dim);
  RowsParams p = params(a, stats, v);
  const Tensor& grad = a.grad_bias;
  p.one_row = grad.size[2] == 1;
  p.grad = p.one_row ? scratch : static_cast<float*>(grad.data);
  p.grad_batch = static_cast<int>(grad.size[0]), p.grad_heads = static_cast<int>(grad.size[1]);
  p.shared_batch = sizes(a).batch / p.grad_batch, p.shared_heads = p.heads / p.grad_heads;
  const int64_t matrices = grad.size[0] * grad.size[1];
  launch(v.bias_gradient, matrices * p.tiles * p.blocks, v.threads, v.bytes, stream, p);
  if (p.one_row) sum_parts(grad, scratch, matrices * p.keys, p.blocks, p.keys, stream);
}

}  // namespace cuda
}  // namespace ck
