// The machine that csrc/cuda is written for, played by the CPU: the kernels' own source runs with no GPU.
//
// Every CUDA thread is a fiber that runs until it meets its warp or its block; who goes next is random and
// follows a seed, as does the order of the blocks. Shared memory starts as NaN, asynchronous copies land as
// late as they may, and what a GPU would answer with a hang or with wrong numbers (threads that never meet,
// addresses outside shared memory) becomes a std::runtime_error of launch() that says what and where.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}
inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}

namespace ck {
namespace cuda {
namespace shim {

struct Index {
  unsigned x;
};

// The line of the kernel that a call stands in, taken as a default argument.
struct Where {
  const char* file;
  int line;
};
constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return {file, line};
}

// What each thread does some number of times, and tests may leave out to see whether it matters.
enum Sync { kBarrier, kWarpBarrier, kCopyWait, kSyncs };

// The order of threads and blocks. Initially CK_SHIM_SEED, or 0.
void set_seed(uint64_t seed);
// Every thread passes its n-th `sync` by (counted from 0; -1: none), in every launch from now on or in one:
// the launch-th from now.
void set_dropped(Sync sync, int n, int launch = -1);
// The most that a thread met of `sync`, for each launch since the last set_dropped.
std::vector<int> executed(Sync sync);
inline void set_dropped_barrier(int n, int launch = -1) {
  set_dropped(kBarrier, n, launch);
}
inline int barriers_of_last_launch() {
  const std::vector<int> counts = executed(kBarrier);
  return counts.empty() ? 0 : counts.back();
}

// The kernel of each launch since the last set_dropped, as its offset in this library.
std::vector<int64_t> launched();

void run_grid(const void* kernel, const std::function<void()>& thread, int64_t blocks, int threads,
              int64_t shared_bytes);
void sync_threads(Where where);
void sync_warp(unsigned mask, Where where);
uint32_t shuffle_xor(unsigned mask, uint32_t bits, int lane_xor, Where where);
bool any(unsigned mask, bool predicate, Where where);
void wait_copies(int pending);

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace shim
}  // namespace cuda
}  // namespace ck

// A fiber stays on its thread of the operating system, so these may be thread-local.
extern __thread ck::cuda::shim::Index threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads(ck::cuda::shim::Where where = ck::cuda::shim::here()) {
  ck::cuda::shim::sync_threads(where);
}
inline void __syncwarp(unsigned mask = ~0u, ck::cuda::shim::Where where = ck::cuda::shim::here()) {
  ck::cuda::shim::sync_warp(mask, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_xor,
                  ck::cuda::shim::Where where = ck::cuda::shim::here()) {
  const uint32_t bits = ck::cuda::shim::bit_cast<uint32_t>(value);
  return ck::cuda::shim::bit_cast<T>(ck::cuda::shim::shuffle_xor(mask, bits, lane_xor, where));
}
using std::max;
using std::min;
inline float __uint_as_float(unsigned bits) {
  return ck::cuda::shim::bit_cast<float>(bits);
}
inline unsigned __float_as_uint(float x) {
  return ck::cuda::shim::bit_cast<unsigned>(x);
}
inline int __any_sync(unsigned mask, int predicate, ck::cuda::shim::Where where = ck::cuda::shim::here()) {
  return ck::cuda::shim::any(mask, predicate != 0, where);
}

namespace ck {
namespace cuda {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

inline float to_float(float x) {
  return x;
}
inline float to_float(bf16 x) {
  return shim::bit_cast<float>(uint32_t(x.bits) << 16);
}
inline float to_float(fp16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, low = x.bits & 0x3ff;
  uint32_t bits = (exponent + 112) << 23 | low << 13;
  if (exponent == 31) bits = 0x7f800000 | low << 13;
  if (exponent == 0) bits = shim::bit_cast<uint32_t>(float(low) * 0x1p-24f);
  return shim::bit_cast<float>(sign | bits);
}

// To the nearest, ties to even; every NaN becomes 0x7fff, as the GPU has it.
template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  const uint32_t bits = shim::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline fp16 from_float<fp16>(float x) {
  const uint32_t bits = shim::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000;
  uint32_t size = bits & 0x7fffffff;
  if (size > 0x7f800000) return {0x7fff};
  if (size >= 0x47800000) return {uint16_t(sign | 0x7c00)};  // 2^16 and above
  if (size < 0x38800000) {  // below 2^-14: subnormal, steps of 2^-24, which are the units of 0.5f
    const uint32_t half = shim::bit_cast<uint32_t>(0.5f);
    return {uint16_t(sign | (shim::bit_cast<uint32_t>(shim::bit_cast<float>(size) + 0.5f) - half))};
  }
  size += 0xfff + (size >> 13 & 1);
  return {uint16_t(sign | (size - (112u << 23)) >> 13)};
}

// Two elements in one word, the first in the low half.
template <class T>
uint32_t pack2(float low, float high) {
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}
template <class T>
float2 unpack2(uint32_t pair) {
  return {to_float(T{uint16_t(pair)}), to_float(T{uint16_t(pair >> 16)})};
}

// To the nearest of 10 mantissa bits, ties away from zero.
inline uint32_t to_tf32(float x) {
  const uint32_t bits = shim::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fffffff;
  return (bits + 0x1000) & ~0x1fffu;
}
// Subnormals count as zero on the way in and on the way out.
inline float exp2_approx(float x) {
  const float power = std::exp2(x);
  return power < 0x1p-126f ? 0.0f : power;
}

// Warp-wide: 8x8 matrices of 16-bit elements from shared memory, each lane giving the address of one row.
void ldmatrix_x4(uint32_t (&r)[4], const void* row, shim::Where where = shim::here());
void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, shim::Where where = shim::here());
void ldmatrix_x2(uint32_t (&r)[2], const void* row, shim::Where where = shim::here());
void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, shim::Where where = shim::here());

// Warp-wide: c (16,8) += a (16,K) b (K,8). Products and their sum over K are exact or double, then c is
// added and the result rounded once to float: a little better than the GPU, which truncates on the way.
template <class T>
void mma_k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], shim::Where where = shim::here());
template <class T>
void mma_k8(float (&c)[4], const uint32_t (&a)[2], uint32_t b, shim::Where where = shim::here());
void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
              shim::Where where = shim::here());

// The copy lands in the wait for its group (one in four at once, as may be); until then its place is NaN.
void copy_async_16(void* shared, const void* global, bool valid, shim::Where where = shim::here());
void copy_async_commit();
template <int Pending>
void copy_async_wait() {
  shim::wait_copies(Pending);
}

char* dynamic_shared();

// The host's side.
using Stream = void*;

struct Device {
  int processors;
  int shared_per_block;
  int capability;
};
// 4 processors, or CK_SHIM_PROCESSORS of them.
Device device_info(int device);

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

template <class P>
void launch(void (*kernel)(P), int64_t blocks, int threads, int64_t shared_bytes, Stream, const P& params) {
  shim::run_grid(
      reinterpret_cast<const void*>(kernel), [&] { kernel(params); }, blocks, threads, shared_bytes);
}

}  // namespace cuda
}  // namespace ck
