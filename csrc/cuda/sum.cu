#include "cuda/sum.h"

namespace ck {
namespace cuda {
namespace {

struct SumParams {
  void* out;
  int64_t size[4], stride[4], width;
  const float* parts;
  int64_t part_stride, count, total;
};

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) sum_kernel(const __grid_constant__ SumParams p) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= p.total) return;
  const int64_t l = index % p.size[3], row = index / p.size[3];
  const int64_t k = row % p.size[2], j = row / p.size[2] % p.size[1], i = row / p.size[2] / p.size[1];
  const float* part = p.parts + row * p.width + l;
  float sum = 0;
#pragma unroll 4
  for (int64_t n = 0; n < p.count; ++n) sum += part[n * p.part_stride];
  static_cast<T*>(p.out)[i * p.stride[0] + j * p.stride[1] + k * p.stride[2] + l * p.stride[3]] =
      from_float<T>(sum);
}

}  // namespace

void sum_parts(const Tensor& out, const float* parts, int64_t part_stride, int64_t count, int64_t width,
               Stream stream) {
  SumParams p = {};
  p.out = out.data, p.parts = parts, p.part_stride = part_stride, p.count = count, p.width = width;
  p.total = 1;
  for (int i = 0; i < 4; ++i) p.size[i] = out.size[i], p.stride[i] = out.stride[i], p.total *= out.size[i];
  with_type(out.dtype, [&](auto type) {
    launch(sum_kernel<typename decltype(type)::Type>, divide_up(p.total, kThreads), kThreads, 0, stream, p);
  });
}

}  // namespace cuda
}  // namespace ck
