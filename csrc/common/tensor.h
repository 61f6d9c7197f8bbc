// What a kernel is told about a tensor: where it lies, what its elements are, and how it is laid out.
#pragma once

#include <cstdint>

namespace ck {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64, kInt32 };

inline int64_t item_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 || dtype == DType::kInt32 ? 4 : 2;
}

// Up to four dimensions; size and stride count elements, and a broadcast dimension has stride 0.
// A tensor without elements may lie at address 0, so whether it was given at all is said apart.
struct Tensor {
  bool given = false;
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t size[4] = {0, 0, 0, 0};
  int64_t stride[4] = {0, 0, 0, 0};

  explicit operator bool() const { return given; }

  void* at(int64_t i, int64_t j = 0, int64_t k = 0, int64_t l = 0) const {
    int64_t offset = i * stride[0] + j * stride[1] + k * stride[2] + l * stride[3];
    return static_cast<char*>(data) + offset * item_size(dtype);
  }
};

inline bool is_floating(const Tensor& t) {
  return t.dtype != DType::kInt32;
}

}  // namespace ck
