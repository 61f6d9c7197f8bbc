// Backward in one pass over the queries: s and P again, dP = g vᵀ, dS = P ∘ (dP - D), and from them
// dQ = scale · dS k, dV = Pᵀ g, dK = scale · dSᵀ q and the sums of dS by label.
//
// A block of W warps takes one chunk of the queries of one head, 16·W at a time, and one tile of 16·W keys.
// Warp w computes the rows of 16 queries, then leaves P and dS in shared memory and adds all rows to dK and
// dV of its own 16 keys, which stay in registers to the end. Few queries would leave most of a GPU idle with
// one block a head; hence the chunks, whose partial sums sum_kernel adds in their order: no atomics. Wide
// heads also share out the columns of the results (SLICE): registers hold no more.
//
// Beyond one tile of keys a row's maximum, sum and D come from rows_kernel (attention_rows.cu), and dQ is
// summed over the tiles.
#include "cuda/attention_rows.h"
#include "cuda/host.h"
#include "cuda/sum.h"

namespace ck {
namespace cuda {
namespace {

struct BackwardParams : Problem {
  Matrices grad_query, grad_key, grad_value;  // of one part: see the strides below
  bool partial_query, partial_key_value;      // float32 partial sums instead of the gradients themselves
  int64_t query_part, key_value_part;         // elements between parts: of a tile of keys; of a chunk
  bool staged;                                // the layout's table fits into shared memory
  RowStats stats;
  float* table;  // (2 · chunks · heads, B, regions, tiles · KEYS), or null
  int batch, blocks, chunks, tiles, slices;
};

template <class T, int DIM, int WARPS, int STAGES>
struct BackwardShape {
  static constexpr int kRows = 16 * WARPS, kStride = padded_width<T>(DIM), kTile = kRows * kStride;
  static constexpr int kScoreStride = padded_width<T>(kRows), kScoreTile = kRows * kScoreStride;
  static constexpr int kBytes = ((2 * STAGES + 2) * kTile + 2 * kScoreTile) * sizeof(T);
  // dS once more as float32, for the sums by label.
  static constexpr int kExactStride = padded_width<float>(kRows);
  static constexpr int kExactBytes = sizeof(T) == 4 ? 0 : kRows * kExactStride * sizeof(float);
};

// Adds the rows of dS to the sums of their labels, in global memory. A thread owns a column and a half of the
// rows; a sum stays in its register until the label changes, which along an image is seldom.
template <int ROWS>
__device__ __forceinline__ void add_by_label(float* sums, int width, const Bias& bias, int b, const float* ds,
                                             int stride, int first, int queries) {
  const int column = threadIdx.x % ROWS, half = threadIdx.x / ROWS;
  int current = -1;
  float sum = 0;
  for (int i = half * ROWS / 2; i < (half + 1) * ROWS / 2 && first + i < queries; ++i) {
    const int label = bias_row(bias, b, first + i);
    if (label != current) {
      if (current >= 0) sums[current * width + column] = sum;
      current = label;
      sum = sums[current * width + column];
    }
    sum += ds[i * stride + column];
  }
  if (current >= 0) sums[current * width + column] = sum;
}

// Blocks that a multiprocessor should hold at once: two of five warps leave a thread 168 registers.
template <class T, int DIM, bool BIAS>
constexpr int kMinBlocks = sizeof(T) == 2 && (BIAS ? DIM <= 64 : DIM <= 80) ? 2 : 1;

template <class T, int DIM, int SLICE, int WARPS, int STAGES, bool ONE_TILE, bool BIAS>
__global__ void __launch_bounds__(32 * WARPS, kMinBlocks<T, DIM, BIAS>)
    attention_bwd_kernel(const __grid_constant__ BackwardParams p) {
  using Shape = BackwardShape<T, DIM, WARPS, STAGES>;
  constexpr int kRows = Shape::kRows, kStride = Shape::kStride, kColumns = SLICE / 8;
  T* const queries = reinterpret_cast<T*>(dynamic_shared());
  T* const grads = queries + STAGES * Shape::kTile;
  T* const keys = grads + STAGES * Shape::kTile;
  T* const values = keys + Shape::kTile;
  T* const probabilities = values + Shape::kTile;
  T* const score_grads = probabilities + Shape::kScoreTile;
  // With float32 the tile of dS is exact itself; a layout's table comes last.
  float* const exact = sizeof(T) == 4 ? reinterpret_cast<float*>(score_grads)
                                      : reinterpret_cast<float*>(dynamic_shared() + Shape::kBytes);
  const int table_at = Shape::kBytes + (p.table != nullptr ? Shape::kExactBytes : 0);
  float* const staged = BIAS && p.staged ? reinterpret_cast<float*>(dynamic_shared() + table_at) : nullptr;

  int index = blockIdx.x;
  const auto next = [&index](int n) {
    const int i = index % n;
    index /= n;
    return i;
  };
  const int h = next(p.heads), slice = next(p.slices) * SLICE, chunk = next(p.chunks);
  const int tile = ONE_TILE ? 0 : next(p.tiles), b = index;
  const int first_key = tile * kRows, warp_row = threadIdx.x / 32 * 16;
  const int first_block = static_cast<int>(static_cast<int64_t>(p.blocks) * chunk / p.chunks);
  const int end_block = static_cast<int>(static_cast<int64_t>(p.blocks) * (chunk + 1) / p.chunks);
  const Matrix<T> query = matrix<T>(p.query, b, h, p.queries, p.dim);
  const Matrix<T> grad_out = matrix<T>(p.grad_out, b, h, p.queries, p.dim);

  const auto fetch = [&](int block) {
    const int place = block % STAGES * Shape::kTile;
    load_tile<T, kRows, DIM>(queries + place, query, block * kRows);
    load_tile<T, kRows, DIM>(grads + place, grad_out, block * kRows);
    copy_async_commit();
  };

  load_tile<T, kRows, DIM>(keys, matrix<T>(p.key, b, h, p.keys, p.dim), first_key);
  load_tile<T, kRows, DIM>(values, matrix<T>(p.value, b, h, p.keys, p.dim), first_key);
  fetch(first_block);

  if (staged != nullptr) stage_table<T, kRows>(staged, p.bias, b, p.keys);

  // The label sums of this block of threads: one array for each half of the rows, each column its thread's.
  float* sums = nullptr;
  const int width = p.tiles * kRows;
  if (BIAS && p.table != nullptr && slice == 0) {
    const int part = (h * p.chunks + chunk) * 2 + threadIdx.x / kRows;
    sums = p.table + (static_cast<int64_t>(part) * p.batch + b) * p.bias.regions * width + first_key;
    for (int i = 0; i < p.bias.regions; ++i) sums[i * width + threadIdx.x % kRows] = 0;
  }

  float dk[kColumns][4], dv[kColumns][4];
  clear(dk);
  clear(dv);
  for (int block = first_block; block < end_block; ++block) {
    const int place = block % STAGES * Shape::kTile, first = block * kRows + warp_row;
    if (STAGES == 1 && block > first_block) {
      __syncthreads();  // the last block's q and g have been read
      fetch(block);
    }
    copy_async_wait<0>();
    __syncthreads();  // q and g are there; with two stages also: the last block's P and dS have been read
    if (STAGES == 2 && block + 1 < end_block) fetch(block + 1);

    {
      // P waits in shared memory while dP is computed: the registers are dK's and dV's.
      T* const own_probabilities = probabilities + warp_row * Shape::kScoreStride;
      float prob[kRows / 8][4], ds[kRows / 8][4];
      product_nt<T, DIM>(prob, queries + place + warp_row * kStride, keys);
      finish_scores<T, BIAS>(prob, p.scale, p.bias, staged, b, h, first, p.queries, first_key, p.keys);
      RowPair dot;
      if constexpr (ONE_TILE) {
        exponentials<T>(prob, finite(row_max(prob)));
        scale_rows(prob, inverse(row_sum(prob)));
      } else {
        const RowStats::Rows rows = p.stats.rows(static_cast<int64_t>(b) * p.heads + h, first, p.queries);
        exponentials<T>(prob, rows.shift);
        scale_rows(prob, rows.inverse);
        dot = rows.dot;
      }
      store_tile(own_probabilities, Shape::kScoreStride, prob);
      product_nt<T, DIM>(ds, grads + place + warp_row * kStride, values);
      load_results(prob, own_probabilities, Shape::kScoreStride);
      if constexpr (ONE_TILE) dot = row_dot(prob, ds);
#pragma unroll
      for (int n = 0; n < kRows / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) ds[n][i] = prob[n][i] * (ds[n][i] - dot.of(i));
      }
      store_tile(score_grads + warp_row * Shape::kScoreStride, Shape::kScoreStride, ds);
      if (sizeof(T) == 2 && sums != nullptr) {
        store_tile(exact + warp_row * Shape::kExactStride, Shape::kExactStride, ds);
      }
      if (p.grad_query && first < p.queries) {
        float dq[kColumns][4];
        clear(dq);
        product_nn(dq, ds, keys + slice, kStride);
        if (p.partial_query) {
          Matrix<float> to = matrix<float>(p.grad_query, b, h, p.queries, p.dim);
          to.data += tile * p.query_part;
          store_results(to, first, slice, dq, p.scale, p.scale);
        } else {
          store_results(matrix<T>(p.grad_query, b, h, p.queries, p.dim), first, slice, dq, p.scale, p.scale);
        }
      }
    }
    __syncthreads();  // P and dS are there
    if (p.grad_value) {
      product_tn<T, kRows>(dv, probabilities + warp_row, Shape::kScoreStride, grads + place + slice, kStride);
    }
    if (p.grad_key) {
      product_tn<T, kRows>(dk, score_grads + warp_row, Shape::kScoreStride, queries + place + slice, kStride);
    }
    if (sums != nullptr) {
      add_by_label<kRows>(sums, width, p.bias, b, exact, Shape::kExactStride, block * kRows, p.queries);
    }
  }

