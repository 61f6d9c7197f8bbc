#include "cpu/low_rank.h"

#include <algorithm>

#include "common/thread_pool.h"
#include "cpu/weights.h"

namespace ck {
namespace {

constexpr int64_t kTaskRows = 64;  // a block of the kernel's

}  // namespace

void low_rank_sum(const LowRankSum& sum, int threads) {
  check(sum);
  const Kernels& isa = kernels();
  PackedMatrices packed(sum.base.dtype);
  for (const LowRankSum::Term& term : sum.terms) packed.add(term.v);
  const Packed* v = packed.pack(isa, threads);

  struct Part {
    const Span* span;
    Range rows;
  };
  const std::vector<Span> found = spans(sum);
  std::vector<Part> parts;
  for (const Span& span : found) {
    for (int64_t row = span.begin; row < span.end; row += kTaskRows)
      parts.push_back({&span, {row, std::min(span.end, row + kTaskRows)}});
  }
  const bool stream = prepare_result(sum.out, sum.base);
  parallel_for(threads, parts.size(),
               [&](int64_t i) { isa.low_rank({sum, *parts[i].span, v, parts[i].rows, stream}); });
}

}  // namespace ck
