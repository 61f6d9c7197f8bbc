// The table of kernels that each instruction set offers, and what they are called with.
#pragma once

#include "common/attention.h"
#include "common/low_rank.h"
#include "common/merge.h"

namespace ck {

struct Range {
  int64_t begin, end;
};

// Some queries of some heads; where a bias gradient is wanted, of all the (b, h) that share it.
struct BackwardTask {
  Range batch, heads, queries;
  // Sums over this task's queries, overwritten. That of (b, h) is dK, then dV, in the type that the kernel
  // computes in, at key_value + (b * H + h) * key_value_stride bytes; that of the bias is (1, S) if all
  // queries share it, (regions, S) for a table.
  char* key_value;
  int64_t key_value_stride;
  double* bias;
};

struct PartialBytes {
  int64_t key_value, bias;
};

struct MomentsTask {
  Tensor query, key;
  int64_t b, h;
  double sum, sum_of_squares;
};

// One symmetric matrix and its tridiagonal form: eigen.h.
struct EigenTask {
  int64_t size;
  const float* matrix;
  float *reflectors, *diagonal, *off_diagonal, *tau, *values;
};

// Rows of numbers of the type that a kernel computes in, `row` of them apart: double for a float64 result,
// else float. Rows end in zeros up to a multiple of kPadding, whole vectors of every instruction set; those
// of a transposed matrix up to one of kHalfPadding, as many columns as a product may have.
struct Packed {
  const void* data;
  int64_t row;
};
constexpr int64_t kPadding = 16, kHalfPadding = 8;

// Rows of out = base + Σ scale · u · v that the terms of one span change. v[i] is that of sum.terms[i].
// `stream`: write past the caches; for rows of the type computed in, that begin at whole cache lines.
struct LowRankTask {
  const LowRankSum& sum;
  const Span& span;
  const Packed* v;
  Range rows;
  bool stream;
};

// Rows of merge.out. targets[n]: C_nᵀ (E, s_n).
struct MergeTask {
  const Merge& merge;
  const Packed* targets;
  Packed basis;
  Range rows;
  bool stream;
};

// XᵀX in blocks of kGramSide columns, kGramDepth rows of X at a time.
constexpr int64_t kGramSide = 24, kGramDepth = 96;

struct Kernels {
  const char* name;
  void (*attention_forward)(const Attention&, int64_t b, Range heads, Range queries);
  void (*attention_backward)(const Attention&, const BackwardTask&);
  PartialBytes (*partial_bytes)(const Attention&);
  // grad_key[b, h] and grad_value[b, h]: the sum of `count` partials, in order, `stride` bytes apart.
  void (*store_key_value)(const Attention&, int64_t b, int64_t h, const char* partials, int64_t count,
                          int64_t stride);
  // grad_bias[b, h, 0] or grad_table[b, 0], the same way.
  void (*store_bias)(const Attention&, int64_t b, int64_t h, const char* partials, int64_t count,
                     int64_t stride);
  void (*score_moments)(MomentsTask&);
  void (*symmetric_eigenvalues)(const EigenTask&);
  void (*tridiagonal_vectors)(const EigenTask&, int64_t first, int64_t count, float* vectors);

  // `rows` of a matrix, or all of it transposed, into rows of doubles (`wide`) or floats, padded with zeros.
  void (*pack_rows)(const Tensor& matrix, Range rows, void* target, int64_t padded, bool wide);
  void (*pack_transposed)(const Tensor& matrix, void* target, int64_t padded, bool wide);
  void (*low_rank)(const LowRankTask&);
  void (*merge_residual)(const MergeTask&);
  void (*merge_apply)(const MergeTask&);
  // At most kGramDepth rows of X: block j, `depth` rows of kGramSide doubles, at target + j * block.
  void (*pack_gram)(const Tensor& matrix, Range rows, double* target, int64_t block);
  // sum (kGramSide, kGramSide) += aᵀ b of two such blocks.
  void (*add_gram)(const double* a, const double* b, int64_t depth, double* sum);
};

// The kernels of the best instruction set that was built and that this machine runs. The environment variable
// CK_CPU_ISA = portable | avx2 | avx512 | avx512_bf16 forces one; one that is unknown, not built or not
// supported by the machine throws std::runtime_error.
const Kernels& kernels();

// Null-terminated list of the instruction sets that this machine can run, best first.
const Kernels* const* usable_kernels();

// Throws std::out_of_range; here because the kernels themselves stay clear of the standard library.
[[noreturn]] void fail_label(int64_t label, int64_t regions);

}  // namespace ck
