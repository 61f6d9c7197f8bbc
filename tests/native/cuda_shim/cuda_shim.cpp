#include "cuda_shim.h"

#include <dlfcn.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <thread>
#include <type_traits>
#include <vector>

#include "multiprocessor.h"

__thread ck::cuda::shim::Index threadIdx, blockIdx, blockDim, gridDim;

namespace ck {
namespace cuda {
namespace shim {
namespace {

int64_t environment(const char* name, int64_t otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr && *text != 0 ? std::atoll(text) : otherwise;
}

struct Dropped {
  int n = -1, launch = -1;
};
uint64_t seed = uint64_t(environment("CK_SHIM_SEED", 0));
Dropped dropped[kSyncs];
struct Launch {
  const void* kernel;
  std::array<int, kSyncs> executed;
};
std::vector<Launch> launches;
std::mutex launching;  // one launch at a time

Multiprocessor& machine() {
  if (Multiprocessor::running() == nullptr) throw std::logic_error("device code outside a launch");
  return *Multiprocessor::running();
}

// May not throw: the compiler takes its callers for functions that return or end the program.
void undefined(const char* what, Where where) {
  if (Multiprocessor::running() != nullptr) machine().fail(text(what, where));
  std::fprintf(stderr, "%s, on the host\n", text(what, where).c_str());
  std::abort();
}

// The operands of lane i, as the type that its meeting has.
template <class T>
T& operand(void** operands, int lane) {
  return *static_cast<T*>(operands[lane]);
}

void check_mask(unsigned mask, const char* what, Where where) {
  if (mask != kAll) machine().fail(text(what, where) + ": the mask must name all lanes");
}

struct Shuffle {
  uint32_t bits, result;
  int lane_xor;
};
void finish_shuffle(void** lanes) {
  for (int i = 0; i < kWarp; ++i) {
    Shuffle& mine = operand<Shuffle>(lanes, i);
    mine.result = operand<Shuffle>(lanes, (i ^ mine.lane_xor) & 31).bits;
  }
}

void finish_any(void** lanes) {
  bool any = false;
  for (int i = 0; i < kWarp; ++i) any |= operand<bool>(lanes, i);
  for (int i = 0; i < kWarp; ++i) operand<bool>(lanes, i) = any;
}

struct MatrixLoad {
  uint32_t* words;
  const void* row;
};
template <int Matrices, bool Transposed>
void finish_ldmatrix(void** lanes) {
  for (int m = 0; m < Matrices; ++m) {
    uint16_t matrix[8][8];
    for (int i = 0; i < 8; ++i) std::memcpy(matrix[i], operand<MatrixLoad>(lanes, 8 * m + i).row, 16);
    for (int lane = 0; lane < kWarp; ++lane) {
      const int i = lane / 4, j = lane % 4 * 2;
      const uint32_t low = Transposed ? matrix[j][i] : matrix[i][j];
      const uint32_t high = Transposed ? matrix[j + 1][i] : matrix[i][j + 1];
      operand<MatrixLoad>(lanes, lane).words[m] = low | high << 16;
    }
  }
}
template <int Matrices, bool Transposed>
void ldmatrix(const char* what, uint32_t* words, const void* row, Where where) {
  if (int(threadIdx.x % kWarp) < 8 * Matrices) machine().check_shared(row, what, where);
  MatrixLoad load = {words, row};
  machine().meet({what, &finish_ldmatrix<Matrices, Transposed>, where}, &load);
}

struct Multiply {
  float* c;
  const uint32_t *a, *b;
};
// With g = lane / 4 and t = lane % 4, a word holds columns of a row: c has (g, 2t), (g, 2t+1) and the same in
// row g + 8. The words of a go down rows first, then along k: (g, t), (g+8, t), (g, t+4), (g+8, t+4) counted
// in words; those of b have (k, n) at (t, g), (t+4, g). A word is two elements along k, or one tf32.
template <class T, int Words>
void finish_mma(void** lanes) {
  constexpr int kElements = std::is_same<T, float>::value ? 1 : 2, K = 4 * Words * kElements;
  double a[16][K], b[K][8];
  const auto unpack = [](uint32_t word, double* out, int64_t stride) {
    if constexpr (std::is_same<T, float>::value) {
      out[0] = bit_cast<float>(word & ~0x1fffu);
    } else {
      const float2 pair = unpack2<T>(word);
      out[0] = pair.x, out[stride] = pair.y;
    }
  };
  for (int lane = 0; lane < kWarp; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const Multiply& mine = operand<Multiply>(lanes, lane);
    for (int word = 0; word < Words; ++word) {
      const int k = (t + 4 * word) * kElements;
      unpack(mine.a[2 * word], &a[g][k], 1);
      unpack(mine.a[2 * word + 1], &a[g + 8][k], 1);
      unpack(mine.b[word], &b[k][g], 8);
    }
  }
  for (int i = 0; i < 16; ++i) {
    double sum[8] = {};
    for (int k = 0; k < K; ++k) {
      for (int j = 0; j < 8; ++j) sum[j] += a[i][k] * b[k][j];
    }
    for (int j = 0; j < 8; ++j) {
      float& c = operand<Multiply>(lanes, i % 8 * 4 + j / 2).c[i / 8 * 2 + j % 2];
      c = float(c + sum[j]);
    }
  }
}
template <class T, int Words>
void mma(const char* what, float* c, const uint32_t* a, const uint32_t* b, Where where) {
  Multiply operands = {c, a, b};
  machine().meet({what, &finish_mma<T, Words>, where}, &operands);
}

}  // namespace

void set_seed(uint64_t value) {
  seed = value;
}
void set_dropped(Sync sync, int n, int launch) {
  dropped[sync] = {n, launch};
  launches.clear();
}
std::vector<int> executed(Sync sync) {
  std::vector<int> counts;
  for (const Launch& launch : launches) counts.push_back(launch.executed[sync]);
  return counts;
}
std::vector<int64_t> launched() {
  Dl_info library;
  dladdr(reinterpret_cast<const void*>(&launched), &library);
  std::vector<int64_t> offsets;
  for (const Launch& launch : launches) {
    offsets.push_back(static_cast<const char*>(launch.kernel) - static_cast<const char*>(library.dli_fbase));
  }
  return offsets;
}

void run_grid(const void* kernel, const std::function<void()>& thread, int64_t blocks, int threads,
              int64_t shared_bytes) {
  const auto refuse = [](const std::string& why) { throw std::runtime_error("launch: " + why); };
  if (blocks < 1 || blocks > INT32_MAX) refuse(std::to_string(blocks) + " blocks");
  if (threads < kWarp || threads > kMaxThreads || threads % kWarp != 0) {
    refuse(std::to_string(threads) + " threads: a multiple of 32 up to 1024 is wanted");
  }
  if (shared_bytes < 0 || shared_bytes > kMaxShared) {
    refuse(std::to_string(shared_bytes) + " bytes of shared memory; a block has " +
           std::to_string(kMaxShared));
  }
  if (Multiprocessor::running() != nullptr) refuse("from device code");

  std::lock_guard<std::mutex> alone(launching);
  std::vector<int64_t> order(blocks);
  std::iota(order.begin(), order.end(), int64_t(0));
  Random random{seed};
  for (int64_t i = blocks - 1; i > 0; --i) std::swap(order[i], order[random() % uint64_t(i + 1)]);

  std::array<int, kSyncs> drop, executed = {};
  for (int i = 0; i < kSyncs; ++i) {
    const Dropped& d = dropped[i];
    drop[i] = d.launch < 0 || d.launch == int(launches.size()) ? d.n : -1;
  }
  std::atomic<int64_t> turn{0};
  std::mutex mutex;
  std::string error;
  int64_t failed = blocks;
  const auto work = [&] {
    static thread_local Multiprocessor machine;
    Multiprocessor::running() = &machine;
    blockDim.x = unsigned(threads), gridDim.x = unsigned(blocks);
    machine.dropped = drop, machine.executed = {};
    for (int64_t i; (i = turn++) < blocks;) {
      const std::string why = machine.run(thread, order[i], threads, shared_bytes, seed);
      std::lock_guard<std::mutex> lock(mutex);
      if (!why.empty() && i < failed) error = why, failed = i;
      if (failed < blocks) turn = blocks;
    }
    std::lock_guard<std::mutex> lock(mutex);
    for (int i = 0; i < kSyncs; ++i) executed[i] = std::max(executed[i], machine.executed[i]);
    Multiprocessor::running() = nullptr;
  };
  // A block's order of threads follows from its number, so any number of workers does the same.
  std::vector<std::thread> workers;
  const int64_t wanted = std::min(blocks, environment("CK_SHIM_THREADS", 1));
  while (int64_t(workers.size()) + 1 < wanted) workers.emplace_back(work);
  work();
  for (std::thread& worker : workers) worker.join();
  launches.push_back({kernel, executed});
  if (!error.empty()) throw std::runtime_error(error);
}

void sync_threads(Where where) {
  machine().sync_threads(where);
}
void sync_warp(unsigned mask, Where where) {
  check_mask(mask, "__syncwarp", where);
  if (machine().drops(kWarpBarrier)) return;
  machine().meet({"__syncwarp", [](void**) {}, where}, nullptr);
}
uint32_t shuffle_xor(unsigned mask, uint32_t bits, int lane_xor, Where where) {
  check_mask(mask, "__shfl_xor_sync", where);
  Shuffle shuffle = {bits, 0, lane_xor};
  machine().meet({"__shfl_xor_sync", &finish_shuffle, where}, &shuffle);
  return shuffle.result;
}
bool any(unsigned mask, bool predicate, Where where) {
  check_mask(mask, "__any_sync", where);
  machine().meet({"__any_sync", &finish_any, where}, &predicate);
  return predicate;
}
void wait_copies(int pending) {
  machine().wait(pending);
}

}  // namespace shim

void ldmatrix_x4(uint32_t (&r)[4], const void* row, shim::Where where) {
  shim::ldmatrix<4, false>("ldmatrix_x4", r, row, where);
}
void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, shim::Where where) {
  shim::ldmatrix<4, true>("ldmatrix_x4_trans", r, row, where);
}
void ldmatrix_x2(uint32_t (&r)[2], const void* row, shim::Where where) {
  shim::ldmatrix<2, false>("ldmatrix_x2", r, row, where);
}
void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, shim::Where where) {
  shim::ldmatrix<2, true>("ldmatrix_x2_trans", r, row, where);
}

