// What the CUDA kernels ask for beyond what every backend does (common/attention.h).
#include <stdexcept>
#include <string>

#include "cuda/host.h"

namespace ck {
namespace cuda {

void check_covered(const char* name, const Tensor& t) {
  const auto refuse = [name](const std::string& why) {
    throw std::invalid_argument(std::string(name) + why);
  };
  if (!t) return;
  if (t.dtype == DType::kFloat64 || t.dtype == DType::kInt32) refuse(" must be float32, bfloat16 or float16");
  if (t.size[3] > 1 && t.stride[3] != 1) refuse(" must be contiguous in its last dimension");
  for (const int64_t n : t.size) {
    if (n < 1 || n > INT32_MAX / 512) refuse(" has a dimension of " + std::to_string(n));
  }
  if (t.size[3] > 256) refuse(" has a head dimension of " + std::to_string(t.size[3]) + ", more than 256");
}

void check_covered(const Attention& a) {
  const struct {
    const char* name;
    const Tensor& tensor;
  } all[] = {{"query", a.query},       {"key", a.key},
             {"value", a.value},       {"out", a.out},
             {"grad_out", a.grad_out}, {"grad_query", a.grad_query},
             {"grad_key", a.grad_key}, {"grad_value", a.grad_value}};
  for (const auto& [name, tensor] : all) check_covered(name, tensor);
  for (const Tensor* bias : {&a.bias, &a.table}) {
    if (*bias && item_size(bias->dtype) == 2 && bias->dtype != a.query.dtype) {
      throw std::invalid_argument("a bias of 16 bits must have query's dtype");
    }
    if (*bias && bias->dtype == DType::kFloat64) throw std::invalid_argument("a bias cannot be float64 here");
  }
  if (a.labels && a.labels.stride[2] != 1 && a.labels.size[2] > 1) {
    throw std::invalid_argument("labels must be contiguous");
  }
  if (a.grad_bias) {
    int64_t stride = 1;
    for (int i = 3; i >= 0; stride *= a.grad_bias.size[i--]) {
      if (a.grad_bias.size[i] > 1 && a.grad_bias.stride[i] != stride) {
        throw std::invalid_argument("grad_bias must be contiguous");
      }
    }
  }
}

}  // namespace cuda
}  // namespace ck