  const int own = first_key + warp_row;
  const auto store = [&](const Matrices& to, const float (&sum)[kColumns][4], float scale) {
    if (!to) return;
    if (p.partial_key_value) {
      Matrix<float> part = matrix<float>(to, b, h, p.keys, p.dim);
      part.data += chunk * p.key_value_part;
      store_results(part, own, slice, sum, scale, scale);
    } else {
      store_results(matrix<T>(to, b, h, p.keys, p.dim), own, slice, sum, scale, scale);
    }
  };
  store(p.grad_key, dk, p.scale);
  store(p.grad_value, dv, 1);
}

struct Variant {
  void (*kernel)(BackwardParams);
  int rows, slice, threads, bytes, exact_bytes;
  bool one_tile;
};

template <class T, int DIM, int SLICE, int WARPS, int STAGES, bool ONE_TILE, bool BIAS = true>
Variant variant() {
  using Shape = BackwardShape<T, DIM, WARPS, STAGES>;
  static_assert(DIM % SLICE == 0, "a head is a whole number of slices");
  static_assert(Shape::kBytes + Shape::kExactBytes <= kMostShared, "fits an A100");
  return {attention_bwd_kernel<T, DIM, SLICE, WARPS, STAGES, ONE_TILE, BIAS>,
          Shape::kRows,
          SLICE,
          32 * WARPS,
          Shape::kBytes,
          Shape::kExactBytes,
          ONE_TILE};
}

template <class T, int DIM, int SLICE, int STAGES>
Variant one_tile(bool biased) {
  return biased ? variant<T, DIM, SLICE, 5, STAGES, true>()
                : variant<T, DIM, SLICE, 5, STAGES, true, false>();
}

template <class T>
Variant choose(int keys, int dim, bool biased) {
  if (keys <= 80) {
    if (dim <= 40) return one_tile<T, 40, 40, 2>(biased);
    if (dim <= 64) return one_tile<T, 64, 64, 2>(biased);
    if (dim <= 80) return one_tile<T, 80, 80, 2>(biased);
    if (dim <= 128) return one_tile<T, 128, 64, 1>(biased);
    if (dim <= 160) return one_tile<T, 160, 80, 1>(biased);
  }
  if (dim <= 80) return variant<T, 80, 80, 4, 2, false>();
  if (dim <= 160) return variant<T, 160, 80, 4, 1, false>();
  return variant<T, 256, 64, 3, 1, false>();
}

template <>
Variant choose<float>(int keys, int dim, bool) {
  if (keys <= 80) {
    if (dim <= 40) return variant<float, 40, 40, 5, 1, true>();
    if (dim <= 64) return variant<float, 64, 64, 5, 1, true>();
    if (dim <= 80) return variant<float, 80, 40, 5, 1, true>();
  }
  if (dim <= 80) return variant<float, 80, 80, 2, 1, false>();
  if (dim <= 160) return variant<float, 160, 80, 2, 1, false>();
  return variant<float, 256, 64, 2, 1, false>();
}

// How one call is split, and where its scratch memory lies.
struct Plan {
  Variant variant;
  int blocks, chunks, tiles, slices;
  bool main, stats;                                           // which kernels run
  int64_t key_value, query, table, row_stats, bias, scratch;  // offsets, and the end of the last
};

Plan plan_of(const Attention& a, const Device& device) {
  const Sizes size = sizes(a);
  const bool biased = a.bias || a.table;
  Plan plan = {};
  with_type(a.query.dtype, [&](auto type) {
    plan.variant = choose<typename decltype(type)::Type>(size.keys, size.dim, biased);
  });
  plan.blocks = divide_up(size.queries, plan.variant.rows);
  plan.tiles = divide_up(size.keys, plan.variant.rows);
  plan.slices = divide_up(size.dim, plan.variant.slice);
  plan.chunks =
      chunks_that_fill(plan.blocks, size.groups() * plan.tiles * plan.slices, 2 * device.processors);
  plan.main = a.grad_query || a.grad_key || a.grad_value || a.grad_table;
  const bool dense = a.grad_bias && a.grad_bias.size[3] != 1;
  plan.stats = dense || (plan.main && !plan.variant.one_tile);

  // Each part begins at a multiple of 16 bytes.
  const auto take = [&plan](bool wanted, int64_t count) {
    const int64_t offset = plan.scratch;
    if (wanted) plan.scratch += (count + 3) / 4 * 4;
    return offset;
  };
  const int64_t keys = size.groups() * size.keys * size.dim,
                queries = size.groups() * size.queries * size.dim;
  plan.key_value = take((a.grad_key || a.grad_value) && plan.chunks > 1, 2 * plan.chunks * keys);
  plan.query = take(a.grad_query && plan.tiles > 1, plan.tiles * queries);
  plan.table = take(bool(a.grad_table),
                    2 * size.groups() * plan.chunks * a.table.size[2] * plan.tiles * plan.variant.rows);
  plan.row_stats = take(plan.stats, 3 * size.groups() * size.queries);
  plan.bias = take(dense, bias_gradient_scratch(a));
  return plan;
}

void run_main(const Attention& a, const Plan& plan, const RowStats& stats, float* scratch,
              const Device& device, Stream stream) {
  const Sizes size = sizes(a);
  const int64_t keys = size.groups() * size.keys * size.dim,
                queries = size.groups() * size.queries * size.dim;
  BackwardParams p = {problem_of(a)};
  p.stats = stats;
  p.batch = size.batch;
  p.blocks = plan.blocks, p.chunks = plan.chunks, p.tiles = plan.tiles, p.slices = plan.slices;

  p.partial_query = a.grad_query && plan.tiles > 1;
  p.query_part = queries;
  p.grad_query = p.partial_query ? scratch_matrices(scratch + plan.query, size.heads, size.queries, size.dim)
                                 : matrices(a.grad_query);
  p.partial_key_value = plan.chunks > 1;
  p.key_value_part = 2 * keys;
  float* const dk = scratch + plan.key_value;
  const auto key_value = [&](const Tensor& grad, float* part) {
    if (!grad || !p.partial_key_value) return matrices(grad);
    return scratch_matrices(part, size.heads, size.keys, size.dim);
  };
  p.grad_key = key_value(a.grad_key, dk), p.grad_value = key_value(a.grad_value, dk + keys);
  p.table = a.grad_table ? scratch + plan.table : nullptr;

  const Variant& v = plan.variant;
  const int bytes = v.bytes + (a.grad_table ? v.exact_bytes : 0);
  const int64_t table = staged_bytes(p.bias, v.one_tile, v.rows, bytes, device);
  p.staged = table > 0;
  launch(v.kernel, size.groups() * plan.slices * plan.chunks * plan.tiles, v.threads, bytes + table, stream,
         p);

  if (p.partial_query) sum_parts(a.grad_query, scratch + plan.query, queries, plan.tiles, size.dim, stream);
  if (p.partial_key_value) {
    if (a.grad_key) sum_parts(a.grad_key, dk, 2 * keys, plan.chunks, size.dim, stream);
    if (a.grad_value) sum_parts(a.grad_value, dk + keys, 2 * keys, plan.chunks, size.dim, stream);
  }
  if (a.grad_table) {  // parts of (B, regions, width); one table for the batch sums over its rows too
    const int64_t width = int64_t{plan.tiles} * v.rows, table_size = a.table.size[2] * width;
    const int64_t parts = 2 * int64_t{plan.chunks} * size.heads,
                  shared = a.grad_table.size[0] == 1 ? size.batch : 1;
    sum_parts(a.grad_table, p.table, table_size * (size.batch / shared), parts * shared, width, stream);
  }
}

}  // namespace

int64_t attention_backward_scratch(const Attention& a, int device) {
  check_backward(a);
  check_covered(a);
  return plan_of(a, device_info(device)).scratch;
}

void attention_backward(Attention a, int device, void* stream, float* scratch) {
  check_backward(a);
  check_covered(a);
  expand_bias(a);
  const DeviceGuard guard(device);
  const Stream queue = static_cast<Stream>(stream);
  const Device info = device_info(device);
  const Plan plan = plan_of(a, info);
  const RowStats stats = {scratch + plan.row_stats, sizes(a).groups() * sizes(a).queries};
  if (plan.stats) row_stats(a, stats, queue);
  if (plan.main) run_main(a, plan, stats, scratch, info, queue);
  if (a.grad_bias && a.grad_bias.size[3] == 1) {
    zero(a.grad_bias, queue);  // the softmax does not see a shift of a whole row
  } else if (a.grad_bias) {
    bias_gradient(a, stats, scratch + plan.bias, queue);
  }
}

}  // namespace cuda
}  // namespace ck
