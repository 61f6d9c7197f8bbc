// Short-context attention of some queries of some heads, forward and backward.
//
// Kᵀ and V are packed once for each head; then blocks of queries go through
//
//     s = q Kᵀ   (rows, S)    p = softmax(s + bias)    o = p V   (rows, D)
//
// with s and p in the first-level cache: the whole context is one tile, so there is no online softmax. The
// backward recomputes p and makes all gradients in the same pass over the queries:
//
//     dV += pᵀ dO    dp = dO Vᵀ    ds = p ∘ (dp − rowsum(p ∘ dp))    dQ = scale · ds K    dK += scale · dsᵀ q
//
// Blocks are the outer loop and heads the inner one: in (B, N, H * D) memory the heads of a block lie side by
// side, so whole cache lines and pages are used while they are there.
//
// T is float, or double for float64 tensors.
#pragma once

#include "cpu/gemm.h"
#include "cpu/softmax.h"

namespace ck {
namespace CK_ISA {
namespace {

template <class T>
struct ForwardBuffers {
  T *keys_t, *values;                     // for each head (D, S) and (S, D)
  T *query, *scores, *out, *inverse_sum;  // a block of queries of one head
  T* rows;                                // (S, D) on its way to keys_t
  BiasRows<T> bias;

  size_t place(const Attention& a, const Shape& shape, int64_t heads, void* base) {
    Arena arena{static_cast<char*>(base)};
    keys_t = arena.take<T>(heads * shape.depth * shape.padded_keys);
    values = arena.take<T>(heads * shape.keys * shape.padded_depth);
    query = arena.take<T>(kQueryBlock * shape.padded_depth);
    scores = arena.take<T>(kQueryBlock * shape.padded_keys);
    out = arena.take<T>(kQueryBlock * shape.padded_depth);
    inverse_sum = arena.take<T>(kQueryBlock);
    bias.place(a, shape, heads, arena);
    rows = arena.take<T>(shape.keys * shape.padded_depth);
    return arena.used;
  }
};

template <class T>
void forward(const Attention& a, int64_t b, Range heads, Range queries) {
  const Shape shape = shape_of<T>(a);
  const int64_t D = shape.depth, S = shape.keys, Dp = shape.padded_depth, Sp = shape.padded_keys;
  ForwardBuffers<T> m = placed<ForwardBuffers<T>>(a, shape, heads);

  for (int64_t i = 0; i < heads.end - heads.begin; ++i) {
    const Rows<T> keys = rows_of(a.key, b, heads.begin + i, 0, S, m.rows, Dp);
    transpose(keys.data, S, D, keys.stride, m.keys_t + i * D * Sp, Sp,
              rows_ahead(a.key, b, heads.begin + i, 0, S));
    load_rows(m.values + i * S * Dp, Dp, a.value, b, heads.begin + i, 0, S, T(1));
  }
  m.bias.begin(a, b, heads);

  for_blocks(heads, queries, kQueryBlock, [&](const Block& block, const Block& next) {
    const int64_t i = block.head - heads.begin, n = block.rows;
    const Rows<T> query = rows_of(a.query, b, block.head, block.first, n, m.query, Dp);
    m.bias.next(a, b, block.head, block.first, n);
    gemm<T>({query.data, query.stride, 1, m.keys_t + i * D * Sp, Sp, m.scores, Sp, n, Sp, D, false,
             rows_ahead(a.query, b, next)});
    softmax_rows(m.scores, T(a.scale * kLog4E), m.bias, m.inverse_sum, n, Sp);
    gemm<T>({m.scores, Sp, 1, m.values + i * S * Dp, Dp, m.out, Dp, n, Dp, S, false,
             rows_ahead(a.out, b, block)});
    store_rows(m.out, Dp, a.out, b, block.head, block.first, n, T(1), m.inverse_sum);
  });
}

template <class T>
struct BackwardBuffers {
  T *keys, *keys_t, *values_t;                              // for each head (S, D), (D, S), (D, S)
  T *query, *grad_out, *grad_query, *p, *ds, *inverse_sum;  // a block of queries of one head
  BiasRows<T> bias;

