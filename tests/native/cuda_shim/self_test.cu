// Small kernels that use each thing that csrc/cuda may use, for tests/test_cuda_shim.py.
#include "self_test.h"

#include <stdexcept>

#include "cuda/machine.h"

namespace ck {
namespace cuda {
namespace {

constexpr unsigned kAll = 0xffffffff;

// out[block] = the transposed 32x32 matrix of each block.
__global__ void __launch_bounds__(256) transpose(const __grid_constant__ SelfTest p) {
  float* tile = reinterpret_cast<float*>(dynamic_shared());
  const int64_t start = int64_t(blockIdx.x) * 1024;
  const float* in = static_cast<const float*>(p.a) + start;
  for (int i = threadIdx.x; i < 1024; i += blockDim.x) tile[i] = in[i];
  __syncthreads();
  for (int i = threadIdx.x; i < 1024; i += blockDim.x) {
    static_cast<float*>(p.out)[start + i] = tile[i % 32 * 32 + i / 32];
  }
}

// Rows of 16 bytes a thread go through a ring of two stages: out is a without its rows from p.n on, which are
// zeros and are not read. The rows of a stage are read by the neighbour of the thread that copied them.
template <bool Wait>
__global__ void copy(const __grid_constant__ SelfTest p) {
  uint4* ring = reinterpret_cast<uint4*>(dynamic_shared());
  const int me = threadIdx.x, threads = blockDim.x, rounds = 4;
  const uint4* in = static_cast<const uint4*>(p.a);
  const auto fetch = [&](int round) {
    const int row = round * threads + me;
    if (round < rounds) copy_async_16(&ring[round % 2 * threads + me], in + row, row < p.n);
    copy_async_commit();
  };
  fetch(0);
  for (int round = 0; round < rounds; ++round) {
    fetch(round + 1);
    if (Wait) copy_async_wait<1>();
    __syncthreads();
    const int other = (me + 1) % threads;
    static_cast<uint4*>(p.out)[round * threads + other] = ring[round % 2 * threads + other];
    __syncthreads();
  }
  copy_async_wait<0>();
}

// out (4 loads, 4 words, 32 lanes): the words of x4, x4_trans, x2, x2_trans of 32 rows of 8 elements.
__global__ void load_matrices(const __grid_constant__ SelfTest p) {
  const int lane = threadIdx.x;
  uint4* rows = reinterpret_cast<uint4*>(dynamic_shared());
  rows[lane] = static_cast<const uint4*>(p.a)[lane];
  __syncwarp();
  uint32_t four[4], two[2];
  uint32_t* out = static_cast<uint32_t*>(p.out) + lane;
  ldmatrix_x4(four, rows + lane);
  for (int i = 0; i < 4; ++i) out[32 * i] = four[i];
  ldmatrix_x4_trans(four, rows + lane);
  for (int i = 0; i < 4; ++i) out[32 * (4 + i)] = four[i];
  ldmatrix_x2(two, rows + lane % 16);
  for (int i = 0; i < 2; ++i) out[32 * (8 + i)] = two[i];
  ldmatrix_x2_trans(two, rows + lane % 16);
  for (int i = 0; i < 2; ++i) out[32 * (12 + i)] = two[i];
}

// out (16,8) float += a (16,n) b (n,8), n a multiple of 16 or (K = 8) of 8: a row-major, b as it lies too, so
// that its fragments come transposed.
template <class T, int K>
__global__ void multiply(const __grid_constant__ SelfTest p) {
  const int lane = threadIdx.x, group = lane / 4, column = lane % 4 * 2;
  T* a = reinterpret_cast<T*>(dynamic_shared());
  T* b = a + 16 * p.n;
  for (int i = lane; i < 16 * p.n; i += 32) a[i] = static_cast<const T*>(p.a)[i];
  for (int i = lane; i < 8 * p.n; i += 32) b[i] = static_cast<const T*>(p.b)[i];
  __syncwarp();
  float* out = static_cast<float*>(p.out);
  float c[4];
  for (int i = 0; i < 4; ++i) c[i] = out[(group + i / 2 * 8) * 8 + column + i % 2];
  for (int k = 0; k < p.n; k += K) {
    if constexpr (K == 16) {
      uint32_t left[4], right[2];
      ldmatrix_x4(left, a + lane % 16 * p.n + k + lane / 16 * 8);
      ldmatrix_x2_trans(right, b + (k + lane % 16) * 8);
      mma_k16<T>(c, left, right);
    } else {
      uint32_t left[2], right[2];
      ldmatrix_x2(left, a + lane % 16 * p.n + k);
      ldmatrix_x2_trans(right, b + (k + lane % 8) * 8);
      mma_k8<T>(c, left, right[0]);
    }
  }
  for (int i = 0; i < 4; ++i) out[(group + i / 2 * 8) * 8 + column + i % 2] = c[i];
}

// The same for float, n a multiple of 8; rounded to tf32 before, or not.
template <bool Round>
__global__ void multiply_tf32(const __grid_constant__ SelfTest p) {
  const int lane = threadIdx.x, group = lane / 4, t = lane % 4;
  const auto word = [](const void* from, int i) {
    const float x = static_cast<const float*>(from)[i];
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return Round ? to_tf32(x) : bits;
  };
  float c[4];
  float* out = static_cast<float*>(p.out);
  for (int i = 0; i < 4; ++i) c[i] = out[(group + i / 2 * 8) * 8 + 2 * t + i % 2];
  for (int k = 0; k < p.n; k += 8) {
    uint32_t left[4], right[2];
    for (int i = 0; i < 4; ++i) left[i] = word(p.a, (group + i % 2 * 8) * p.n + k + t + i / 2 * 4);
    for (int i = 0; i < 2; ++i) right[i] = word(p.b, (k + t + i * 4) * 8 + group);
    mma_tf32(c, left, right);
  }
  for (int i = 0; i < 4; ++i) out[(group + i / 2 * 8) * 8 + 2 * t + i % 2] = c[i];
}

// out (2,n): a with lanes exchanged as p.n % 32 says, as float and as int; then whether any of a warp is > 0.
__global__ void shuffle(const __grid_constant__ SelfTest p) {
  const int i = threadIdx.x, n = blockDim.x;
  const float x = static_cast<const float*>(p.a)[i];
  float* out = static_cast<float*>(p.out);
  out[i] = __shfl_xor_sync(kAll, x, p.n);
  out[n + i] = float(__shfl_xor_sync(kAll, int(x), p.n)) + float(__shfl_xor_sync(kAll, unsigned(i), p.n));
  out[2 * n + i] = __any_sync(kAll, x > 0) ? 1.0f : 0.0f;
}

// The sum of a warp by one neighbour after another through shared memory, every step in need of its barriers.
__global__ void warp_sum(const __grid_constant__ SelfTest p) {
  volatile float* sums = reinterpret_cast<volatile float*>(dynamic_shared());
  const int lane = threadIdx.x;
  sums[lane] = static_cast<const float*>(p.a)[lane];
  for (int step = 16; step > 0; step /= 2) {
    __syncwarp();
    const float other = sums[lane ^ step];
    __syncwarp();
    sums[lane] = sums[lane] + other;
  }
  static_cast<float*>(p.out)[lane] = sums[lane];
}

// out = f(a), one element a thread.
enum Conversion { kFromBf16, kFromFp16, kToBf16, kToFp16, kTf32, kExp2, kPack };
template <int Kind>
__global__ void convert(const __grid_constant__ SelfTest p) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.n) return;
  const float* a = static_cast<const float*>(p.a);
  float* out = static_cast<float*>(p.out);
  if constexpr (Kind == kFromBf16) out[i] = to_float(static_cast<const bf16*>(p.a)[i]);
  if constexpr (Kind == kFromFp16) out[i] = to_float(static_cast<const fp16*>(p.a)[i]);
  if constexpr (Kind == kToBf16) static_cast<bf16*>(p.out)[i] = from_float<bf16>(a[i]);
  if constexpr (Kind == kToFp16) static_cast<fp16*>(p.out)[i] = from_float<fp16>(a[i]);
  if constexpr (Kind == kTf32) static_cast<uint32_t*>(p.out)[i] = to_tf32(a[i]);
  if constexpr (Kind == kExp2) out[i] = exp2_approx(a[i]);
  if constexpr (Kind == kPack) {
    static_cast<uint2*>(p.out)[i] = make_uint2(pack2<bf16>(a[i], -a[i]), pack2<fp16>(a[i], -a[i]));
  }
}

// Mistakes, one by one, in a block of 64 threads and 1024 bytes. Never meant for a GPU.
enum Mistake {
  kBeyond,
  kBefore,
  kSkipped,
  kEnded,
  kOtherBarrier,
  kOtherCall,
  kMask,
  kUnaligned,
  kOutside,
  kVector,
  kIndex
};
template <int Kind>
__global__ void wrong(const __grid_constant__ SelfTest p) {
  const int lane = threadIdx.x;
  char* shared = dynamic_shared();
  uint32_t words[2];
  if (Kind == kBeyond && lane == 40) shared[1024 + p.n] = 0;
  if (Kind == kBefore && lane == 40) shared[-p.n] = 0;
  if (Kind == kSkipped && lane < 16) __syncthreads();
  if (Kind == kEnded && lane == 5) return;
  if (Kind == kOtherBarrier) {
    if (lane < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  }
  if (Kind == kOtherCall) lane % 2 ? __any_sync(kAll, 1) : __shfl_xor_sync(kAll, lane, 1);
  if (Kind == kMask) __any_sync(0xf, 1);
  if (Kind == kUnaligned) ldmatrix_x2(words, shared + lane * 8);
  if (Kind == kOutside) copy_async_16(shared + lane * 32, p.a, true);
  if (Kind == kVector) *reinterpret_cast<float2*>(shared + lane * 4) = make_float2(0, 0);
  if (Kind == kIndex) words[p.n] = lane, static_cast<uint32_t*>(p.out)[lane] = words[0];
  __syncthreads();
}

}  // namespace

void self_test(const std::string& name, const SelfTest& p, int64_t blocks, int threads,
               int64_t shared_bytes) {
  struct Case {
    const char* name;
    void (*kernel)(SelfTest);
  };
  static const Case cases[] = {
      {"transpose", transpose},
      {"copy", copy<true>},
      {"copy, no wait", copy<false>},
      {"load_matrices", load_matrices},
      {"multiply bf16 k16", multiply<bf16, 16>},
      {"multiply fp16 k16", multiply<fp16, 16>},
      {"multiply bf16 k8", multiply<bf16, 8>},
      {"multiply fp16 k8", multiply<fp16, 8>},
      {"multiply tf32", multiply_tf32<true>},
      {"multiply tf32, truncated", multiply_tf32<false>},
      {"shuffle", shuffle},
      {"warp_sum", warp_sum},
      {"from bf16", convert<kFromBf16>},
      {"from fp16", convert<kFromFp16>},
      {"to bf16", convert<kToBf16>},
      {"to fp16", convert<kToFp16>},
      {"to tf32", convert<kTf32>},
      {"exp2", convert<kExp2>},
      {"pack", convert<kPack>},
      {"write beyond shared memory", wrong<kBeyond>},
      {"write before shared memory", wrong<kBefore>},
      {"barrier that some skip", wrong<kSkipped>},
      {"thread that ends early", wrong<kEnded>},
      {"two barriers", wrong<kOtherBarrier>},
      {"two calls in a warp", wrong<kOtherCall>},
      {"part of a warp", wrong<kMask>},
      {"unaligned row", wrong<kUnaligned>},
      {"copy outside", wrong<kOutside>},
      {"unaligned vector", wrong<kVector>},
      {"index outside", wrong<kIndex>},
  };
  for (const Case& c : cases) {
    if (name == c.name) return launch(c.kernel, blocks, threads, shared_bytes, Stream(), p);
  }
  throw std::invalid_argument("no kernel named " + name);
}

}  // namespace cuda
}  // namespace ck
