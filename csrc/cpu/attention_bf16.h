// The attention of bfloat16 tensors on machines that multiply pairs of bfloat16 into a float: the same passes
// as in attention_kernels.h, at twice the rate. Scores and sums are float; P and dS are rounded to bfloat16
// before they are multiplied, as they are wherever bfloat16 matrices are.
//
// A product sums over two elements at a time, so both operands are packed with neighbours along the sum in
// one word: "rows" where the sum runs along a row (a row of bfloat16 read as words), "paired" where it runs
// down the rows (element j of rows 2i and 2i + 1 in one word).
#pragma once

#include "cpu/gemm.h"
#include "cpu/softmax.h"

#if defined(__AVX512BF16__)

namespace ck {
namespace CK_ISA {
namespace {

// The two elements of a word, one by one.
typedef uint16_t __attribute__((may_alias)) Element;

inline int64_t half_up(int64_t n) {
  return (n + 1) / 2;
}

// Rows [first, first + rows) of tensor[b, h] as they are, `words` words each, zero beyond the last element.
void copy_rows(Pair* target, int64_t words, const Tensor& tensor, int64_t b, int64_t h, int64_t first,
               int64_t rows) {
  const int64_t n = tensor.size[3], stride = tensor.stride[3];
  const Ahead ahead = rows_ahead(tensor, b, h, first, rows);
  for (int64_t i = 0; i < rows; ++i, target += words) {
    ahead.fetch(i + kRowsAhead, 1);
    const uint16_t* source = static_cast<const uint16_t*>(tensor.at(b, h, first + i));
    Element* row = reinterpret_cast<Element*>(target);
    if (stride == 1) {
      __builtin_memcpy(row, source, n * sizeof(uint16_t));
    } else {
      for (int64_t j = 0; j < n; ++j) row[j] = source[j * stride];
    }
    for (int64_t j = n; j < 2 * words; ++j) row[j] = 0;
  }
}

// The same rows where they lie if they can be read as whole words, else copied into `room`.
Rows<Pair> words_of(const Tensor& tensor, int64_t b, int64_t h, int64_t first, int64_t rows, Pair* room,
                    int64_t words) {
  const void* start = tensor.at(b, h, first);
  const bool even =
      (tensor.size[3] | tensor.stride[2]) % 2 == 0 && reinterpret_cast<uintptr_t>(start) % 4 == 0;
  if (even && tensor.stride[3] == 1) return {static_cast<const Pair*>(start), tensor.stride[2] / 2};
  copy_rows(room, words, tensor, b, h, first, rows);
  return {room, words};
}

// Rows of `words` words, paired; a last row without a neighbour is paired with zeros.
void pair_rows(const Rows<Pair>& rows, int64_t words, int64_t count, Pair* target, int64_t padded,
               const Ahead& ahead = {}) {
  for (int64_t i = 0; i < count; i += 2, target += padded) {
    ahead.fetch(i + kRowsAhead, 2);
    const Element* low = reinterpret_cast<const Element*>(rows.data + i * rows.stride);
    const Element* high = low + 2 * rows.stride;
    if (i + 1 < count) {
      for (int64_t j = 0; j < 2 * words; ++j) target[j] = Pair(low[j]) | Pair(high[j]) << 16;
    } else {
      for (int64_t j = 0; j < 2 * words; ++j) target[j] = low[j];
    }
    for (int64_t j = 2 * words; j < padded; ++j) target[j] = 0;
  }
}

// Two rows of 16 floats each, rounded: the first row in the lower half.
inline Vec<Pair> round_two(Vec<float> first, Vec<float> second) {
  return bit_cast<Vec<Pair>>(_mm512_cvtne2ps_pbh(second, first));
}

// What round_two makes, paired.
inline Vec<Pair> pair_two(Vec<Pair> two) {
  typedef VectorOf<uint16_t, 32>::type Short;
  const Short order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return bit_cast<Vec<Pair>>(__builtin_shuffle(bit_cast<Short>(two), order));
}

struct ForwardBuffers16 {
  Pair *keys_t, *values;  // for each head (D / 2, S), (S / 2, D) paired
  Pair *rows, *p;         // a block of queries as rows, or (S, D) while packing; p as rows
  float *scores, *out, *inverse_sum;
  BiasRows<float> bias;

