// What the passes over weights share: matrices made ready for the kernels, and where results are written.
#pragma once

#include <cstddef>
#include <vector>

#include "cpu/kernels.h"

namespace ck {

// Matrices as the kernels read them: where they lie if they are of the type computed in, else converted, in
// memory that is valid until the calling thread packs again.
class PackedMatrices {
 public:
  explicit PackedMatrices(DType result) : wide_(result == DType::kFloat64) {}

  // As rows, or transposed. Results come in the order of the calls.
  void add(const Tensor& matrix, bool transposed = false);

  const Packed* pack(const Kernels& isa, int threads);

 private:
  struct Item {
    Tensor matrix;
    bool transposed;
    size_t offset;
  };

  bool wide_;
  std::vector<Item> items_;  // those to convert
  std::vector<int> owners_;  // the result of each
  std::vector<Packed> results_;
  size_t bytes_ = 0;
};

// Before a result is written. Large fresh memory would cost a page fault every 4 KiB, several times what the
// work takes: huge pages are asked for. Returns whether the kernels should write it past the caches, since it
// is larger than they are, in whole cache lines, and not over what is being read.
bool prepare_result(const Tensor& out, const Tensor& base);

}  // namespace ck
