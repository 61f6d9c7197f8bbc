#include "cpu/weights.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/thread_pool.h"

namespace ck {
namespace {

constexpr int64_t kLine = 64;
constexpr uintptr_t kPage = 4096;
constexpr int64_t kLargeResult = 16 << 20;

int64_t round_up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit * unit;
}

}  // namespace

void PackedMatrices::add(const Tensor& matrix, bool transposed) {
  const DType own = wide_ ? DType::kFloat64 : DType::kFloat32;
  const bool ready =
      !transposed && matrix.dtype == own && matrix.stride[3] == 1 && matrix.size[3] % kPadding == 0;
  if (ready) return results_.push_back({matrix.data, matrix.stride[2]});
  const int64_t rows = matrix.size[transposed ? 3 : 2];
  const int64_t padded =
      transposed ? round_up(matrix.size[2], kHalfPadding) : round_up(matrix.size[3], kPadding);
  items_.push_back({matrix, transposed, bytes_});
  owners_.push_back(static_cast<int>(results_.size()));
  results_.push_back({nullptr, padded});
  bytes_ += round_up(rows * padded * item_size(own), kLine);
}

const Packed* PackedMatrices::pack(const Kernels& isa, int threads) {
  if (items_.empty()) return results_.data();
  char* memory = static_cast<char*>(thread_scratch(Scratch::kCall, bytes_));
  parallel_for(threads, items_.size(), [&](int64_t i) {
    const Item& item = items_[i];
    Packed& result = results_[owners_[i]];
    result.data = memory + item.offset;
    if (item.transposed) {
      isa.pack_transposed(item.matrix, memory + item.offset, result.row, wide_);
    } else {
      isa.pack_rows(item.matrix, {0, item.matrix.size[2]}, memory + item.offset, result.row, wide_);
    }
  });
  return results_.data();
}

bool prepare_result(const Tensor& out, const Tensor& base) {
  const int64_t row_bytes = out.stride[2] * item_size(out.dtype), bytes = out.size[2] * row_bytes;
  if (out.data == base.data || bytes < kLargeResult) return false;
#if defined(MADV_HUGEPAGE)
  const uintptr_t begin = reinterpret_cast<uintptr_t>(out.data);
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = (begin + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: a refusal costs time alone
#endif
  const bool direct = (out.dtype == DType::kFloat32 || out.dtype == DType::kFloat64) && out.stride[3] == 1 &&
                      out.size[3] % kPadding == 0;
  return direct && row_bytes % kLine == 0 && reinterpret_cast<uintptr_t>(out.data) % kLine == 0;
}

}  // namespace ck