template <class T>
void mma_k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], shim::Where where) {
  shim::mma<T, 2>("mma_k16", c, a, b, where);
}
template <class T>
void mma_k8(float (&c)[4], const uint32_t (&a)[2], uint32_t b, shim::Where where) {
  shim::mma<T, 1>("mma_k8", c, a, &b, where);
}
template void mma_k16<bf16>(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2], shim::Where);
template void mma_k16<fp16>(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2], shim::Where);
template void mma_k8<bf16>(float (&)[4], const uint32_t (&)[2], uint32_t, shim::Where);
template void mma_k8<fp16>(float (&)[4], const uint32_t (&)[2], uint32_t, shim::Where);
void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], shim::Where where) {
  shim::mma<float, 2>("mma_tf32", c, a, b, where);
}

void copy_async_16(void* shared, const void* global, bool valid, shim::Where where) {
  shim::machine().copy(static_cast<char*>(shared), valid ? global : nullptr, where);
}
void copy_async_commit() {
  shim::machine().commit();
}
char* dynamic_shared() {
  return shim::machine().shared();
}

Device device_info(int) {
  return {int(shim::environment("CK_SHIM_PROCESSORS", 4)), shim::kMaxShared, 80};
}

}  // namespace cuda
}  // namespace ck

// The kernels are compiled with checks of -fsanitize=undefined, and here, in place of its library, is what
// they call: an address that is not aligned for its vector type stops a GPU too.
struct CheckedPlace {
  const char* file;
  uint32_t line, column;
};
#define CK_CHECK(name, what)                                                                           \
  extern "C" __attribute__((visibility("hidden"))) void __ubsan_handle_##name(const CheckedPlace* at); \
  void __ubsan_handle_##name(const CheckedPlace* at) {                                                 \
    ck::cuda::shim::undefined(what, {at->file, int(at->line)});                                        \
  }
CK_CHECK(type_mismatch_v1, "an address not aligned for its type")
CK_CHECK(out_of_bounds, "an index outside its array")
CK_CHECK(shift_out_of_bounds, "a shift by too many bits")
CK_CHECK(divrem_overflow, "a division by zero")
CK_CHECK(add_overflow, "an integer overflow")
CK_CHECK(sub_overflow, "an integer overflow")
CK_CHECK(mul_overflow, "an integer overflow")
CK_CHECK(negate_overflow, "an integer overflow")