  size_t place(const Attention& a, const Shape& shape, int64_t heads, void* base) {
    Arena arena{static_cast<char*>(base)};
    keys = arena.take<T>(heads * shape.keys * shape.padded_depth);
    keys_t = arena.take<T>(heads * shape.depth * shape.padded_keys);
    values_t = arena.take<T>(heads * shape.depth * shape.padded_keys);
    query = arena.take<T>(kQueryBlock * shape.padded_depth);
    grad_out = arena.take<T>(kQueryBlock * shape.padded_depth);
    grad_query = arena.take<T>(kQueryBlock * shape.padded_depth);
    p = arena.take<T>(kQueryBlock * shape.padded_keys);
    ds = arena.take<T>(kQueryBlock * shape.padded_keys);
    inverse_sum = arena.take<T>(kQueryBlock);
    bias.place(a, shape, heads, arena);
    return arena.used;
  }
};

template <class T>
void backward_batch(const Attention& a, const BackwardTask& task, const Shape& shape, BackwardBuffers<T>& m,
                    int64_t b) {
  const int64_t D = shape.depth, S = shape.keys, Dp = shape.padded_depth, Sp = shape.padded_keys;
  const Range heads = task.heads;
  const bool want_ds = a.grad_query || a.grad_key || a.grad_bias || a.grad_table;

  for (int64_t h = heads.begin; h < heads.end; ++h) {
    const int64_t i = h - heads.begin;
    T* keys = m.keys + i * S * Dp;  // V's rows pass through here on their way to Vᵀ
    const Rows<T> values = rows_of(a.value, b, h, 0, S, keys, Dp);
    transpose(values.data, S, D, values.stride, m.values_t + i * D * Sp, Sp, rows_ahead(a.value, b, h, 0, S));
    load_rows(keys, Dp, a.key, b, h, 0, S, T(1));
    transpose(keys, S, D, Dp, m.keys_t + i * D * Sp, Sp);
  }
  m.bias.begin(a, b, heads);

  for_blocks(heads, task.queries, kQueryBlock, [&](const Block& block, const Block& next) {
    const int64_t h = block.head, i = h - heads.begin, first = block.first, n = block.rows;
    const bool accumulate = first != task.queries.begin;
    T* grad_key = reinterpret_cast<T*>(task.key_value + (b * a.heads() + h) * task.key_value_stride);
    T* grad_value = grad_key + S * Dp;
    load_rows(m.query, Dp, a.query, b, h, first, n, T(1));
    load_rows(m.grad_out, Dp, a.grad_out, b, h, first, n, T(1));
    m.bias.next(a, b, h, first, n);

    gemm<T>(
        {m.query, Dp, 1, m.keys_t + i * D * Sp, Sp, m.p, Sp, n, Sp, D, false, rows_ahead(a.query, b, next)});
    if (want_ds)
      gemm<T>({m.grad_out, Dp, 1, m.values_t + i * D * Sp, Sp, m.ds, Sp, n, Sp, D, false,
               rows_ahead(a.grad_out, b, next)});
    softmax_rows(m.p, T(a.scale * kLog4E), m.bias, m.inverse_sum, n, Sp);
    for (int64_t r = 0; r < n; ++r) {
      softmax_backward_row(m.p + r * Sp, m.ds + r * Sp, m.inverse_sum[r], Sp);
    }
    if (a.grad_value) gemm<T>({m.p, 1, Sp, m.grad_out, Dp, grad_value, Dp, S, Dp, n, accumulate});
    if (a.grad_key) gemm<T>({m.ds, 1, Sp, m.query, Dp, grad_key, Dp, S, Dp, n, accumulate});
    if (a.grad_query) {
      gemm<T>({m.ds, Sp, 1, m.keys + i * S * Dp, Dp, m.grad_query, Dp, n, Dp, S, false,
               rows_ahead(a.grad_query, b, block)});
      store_rows(m.grad_query, Dp, a.grad_query, b, h, first, n, T(a.scale));
    }
    if (a.grad_bias || a.grad_table) {
      for (int64_t r = 0; r < n; ++r) {
        add_bias_gradient(a, task, shape, b, h, first + r, m.bias.index(r), m.ds + r * Sp);
      }
    }
  });
}

}  // namespace
}  // namespace CK_ISA
}  // namespace ck
