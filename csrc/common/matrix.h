// Checks of matrices, tensors (1, 1, rows, columns), that the operations on weights share.
#pragma once

#include <stdexcept>
#include <string>

#include "common/tensor.h"

namespace ck {

inline bool is_matrix(const Tensor& t, int64_t rows, int64_t columns) {
  return t && t.size[0] == 1 && t.size[1] == 1 && t.size[2] == rows && t.size[3] == columns;
}

// `tensor` is a floating (rows, columns); std::invalid_argument says what came where it is not.
inline void require_matrix(const char* name, const Tensor& t, int64_t rows, int64_t columns) {
  if (is_matrix(t, rows, columns) && is_floating(t)) return;
  throw std::invalid_argument(std::string(name) + " (" + std::to_string(t.size[2]) + "," +
                              std::to_string(t.size[3]) + "): must be a floating matrix (" +
                              std::to_string(rows) + "," + std::to_string(columns) + ")");
}

inline void require_dtype(const char* name, const Tensor& t, DType dtype) {
  if (t.dtype != dtype) throw std::invalid_argument(std::string(name) + ": of another dtype");
}

}  // namespace ck