  size_t place(const Attention& a, const Shape& shape, int64_t heads, void* base) {
    const int64_t words = half_up(shape.depth), most = shape.keys < kQueryBlock ? kQueryBlock : shape.keys;
    Arena arena{static_cast<char*>(base)};
    keys_t = arena.take<Pair>(heads * words * shape.padded_keys);
    values = arena.take<Pair>(heads * half_up(shape.keys) * shape.padded_depth);
    rows = arena.take<Pair>(most * words);
    p = arena.take<Pair>(kQueryBlock * shape.padded_keys / 2);
    scores = arena.take<float>(kQueryBlock * shape.padded_keys);
    out = arena.take<float>(kQueryBlock * shape.padded_depth);
    inverse_sum = arena.take<float>(kQueryBlock);
    bias.place(a, shape, heads, arena);
    return arena.used;
  }
};

void forward_bf16(const Attention& a, int64_t b, Range heads, Range queries) {
  const Shape shape = shape_of<float>(a);
  const int64_t S = shape.keys, Dp = shape.padded_depth, Sp = shape.padded_keys;
  const int64_t Dw = half_up(shape.depth), Sw = half_up(S);
  ForwardBuffers16 m = placed<ForwardBuffers16>(a, shape, heads);

  for (int64_t i = 0; i < heads.end - heads.begin; ++i) {
    const int64_t h = heads.begin + i;
    const Rows<Pair> keys = words_of(a.key, b, h, 0, S, m.rows, Dw);
    transpose(keys.data, S, Dw, keys.stride, m.keys_t + i * Dw * Sp, Sp, rows_ahead(a.key, b, h, 0, S));
    pair_rows(words_of(a.value, b, h, 0, S, m.rows, Dw), Dw, S, m.values + i * Sw * Dp, Dp,
              rows_ahead(a.value, b, h, 0, S));
  }
  m.bias.begin(a, b, heads);

  for_blocks(heads, queries, kQueryBlock, [&](const Block& block, const Block& next) {
    const int64_t i = block.head - heads.begin, n = block.rows;
    const Rows<Pair> query = words_of(a.query, b, block.head, block.first, n, m.rows, Dw);
    m.bias.next(a, b, block.head, block.first, n);
    gemm<Pair>({query.data, query.stride, 1, m.keys_t + i * Dw * Sp, Sp, m.scores, Sp, n, Sp, Dw, false,
                rows_ahead(a.query, b, next)});
    softmax_rows(m.scores, float(a.scale * kLog4E), m.bias, m.inverse_sum, n, Sp,
                 [&](int64_t row, int64_t j, Vec<float> e) {
                   store(m.p + (row * Sp + j) / 2, _mm512_cvtneps_pbh(e));
                 });
    gemm<Pair>({m.p, Sp / 2, 1, m.values + i * Sw * Dp, Dp, m.out, Dp, n, Dp, Sw, false,
                rows_ahead(a.out, b, block)});
    store_rows(m.out, Dp, a.out, b, block.head, block.first, n, 1.f, m.inverse_sum);
  });
}

// Queries at a time: more than in float, because sums over queries that are made at twice the rate would wait
// for the totals to come and go.
constexpr int64_t kSumBlock = 64;

struct BackwardBuffers16 {
  Pair *keys, *keys_t, *values_t;  // for each head (S / 2, D) paired, (D / 2, S), (D / 2, S)
  Pair *query, *grad_out, *query_pairs, *grad_pairs;  // a block of queries, as rows and paired
  Pair *p_pairs, *ds, *ds_pairs;
  Pair* rows;  // (S, D) while packing
  float *p, *dp, *grad_query, *inverse_sum;
  BiasRows<float, kSumBlock> bias;

