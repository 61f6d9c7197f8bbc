#include "common/attention.h"

#include <stdexcept>
#include <string>

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

// A result has the shape and dtype of query.
void check_result(const Attention& a, const Tensor& result, const char* name) {
  require(
      is_shape(result, a.batch(), a.heads(), a.queries(), a.query.size[3]) && result.dtype == a.query.dtype,
      name, result, "must match query's shape and dtype");
}

void check_gradient(const Tensor& grad, const Tensor& of, const char* name, DType dtype) {
  if (!grad) return;
  require(is_shape(grad, of.size[0], of.size[1], of.size[2], of.size[3]) && grad.dtype == dtype, name, grad,
          "must have the shape of what it is the gradient of, and its dtype (float32 or float64 for a bias)");
}

void expand(Tensor& t, int64_t b, int64_t h, int64_t n, int64_t s) {
  const int64_t full[4] = {b, h, n, s};
  for (int i = 0; i < 4; ++i) {
    if (t.size[i] == 1) t.stride[i] = 0;
    t.size[i] = full[i];
  }
}

}  // namespace

void check_forward(const Attention& a) {
  check(a);
  check_result(a, a.out, "out");
}

void check_backward(const Attention& a) {
  check(a);
  check_result(a, a.grad_out, "grad_out");
  check_gradient(a.grad_query, a.query, "grad_query", a.query.dtype);
  check_gradient(a.grad_key, a.key, "grad_key", a.query.dtype);
  check_gradient(a.grad_value, a.value, "grad_value", a.query.dtype);
  const DType sums = a.query.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  check_gradient(a.grad_bias, a.bias, "grad_bias", sums);
  check_gradient(a.grad_table, a.table, "grad_table", sums);
}

void expand_bias(Attention& a) {
  if (a.bias) expand(a.bias, a.batch(), a.heads(), a.queries(), a.keys());
  if (a.table) {
    expand(a.labels, a.batch(), 1, a.queries(), 1);
    expand(a.table, a.batch(), 1, a.table.size[2], a.keys());
  }
}

}  // namespace ck
