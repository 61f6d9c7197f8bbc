// The two steps of XᵀX in double: a few rows of X into blocks of columns, and the product of two blocks.
#pragma once

#include "cpu/gemm.h"
#include "cpu/kernels.h"

namespace ck {
namespace CK_ISA {
namespace {

void pack_gram(const Tensor& matrix, Range rows, double* target, int64_t block) {
  const int64_t depth = rows.end - rows.begin;
  Tensor part = matrix;
  for (int64_t first = 0; first < matrix.size[3]; first += kGramSide, target += block) {
    part.data = matrix.at(0, 0, 0, first);
    part.size[3] = matrix.size[3] - first < kGramSide ? matrix.size[3] - first : kGramSide;
    load_rows(target, kGramSide, part, 0, 0, rows.begin, depth, 1.0);
  }
}

void add_gram(const double* a, const double* b, int64_t depth, double* sum) {
  gemm_block<double>({a, 1, kGramSide, b, kGramSide, sum, kGramSide, kGramSide, kGramSide, depth, true});
}

}  // namespace
}  // namespace CK_ISA
}  // namespace ck