  size_t place(const Attention& a, const Shape& shape, int64_t heads, void* base) {
    const int64_t words = half_up(shape.depth), Sp = shape.padded_keys, Dp = shape.padded_depth;
    Arena arena{static_cast<char*>(base)};
    keys = arena.take<Pair>(heads * half_up(shape.keys) * Dp);
    keys_t = arena.take<Pair>(heads * words * Sp);
    values_t = arena.take<Pair>(heads * words * Sp);
    query = arena.take<Pair>(kSumBlock * words);
    grad_out = arena.take<Pair>(kSumBlock * words);
    query_pairs = arena.take<Pair>(kSumBlock / 2 * Dp);
    grad_pairs = arena.take<Pair>(kSumBlock / 2 * Dp);
    p_pairs = arena.take<Pair>(kSumBlock / 2 * Sp);
    ds = arena.take<Pair>(kSumBlock * Sp / 2);
    ds_pairs = arena.take<Pair>(kSumBlock / 2 * Sp);
    rows = arena.take<Pair>(shape.keys * words);
    p = arena.take<float>(kSumBlock * Sp);
    dp = arena.take<float>(kSumBlock * Sp);
    grad_query = arena.take<float>(kSumBlock * Dp);
    inverse_sum = arena.take<float>(kSumBlock);
    bias.place(a, shape, heads, arena);
    return arena.used;
  }
};

// e and dp of two rows -> P and dS = P ∘ (dp − rowsum(P ∘ dp)), rounded: paired for the sums over queries, dS
// also as rows for the sum over keys, and as floats in place of dp where a bias has a gradient.
inline void softmax_backward_rows(const float* e, float* dp, const float* inverse_sum, int64_t padded,
                                  bool keep, Pair* p_pairs, Pair* ds, Pair* ds_pairs) {
  float row_sum[2];
  for (int r = 0; r < 2; ++r) {
    Vec<float> dot = {};
    for (int64_t j = r * padded; j < (r + 1) * padded; j += 16) {
      dot += load<Vec<float>>(e + j) * load<Vec<float>>(dp + j);
    }
    row_sum[r] = sum_lanes(dot) * inverse_sum[r];
  }
  for (int64_t j = 0; j < padded; j += 16) {
    Vec<float> p[2], gradient[2];
    for (int r = 0; r < 2; ++r) {
      p[r] = load<Vec<float>>(e + r * padded + j) * inverse_sum[r];
      gradient[r] = p[r] * (load<Vec<float>>(dp + r * padded + j) - row_sum[r]);
      if (keep) store(dp + r * padded + j, gradient[r]);
    }
    const Vec<Pair> two = round_two(gradient[0], gradient[1]);
    store(p_pairs + j, pair_two(round_two(p[0], p[1])));
    store(ds_pairs + j, pair_two(two));
    store(ds + j / 2, _mm512_castsi512_si256(bit_cast<__m512i>(two)));
    store(ds + (padded + j) / 2, _mm512_extracti64x4_epi64(bit_cast<__m512i>(two), 1));
  }
}

void backward_batch(const Attention& a, const BackwardTask& task, const Shape& shape, BackwardBuffers16& m,
                    int64_t b) {
  const int64_t S = shape.keys, Dp = shape.padded_depth, Sp = shape.padded_keys;
  const int64_t Dw = half_up(shape.depth), Sw = half_up(S);
  const Range heads = task.heads;

  for (int64_t h = heads.begin; h < heads.end; ++h) {
    const int64_t i = h - heads.begin;
    const Rows<Pair> values = words_of(a.value, b, h, 0, S, m.rows, Dw);
    transpose(values.data, S, Dw, values.stride, m.values_t + i * Dw * Sp, Sp,
              rows_ahead(a.value, b, h, 0, S));
    const Rows<Pair> keys = words_of(a.key, b, h, 0, S, m.rows, Dw);
    transpose(keys.data, S, Dw, keys.stride, m.keys_t + i * Dw * Sp, Sp, rows_ahead(a.key, b, h, 0, S));
    pair_rows(keys, Dw, S, m.keys + i * Sw * Dp, Dp);
  }
  m.bias.begin(a, b, heads);

  for_blocks(heads, task.queries, kSumBlock, [&](const Block& block, const Block& next) {
    const int64_t h = block.head, i = h - heads.begin, first = block.first, n = block.rows;
    const int64_t pairs = half_up(n);
    const bool accumulate = first != task.queries.begin;
    float* grad_key = reinterpret_cast<float*>(task.key_value + (b * a.heads() + h) * task.key_value_stride);
    float* grad_value = grad_key + S * Dp;
    const Rows<Pair> query = words_of(a.query, b, h, first, n, m.query, Dw);
    const Rows<Pair> grad_out = words_of(a.grad_out, b, h, first, n, m.grad_out, Dw);
    m.bias.next(a, b, h, first, n);

    gemm<Pair>({query.data, query.stride, 1, m.keys_t + i * Dw * Sp, Sp, m.p, Sp, n, Sp, Dw, false,
                rows_ahead(a.query, b, next)});
    gemm<Pair>({grad_out.data, grad_out.stride, 1, m.values_t + i * Dw * Sp, Sp, m.dp, Sp, n, Sp, Dw, false,
                rows_ahead(a.grad_out, b, next)});
    softmax_rows(m.p, float(a.scale * kLog4E), m.bias, m.inverse_sum, n, Sp);
    if (n % 2) {  // the last row's neighbour
      for (int64_t j = n * Sp; j < (n + 1) * Sp; ++j) m.p[j] = m.dp[j] = 0;
      m.inverse_sum[n] = 0;
    }
    for (int64_t r = 0; r < n; r += 2) {
      softmax_backward_rows(m.p + r * Sp, m.dp + r * Sp, m.inverse_sum + r, Sp, a.grad_bias || a.grad_table,
                            m.p_pairs + r / 2 * Sp, m.ds + r * Sp / 2, m.ds_pairs + r / 2 * Sp);
    }
    if (a.grad_value) {
      pair_rows(grad_out, Dw, n, m.grad_pairs, Dp);
      gemm<Pair>({m.p_pairs, 1, Sp, m.grad_pairs, Dp, grad_value, Dp, S, Dp, pairs, accumulate});
    }
    if (a.grad_key) {
      pair_rows(query, Dw, n, m.query_pairs, Dp);
      gemm<Pair>({m.ds_pairs, 1, Sp, m.query_pairs, Dp, grad_key, Dp, S, Dp, pairs, accumulate});
    }
    if (a.grad_query) {
      gemm<Pair>({m.ds, Sp / 2, 1, m.keys + i * Sw * Dp, Dp, m.grad_query, Dp, n, Dp, Sw, false,
                  rows_ahead(a.grad_query, b, block)});
      store_rows(m.grad_query, Dp, a.grad_query, b, h, first, n, float(a.scale));
    }
    if (a.grad_bias || a.grad_table) {
      for (int64_t r = 0; r < n; ++r) {
        add_bias_gradient(a, task, shape, b, h, first + r, m.bias.index(r), m.dp + r * Sp);
      }
    }
  });
}

}  // namespace
}  // namespace CK_ISA
}  // namespace ck

#endif
