#include <algorithm>

#include "common/thread_pool.h"
#include "cpu/low_rank.h"
#include "cpu/weights.h"

namespace ck {
namespace {

constexpr int64_t kTaskRows = 96;

void merge_pass(const Merge& merge, bool apply, int threads) {
  const Kernels& isa = kernels();
  PackedMatrices packed(merge.base.dtype);
  for (const Tensor& target : merge.targets) packed.add(target, true);
  if (apply) packed.add(merge.basis);
  const Packed* ready = packed.pack(isa, threads);
  const Packed basis = apply ? ready[merge.targets.size()] : Packed{};
  const bool stream = apply && prepare_result(merge.out, merge.base);
  const auto kernel = apply ? isa.merge_apply : isa.merge_residual;
  parallel_for(threads, (merge.rows() + kTaskRows - 1) / kTaskRows, [&](int64_t i) {
    const int64_t first = i * kTaskRows;
    kernel({merge, ready, basis, {first, std::min(merge.rows(), first + kTaskRows)}, stream});
  });
}

}  // namespace

void merge_residual(const Merge& merge, int threads) {
  check_residual(merge);
  merge_pass(merge, false, threads);
}

void merge_apply(const Merge& merge, int threads) {
  check_apply(merge);
  merge_pass(merge, true, threads);
}

}  // namespace ck
