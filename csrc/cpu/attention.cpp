#include "cpu/attention.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "common/thread_pool.h"

namespace ck {
namespace {

// How the work is split into tasks: by the problem alone, so that sums over tasks are the same at any number
// of threads. There should be enough tasks to fill a machine, each with queries enough to make up for packing
// its keys, and with as many heads as have their keys and values in the second-level cache together.
constexpr int64_t kTasks = 32, kLeastQueries = 400;

int64_t divide_up(int64_t n, int64_t by) {
  return (n + by - 1) / by;
}

int64_t heads_per_task(const Attention& a, int64_t copies) {
  constexpr int64_t kCache = 384 << 10;
  const int64_t heads = std::max<int64_t>(1, a.heads());
  const int64_t bytes = std::max<int64_t>(1, copies * a.keys() * a.query.size[3] * sizeof(float));
  const int64_t single = a.batch() * heads * divide_up(a.queries(), kLeastQueries);
  const int64_t most = std::max<int64_t>(1, std::min({heads, kCache / bytes, single / kTasks}));
  return divide_up(heads, divide_up(heads, most));
}

struct Chunks {
  int64_t count, queries;

  Chunks(int64_t n, int64_t groups) {
    constexpr int64_t kBlock = 40;
    const int64_t wanted = std::min(kTasks / std::max<int64_t>(1, groups), n / kLeastQueries);
    queries = divide_up(divide_up(std::max<int64_t>(1, n), std::max<int64_t>(1, wanted)), kBlock) * kBlock;
    count = divide_up(n, queries);
  }

  Range range(int64_t chunk, int64_t n) const {
    return {chunk * queries, std::min((chunk + 1) * queries, n)};
  }
};

}  // namespace

void fail_label(int64_t label, int64_t regions) {
  throw std::out_of_range("labels hold " + std::to_string(label) + " but the table has " +
                          std::to_string(regions) + " regions");
}

void attention_forward(Attention a, int threads) {
  check_forward(a);
  expand_bias(a);
  const Kernels& isa = kernels();
  const int64_t H = a.heads(), heads = heads_per_task(a, 2), groups = (H + heads - 1) / heads;
  const Chunks chunks(a.queries(), a.batch() * groups);
  parallel_for(threads, a.batch() * groups * chunks.count, [&](int64_t task) {
    const int64_t chunk = task % chunks.count, group = task / chunks.count;
    const int64_t h = group % groups * heads;
    isa.attention_forward(a, group / groups, {h, std::min(h + heads, H)}, chunks.range(chunk, a.queries()));
  });
}

void attention_backward(Attention a, int threads) {
  check_backward(a);
  expand_bias(a);

  const Kernels& isa = kernels();
  const int64_t B = a.batch(), H = a.heads(), N = a.queries();

  // Where a bias gradient is summed over the batch or the heads, one task takes them all, in order.
  const Tensor& shared = a.grad_table ? a.grad_table : a.grad_bias;
  const bool all_batch = shared && shared.size[0] == 1, all_heads = shared && shared.size[1] == 1;
  const int64_t heads = all_heads ? H : shared ? 1 : heads_per_task(a, 5);
  const int64_t head_groups = all_heads ? 1 : (H + heads - 1) / heads;
  const int64_t groups = (all_batch ? 1 : B) * head_groups;
  const Chunks chunks(N, groups);

  // Partials: [chunk][b, h] dK and dV, then [group][chunk] of the bias.
  const PartialBytes bytes = isa.partial_bytes(a);
  const int64_t key_value_bytes = (a.grad_key || a.grad_value) ? bytes.key_value : 0;
  const int64_t chunk_stride = B * H * key_value_bytes;
  const size_t total = chunks.count * (chunk_stride + groups * bytes.bias);
  char* const key_value = static_cast<char*>(thread_scratch(Scratch::kCall, total));
  char* const bias = key_value + chunks.count * chunk_stride;

  const auto store_key_value = [&](int64_t b, int64_t h) {
    isa.store_key_value(a, b, h, key_value + (b * H + h) * key_value_bytes, chunks.count, chunk_stride);
  };
  parallel_for(threads, groups * chunks.count, [&](int64_t index) {
    const int64_t group = index / chunks.count, chunk = index % chunks.count;
    const int64_t b = group / head_groups, h = group % head_groups * heads;
    BackwardTask task;
    task.batch = all_batch ? Range{0, B} : Range{b, b + 1};
    task.heads = {h, std::min(h + heads, H)};
    task.queries = chunks.range(chunk, N);
    task.key_value = key_value + chunk * chunk_stride;
    task.key_value_stride = key_value_bytes;
    task.bias = reinterpret_cast<double*>(bias + index * bytes.bias);
    isa.attention_backward(a, task);
    if (chunks.count != 1 || !key_value_bytes) return;
    for (int64_t i = task.batch.begin; i < task.batch.end; ++i) {  // while they are in the cache
      for (int64_t j = task.heads.begin; j < task.heads.end; ++j) store_key_value(i, j);
    }
  });
  if (chunks.count != 1 && key_value_bytes) {
    parallel_for(threads, B * H, [&](int64_t pair) { store_key_value(pair / H, pair % H); });
  }
  if (bytes.bias) {
    parallel_for(threads, groups, [&](int64_t group) {
      isa.store_bias(a, group / head_groups, group % head_groups, bias + group * chunks.count * bytes.bias,
                     chunks.count, bytes.bias);
    });
  }
}

}  // namespace ck
