// Forward: out = softmax(q kᵀ · scale + bias) v.
//
// A warp holds 16 queries and their scores with one tile of keys; a block of warps walks a chunk of the
// queries of one head. Up to one tile of keys K and V are read once a block and there is no online softmax;
// longer contexts pass through tile by tile with a running maximum and sum. What the next step reads is on
// its way while this one computes.
#include "cuda/attention.h"
#include "cuda/host.h"

namespace ck {
namespace cuda {
namespace {

struct ForwardParams : Problem {
  Matrices out;
  bool staged;                // the layout's table fits into shared memory
  int blocks, chunks, tiles;  // blocks of queries in all, chunks of them, tiles of keys
};

template <class T, int DIM, int KEYS, bool ONE_TILE>
struct ForwardShape {
  static constexpr int kWarps = sizeof(T) * DIM > 640 ? 2 : 4, kQueries = 16 * kWarps,
                       kStride = padded_width<T>(DIM);
  static constexpr int kQueryTile = kQueries * kStride, kKeyTile = KEYS * kStride;
  static constexpr int kKeyTiles = ONE_TILE ? 1 : 2;
  static constexpr int kBytes = (2 * kQueryTile + 2 * kKeyTiles * kKeyTile) * sizeof(T);
};

template <class T, int DIM, int KEYS, bool ONE_TILE, bool BIAS>
__global__ void __launch_bounds__(ForwardShape<T, DIM, KEYS, ONE_TILE>::kWarps * 32)
    attention_fwd_kernel(const __grid_constant__ ForwardParams p) {
  using Shape = ForwardShape<T, DIM, KEYS, ONE_TILE>;
  T* const queries = reinterpret_cast<T*>(dynamic_shared());  // two tiles
  T* const keys = queries + 2 * Shape::kQueryTile;
  T* const values = keys + Shape::kKeyTiles * Shape::kKeyTile;
  float* const staged =
      BIAS && p.staged ? reinterpret_cast<float*>(dynamic_shared() + Shape::kBytes) : nullptr;

  // Heads first: in (B, N, H, D) memory neighbouring heads share sectors.
  const int h = blockIdx.x % p.heads, chunk = blockIdx.x / p.heads % p.chunks;
  const int b = blockIdx.x / p.heads / p.chunks;
  const int first_block = static_cast<int>(static_cast<int64_t>(p.blocks) * chunk / p.chunks);
  const int end_block = static_cast<int>(static_cast<int64_t>(p.blocks) * (chunk + 1) / p.chunks);
  const int tiles = ONE_TILE ? 1 : p.tiles, steps = (end_block - first_block) * tiles;
  const Matrix<T> query = matrix<T>(p.query, b, h, p.queries, p.dim);
  const Matrix<T> key = matrix<T>(p.key, b, h, p.keys, p.dim);
  const Matrix<T> value = matrix<T>(p.value, b, h, p.keys, p.dim);

  const auto fetch = [&](int step) {
    const int block = step / tiles, tile = step % tiles, place = ONE_TILE ? 0 : step % 2 * Shape::kKeyTile;
    if (tile == 0) {
      load_tile<T, Shape::kQueries, DIM>(queries + block % 2 * Shape::kQueryTile, query,
                                         (first_block + block) * Shape::kQueries);
    }
    if (!ONE_TILE || step == 0) {
      load_tile<T, KEYS, DIM>(keys + place, key, tile * KEYS);
      load_tile<T, KEYS, DIM>(values + place, value, tile * KEYS);
    }
    copy_async_commit();
  };

  if (staged != nullptr) stage_table<T, KEYS>(staged, p.bias, b, p.keys);
  float out[DIM / 8][4];
  RowPair top, sum;
  fetch(0);
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<0>();
    __syncthreads();  // this step's tiles are there, and the last step's have been read
    if (step + 1 < steps) fetch(step + 1);

    const int block = step / tiles, tile = step % tiles, warp_row = threadIdx.x / 32 * 16;
    const int first = (first_block + block) * Shape::kQueries + warp_row;
    if (first >= p.queries) continue;
    const int place = ONE_TILE ? 0 : step % 2 * Shape::kKeyTile;
    float s[KEYS / 8][4];
    product_nt<T, DIM>(s, queries + block % 2 * Shape::kQueryTile + warp_row * Shape::kStride, keys + place);
    finish_scores<T, BIAS>(s, p.scale, p.bias, staged, b, h, first, p.queries, tile * KEYS, p.keys);

    if (tile == 0) {
      clear(out);
      top = {-INFINITY, -INFINITY};
      sum = {0, 0};
    }
    const RowPair tile_top = row_max(s);
    const RowPair new_top = {fmaxf(top.upper, tile_top.upper), fmaxf(top.lower, tile_top.lower)};
    const RowPair shift = finite(new_top);
    exponentials<T>(s, shift);
    const RowPair tile_sum = row_sum(s);
    if constexpr (ONE_TILE) {
      sum = tile_sum;
    } else {
      const RowPair faded = {exponential<T>(top.upper - shift.upper),
                             exponential<T>(top.lower - shift.lower)};
      sum = {sum.upper * faded.upper + tile_sum.upper, sum.lower * faded.lower + tile_sum.lower};
      scale_rows(out, faded);
      top = new_top;
    }
    product_nn(out, s, values + place, Shape::kStride);
    if (tile == tiles - 1) {
      const RowPair factor = inverse(sum);
      store_results(matrix<T>(p.out, b, h, p.queries, p.dim), first, 0, out, factor.upper, factor.lower);
    }
  }
}

struct Variant {
  void (*kernel)(ForwardParams);
  int queries, keys, threads, bytes;
  bool one_tile;
};

template <class T, int DIM, int KEYS, bool ONE_TILE, bool BIAS = true>
Variant variant() {
  using Shape = ForwardShape<T, DIM, KEYS, ONE_TILE>;
  static_assert(Shape::kBytes <= kMostShared, "fits an A100");
  return {attention_fwd_kernel<T, DIM, KEYS, ONE_TILE, BIAS>,
          Shape::kQueries,
          KEYS,
          32 * Shape::kWarps,
          Shape::kBytes,
          ONE_TILE};
}

template <class T, int DIM>
Variant one_tile(int keys, bool biased) {
  if (keys > 80) return variant<T, DIM, 128, true>();
  return biased ? variant<T, DIM, 80, true>() : variant<T, DIM, 80, true, false>();
}

// 16 bits: one tile of up to 128 keys for the head dimensions of the models, 64 keys at a time for the rest.
template <class T>
Variant choose(int keys, int dim, bool biased) {
  if (keys <= 128) {
    if (dim <= 40) return one_tile<T, 40>(keys, biased);
    if (dim <= 64) return one_tile<T, 64>(keys, biased);
    if (dim <= 80) return one_tile<T, 80>(keys, biased);
    if (dim <= 128) return one_tile<T, 128>(keys, biased);
    if (dim <= 160) return one_tile<T, 160>(keys, biased);
  }
  if (dim <= 80) return variant<T, 80, 64, false>();
  if (dim <= 160) return variant<T, 160, 64, false>();
  return variant<T, 256, 32, false>();
}

// float32 takes twice the room.
template <>
Variant choose<float>(int keys, int dim, bool) {
  if (keys <= 80) {
    if (dim <= 40) return variant<float, 40, 80, true>();
    if (dim <= 64) return variant<float, 64, 80, true>();
    if (dim <= 80) return variant<float, 80, 80, true>();
  }
  if (dim <= 80) return variant<float, 80, 32, false>();
  if (dim <= 160) return variant<float, 160, 16, false>();
  return variant<float, 256, 16, false>();
}

}  // namespace

void attention_forward(Attention a, int device, void* stream) {
  check_forward(a);
  check_covered(a);
  const DeviceGuard guard(device);
  const Stream queue = static_cast<Stream>(stream);
  const Device info = device_info(device);
  const Sizes size = sizes(a);
  expand_bias(a);
  ForwardParams p = {problem_of(a)};
  p.out = matrices(a.out);

  Variant v;
  with_type(a.query.dtype,
            [&](auto type) { v = choose<typename decltype(type)::Type>(size.keys, size.dim, bool(p.bias)); });
  p.blocks = divide_up(p.queries, v.queries);
  p.chunks = chunks_that_fill(p.blocks, size.groups(), 8 * info.processors);
  p.tiles = divide_up(p.keys, v.keys);
  const int64_t table = staged_bytes(p.bias, v.one_tile, v.keys, v.bytes, info);
  p.staged = table > 0;
  launch(v.kernel, size.groups() * p.chunks, v.threads, v.bytes + table, queue, p);
}

}  // namespace cuda
}  // namespace ck
