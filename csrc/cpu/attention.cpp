#include "cpu/attention.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "common/thread_pool.h"

namespace ck {
namespace {

std::string describe(const Tensor& t) {
  std::string text = "(";
  for (int i = 0; i < 4; ++i) text += (i ? "," : "") + std::to_string(t.size[i]);
  return text + ")";
}

void require(bool condition, const char* name, const Tensor& tensor, const char* wanted) {
  if (condition) return;
  throw std::invalid_argument(std::string(name) + " " + describe(tensor) + ": " + wanted);
}

bool is_shape(const Tensor& t, int64_t b, int64_t h, int64_t n, int64_t d) {
  return t.size[0] == b && t.size[1] == h && t.size[2] == n && t.size[3] == d;
}

bool broadcasts(const Tensor& t, int64_t b, int64_t h, int64_t n, int64_t s) {
  const int64_t full[4] = {b, h, n, s};
  for (int i = 0; i < 4; ++i) {
    if (t.size[i] != full[i] && t.size[i] != 1) return false;
  }
  return true;
}

bool is_floating(const Tensor& t) {
  return t.dtype != DType::kInt32;
}

// The kernels index memory by these sizes: nothing that disagrees may reach them.
void check(const Attention& a) {
  const int64_t B = a.batch(), H = a.heads(), N = a.queries(), S = a.keys(), D = a.query.size[3];
  require(is_floating(a.query), "query", a.query, "must be floating");
  require(is_shape(a.key, B, H, S, D) && a.key.dtype == a.query.dtype, "key", a.key,
          "must match query's batch, heads, head dim and dtype");
  require(is_shape(a.value, B, H, S, D) && a.value.dtype == a.query.dtype, "value", a.value,
          "must match key's shape and dtype");
  if (S < 1) throw std::invalid_argument("key has no tokens");
  if (a.bias) {
    require(broadcasts(a.bias, B, H, N, S) && is_floating(a.bias), "bias", a.bias,
            "must be floating and broadcast to (B,H,N,S)");
    require(!a.table, "bias", a.bias, "cannot be given with a table");
  }
  require(bool(a.labels) == bool(a.table), "labels", a.labels,
          "must come with a table, and a table with labels");
  if (a.table) {
    require(broadcasts(a.labels, B, 1, N, 1) && a.labels.size[2] == N && a.labels.dtype == DType::kInt32,
            "labels", a.labels, "must be int32 of (B|1,N)");
    require(broadcasts(a.table, B, 1, a.table.size[2], S) && a.table.size[3] == S && is_floating(a.table),
            "table", a.table, "must be floating of (B|1,regions,S)");
  }
}

void check_gradient(const Tensor& grad, const Tensor& of, const char* name, DType dtype) {
  if (!grad) return;
  require(is_shape(grad, of.size[0], of.size[1], of.size[2], of.size[3]) && grad.dtype == dtype, name, grad,
          "must have the shape of what it is the gradient of, and its dtype (float32 or float64 for a bias)");
}

// A dimension of size 1 is read with stride 0, whatever its stride was, at the full size.
void expand(Tensor& t, int64_t b, int64_t h, int64_t n, int64_t s) {
  const int64_t full[4] = {b, h, n, s};
  for (int i = 0; i < 4; ++i) {
    if (t.size[i] == 1) t.stride[i] = 0;
    t.size[i] = full[i];
  }
}

void expand_bias(Attention& a) {
  if (a.bias) expand(a.bias, a.batch(), a.heads(), a.queries(), a.keys());
  if (a.table) {
    expand(a.labels, a.batch(), 1, a.queries(), 1);
    expand(a.table, a.batch(), 1, a.table.size[2], a.keys());
  }
}

// How the work is split into tasks: by the problem alone, so that sums over tasks are the same at any number
// of threads. There should be enough tasks to fill a machine, each with queries enough to make up for packing
// its keys, and with as many heads as have their keys and values in the second-level cache together.
constexpr int64_t kTasks = 32, kLeastQueries = 200;

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
    const int64_t wanted = std::max<int64_t>(1, kTasks / std::max<int64_t>(1, groups));
    queries = divide_up(std::max(kLeastQueries, divide_up(n, wanted)), kBlock) * kBlock;
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
  check(a);
  require(is_shape(a.out, a.batch(), a.heads(), a.queries(), a.query.size[3]) && a.out.dtype == a.query.dtype,
          "out", a.out, "must match query's shape and dtype");
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
  check(a);
  require(is_shape(a.grad_out, a.batch(), a.heads(), a.queries(), a.query.size[3]) &&
              a.grad_out.dtype == a.query.dtype,
          "grad_out", a.grad_out, "must match query's shape and dtype");
  check_gradient(a.grad_query, a.query, "grad_query", a.query.dtype);
  check_gradient(a.grad_key, a.key, "grad_key", a.query.dtype);
  check_gradient(a.grad_value, a.value, "grad_value", a.query.dtype);
  const DType sums = a.query.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  check_gradient(a.grad_bias, a.bias, "grad_bias", sums);
  check_gradient(a.grad_table, a.table, "grad_table", sums);
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
  });
  if (key_value_bytes) {
    parallel_for(threads, B * H, [&](int64_t pair) {
      isa.store_key_value(a, pair / H, pair % H, key_value + pair * key_value_bytes, chunks.count,
                          chunk_stride);
    });
  }
  if (bytes.bias) {
    parallel_for(threads, groups, [&](int64_t group) {
      isa.store_bias(a, group / head_groups, group % head_groups, bias + group * chunks.count * bytes.bias,
                     chunks.count, bytes.bias);
    });
  }
}

}  // namespace ck
