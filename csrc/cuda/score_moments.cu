// xᵀx and Σ x of the rows of each (b, h), from which the moments of all scores follow (MATH.md): a block of
// threads walks a part of the rows, and each of its warps keeps 16 rows of xᵀx in registers.
#include "cuda/attention.h"
#include "cuda/host.h"

namespace ck {
namespace cuda {
namespace {

struct GramParams {
  Matrices rows;
  float* parts;  // (B, H, chunks, D + 1, D)
  int heads, count, dim, blocks, chunks, slices;
};

constexpr int kRows = 64;  // at a time

template <class T, int DIM, int SLICE>
__global__ void __launch_bounds__(2 * DIM) gram_kernel(const __grid_constant__ GramParams p) {
  constexpr int kStride = padded_width<T>(DIM);
  T* const tile = reinterpret_cast<T*>(dynamic_shared());
  const int h = blockIdx.x % p.heads, slice = blockIdx.x / p.heads % p.slices * SLICE;
  const int chunk = blockIdx.x / p.heads / p.slices % p.chunks,
            b = blockIdx.x / p.heads / p.slices / p.chunks;
  const int first_block = static_cast<int>(static_cast<int64_t>(p.blocks) * chunk / p.chunks);
  const int end_block = static_cast<int>(static_cast<int64_t>(p.blocks) * (chunk + 1) / p.chunks);
  const int warp_row = threadIdx.x / 32 * 16;

  float product[SLICE / 8][4], sum = 0;
  clear(product);
  for (int block = first_block; block < end_block; ++block) {
    if (block > first_block) __syncthreads();  // the last rows have been read
    load_tile<T, kRows, DIM>(tile, matrix<T>(p.rows, b, h, p.count, p.dim), block * kRows);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    product_tn<T, kRows>(product, tile + warp_row, kStride, tile + slice, kStride);
    if (slice == 0 && threadIdx.x < DIM) {
      for (int i = 0; i < kRows; ++i) sum += to_float(tile[i * kStride + threadIdx.x]);
    }
  }
  const int64_t part = (static_cast<int64_t>(b) * p.heads + h) * p.chunks + chunk;
  float* const to = p.parts + part * (p.dim + 1) * p.dim;
  store_results(Matrix<float>{to, p.dim, p.dim, p.dim, false}, warp_row, slice, product, 1, 1);
  if (slice == 0 && static_cast<int>(threadIdx.x) < p.dim) to[p.dim * p.dim + threadIdx.x] = sum;
}

struct Variant {
  void (*kernel)(GramParams);
  int slice, threads, bytes;
};

template <class T, int DIM, int SLICE>
Variant variant() {
  return {gram_kernel<T, DIM, SLICE>, SLICE, 2 * DIM,
          kRows * padded_width<T>(DIM) * static_cast<int>(sizeof(T))};
}

template <class T>
Variant choose(int dim) {
  if (dim <= 48) return variant<T, 48, 48>();
  if (dim <= 80) return variant<T, 80, 80>();
  if (dim <= 160) return variant<T, 160, 80>();
  return variant<T, 256, 64>();
}

struct Split {
  Variant variant;
  int blocks, chunks, slices;
};

Split split_of(const Tensor& rows, int device) {
  Split split = {};
  const int dim = static_cast<int>(rows.size[3]);
  with_type(rows.dtype, [&](auto type) { split.variant = choose<typename decltype(type)::Type>(dim); });
  split.blocks = divide_up(rows.size[2], kRows);
  split.slices = divide_up(dim, split.variant.slice);
  split.chunks = chunks_that_fill(split.blocks, rows.size[0] * rows.size[1] * split.slices,
                                  4 * device_info(device).processors);
  return split;
}

}  // namespace

int64_t gram_parts(const Tensor& rows, int device) {
  check_covered("rows", rows);
  return split_of(rows, device).chunks;
}

void gram(const Tensor& rows, float* parts, int device, void* stream) {
  check_covered("rows", rows);
  const DeviceGuard guard(device);
  const Stream queue = static_cast<Stream>(stream);
  const Split split = split_of(rows, device);
  GramParams p = {};
  p.rows = matrices(rows);
  p.parts = parts;
  p.heads = static_cast<int>(rows.size[1]), p.count = static_cast<int>(rows.size[2]);
  p.dim = static_cast<int>(rows.size[3]);
  p.blocks = split.blocks, p.chunks = split.chunks, p.slices = split.slices;
  launch(split.variant.kernel, rows.size[0] * p.heads * p.slices * p.chunks, split.variant.threads,
         split.variant.bytes, queue, p);
}

}  // namespace cuda
}  // namespace ck
