// What attention in every element type shares: sizes and scratch, the bias of a block of queries, the softmax
// and its gradient in float or double, and what is summed over queries. Scores are in units of log 4, so that
// the softmax needs 4^x alone: log₄e is folded into the scale and into the bias. It is less than 1: the
// greatest finite bias stays finite, with room for a score beside it (log₂e would make it infinite).
#pragma once

#include "common/thread_pool.h"
#include "cpu/gemm.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace ck {
namespace CK_ISA {
namespace {

constexpr int64_t kQueryBlock = 40;  // queries at a time
constexpr double kLog4E = 0.7213475204444817;

// The sizes of one problem, padded.
struct Shape {
  int64_t depth, keys, padded_depth, padded_keys;
};

template <class T>
Shape shape_of(const Attention& a) {
  const int64_t depth = a.query.size[3], keys = a.keys();
  return {depth, keys, round_up(depth, kColumnUnit<T>), round_up(keys, kLanes<T>)};
}

// Some queries of one head.
struct Block {
  int64_t head, first, rows;
};

// Calls function(block, next) for all blocks of `rows` queries, heads inside; next has none at the last one.
template <class Function>
void for_blocks(Range heads, Range queries, int64_t rows, Function function) {
  const auto block = [&](int64_t head, int64_t first) {
    const int64_t left = queries.end > first ? queries.end - first : 0;
    return Block{head, first, left < rows ? left : rows};
  };
  for (int64_t first = queries.begin; first < queries.end; first += rows) {
    for (int64_t h = heads.begin; h < heads.end; ++h) {
      const bool last = h + 1 == heads.end;
      function(block(h, first), last ? block(heads.begin, first + rows) : block(h + 1, first));
    }
  }
}

// The rows of a block, to be fetched.
inline Ahead rows_ahead(const Tensor& t, int64_t b, const Block& block) {
  return rows_ahead(t, b, block.head, block.first, block.rows);
}

// The buffers of one task in this thread's scratch.
template <class Buffers>
Buffers placed(const Attention& a, const Shape& shape, Range heads) {
  Buffers m;
  const int64_t count = heads.end - heads.begin;
  m.place(a, shape, count, thread_scratch(Scratch::kTask, m.place(a, shape, count, nullptr)));
  return m;
}

// The bias of a block of queries, of so many at most, as padded rows in units of log 4, -inf beyond the last
// key.
template <class T, int64_t kQueries = kQueryBlock>
class BiasRows {
 public:
  void place(const Attention& a, const Shape& shape, int64_t heads, Arena& arena) {
    padded_ = shape.padded_keys;
    keys_ = shape.keys;
    by_query_ = a.bias && a.bias.stride[2] != 0;
    by_head_ = a.bias && a.bias.stride[1] != 0;
    rows_ = arena.take<T>(padded_ * (a.table     ? a.table.size[2]
                                     : by_query_ ? kQueries
                                     : by_head_  ? heads
                                                 : 1));
  }

  // What does not depend on the query.
  void begin(const Attention& a, int64_t b, Range heads) {
    heads_begin_ = heads.begin;
    block_ = -1;
    if (a.table) {
      fill(0, a.table, b, 0, 0, a.table.size[2]);
    } else if (!a.bias) {
      for (int64_t j = 0; j < padded_; ++j) rows_[j] = 0;
      close(0, 1);
    } else if (!by_query_) {
      for (int64_t h = heads.begin; h < (by_head_ ? heads.end : heads.begin + 1); ++h) {
        fill(h - heads.begin, a.bias, b, h, 0, 1);
      }
    }
  }

  // Queries [first, first + n) of head h.
  void next(const Attention& a, int64_t b, int64_t h, int64_t first, int64_t n) {
    const bool same_block = first == block_;
    block_ = first;
    base_ = rows_;
    if (a.table) {
      for (int64_t i = 0; i < n && !same_block; ++i) {
        const int64_t label = *static_cast<const int32_t*>(a.labels.at(b, 0, first + i));
        if (label < 0 || label >= a.table.size[2]) fail_label(label, a.table.size[2]);
        index_[i] = label;
      }
    } else if (by_query_) {
      if (!same_block || by_head_) fill(0, a.bias, b, h, first, n);
      for (int64_t i = 0; i < n; ++i) index_[i] = i;
    } else {
      if (by_head_) base_ += (h - heads_begin_) * padded_;
      for (int64_t i = 0; i < n; ++i) index_[i] = 0;
    }
  }

  const T* row(int64_t i) const { return base_ + index_[i] * padded_; }
  int64_t index(int64_t i) const { return index_[i]; }

 private:
  void fill(int64_t row, const Tensor& from, int64_t b, int64_t h, int64_t first, int64_t n) {
    load_rows(rows_ + row * padded_, padded_, from, b, h, first, n, T(kLog4E));
    close(row, n);
  }

  void close(int64_t row, int64_t n) {
    for (int64_t i = row; i < row + n; ++i) {
      for (int64_t j = keys_; j < padded_; ++j) rows_[i * padded_ + j] = -T(__builtin_inf());
    }
  }

  T* rows_ = nullptr;
  const T* base_ = nullptr;
  int64_t padded_ = 0, keys_ = 0, heads_begin_ = 0, block_ = -1;
  bool by_query_ = false, by_head_ = false;
  int64_t index_[kQueries];
};

// Hands e = 4^(s · scale + bias - max), vector by vector, to store_e(row, column, e), and leaves 1 / Σ e of
// each row; 0 for a row that is -inf throughout. Scores that are NaN make the sum NaN. Two passes over the
// block: within one row everything waits for the maximum.
template <class T, class Bias, class Store>
inline void softmax_rows(const T* scores, T scale, const Bias& bias, T* inverse_sum, int64_t rows,
                         int64_t padded, Store store_e) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* s = scores + i * padded;
    const T* bias_row = bias.row(i);
    Vec<T> max = load<Vec<T>>(s) * scale + load<Vec<T>>(bias_row);
    for (int64_t j = kLanes<T>; j < padded; j += kLanes<T>) {
      const Vec<T> x = load<Vec<T>>(s + j) * scale + load<Vec<T>>(bias_row + j);
      max = max > x ? max : x;
    }
    const T largest = max_lanes(max);
    inverse_sum[i] = largest == -T(__builtin_inf()) ? T(0) : largest;
  }
  for (int64_t i = 0; i < rows; ++i) {
    const T* s = scores + i * padded;
    const T* bias_row = bias.row(i);
    const T largest = inverse_sum[i];
    Vec<T> sum = {};
    for (int64_t j = 0; j < padded; j += kLanes<T>) {
      const Vec<T> x = load<Vec<T>>(s + j) * scale + load<Vec<T>>(bias_row + j);
      const Vec<T> e = exp4_nonpositive(x - largest);
      store_e(i, j, e);
      sum += e;
    }
    const T total = sum_lanes(sum);
    inverse_sum[i] = total == 0 ? T(0) : 1 / total;
  }
}

template <class T, class Bias>
inline void softmax_rows(T* scores, T scale, const Bias& bias, T* inverse_sum, int64_t rows, int64_t padded) {
  softmax_rows(scores, scale, bias, inverse_sum, rows, padded,
               [&](int64_t i, int64_t j, Vec<T> e) { store(scores + i * padded + j, e); });
}

// dp -> ds = p ∘ (dp − rowsum(p ∘ dp)), and p is normalised, both in place.
template <class T>
inline void softmax_backward_row(T* p, T* dp, T inverse_sum, int64_t padded) {
  Vec<T> dot = {};
  for (int64_t j = 0; j < padded; j += kLanes<T>) {
    const Vec<T> x = load<Vec<T>>(p + j) * inverse_sum;
    store(p + j, x);
    dot += x * load<Vec<T>>(dp + j);
  }
  const T row_sum = sum_lanes(dot);
  for (int64_t j = 0; j < padded; j += kLanes<T>) {
    store(dp + j, load<Vec<T>>(p + j) * (load<Vec<T>>(dp + j) - row_sum));
  }
}

// The row of a bias gradient that one query adds to, where every query has its own.
template <class T>
inline T* own_bias_row(const Attention& a, int64_t b, int64_t h, int64_t query) {
  return static_cast<T*>(
      a.grad_bias.at(a.grad_bias.size[0] == 1 ? 0 : b, a.grad_bias.size[1] == 1 ? 0 : h, query));
}

// Adds ds of one query to the gradient of its bias. Sums over queries are long, so they are kept in double.
template <class T>
inline void add_bias_gradient(const Attention& a, const BackwardTask& task, const Shape& shape, int64_t b,
                              int64_t h, int64_t query, int64_t region, const T* ds) {
  if (a.grad_table || a.grad_bias.size[2] == 1) {
    double* target = task.bias + (a.grad_table ? region : 0) * shape.padded_keys;
    for (int64_t j = 0; j < shape.keys; ++j) target[j] += ds[j];
    return;
  }
  T* target = own_bias_row<T>(a, b, h, query);
  if (a.grad_bias.size[3] == 1) {
    for (int64_t j = 0; j < shape.keys; ++j) *target += ds[j];
  } else {
    for (int64_t j = 0; j < shape.keys; ++j) target[j * a.grad_bias.stride[3]] += ds[j];
  }
}

template <class T>
void zero_bias_gradient(const Attention& a, const BackwardTask& task, const Shape& shape) {
  if (a.grad_bias && a.grad_bias.size[2] != 1) {
    for (int64_t query = task.queries.begin; query < task.queries.end; ++query) {
      T* target = own_bias_row<T>(a, task.batch.begin, task.heads.begin, query);
      for (int64_t j = 0; j < a.grad_bias.size[3]; ++j) target[j * a.grad_bias.stride[3]] = 0;
    }
  } else {
    const int64_t rows = a.grad_table ? a.grad_table.size[2] : a.grad_bias ? 1 : 0;
    for (int64_t j = 0; j < rows * shape.padded_keys; ++j) task.bias[j] = 0;
  }
}

template <class T>
PartialBytes partial_sizes(const Attention& a) {
  const Shape shape = shape_of<T>(a);
  const int64_t bias_rows = a.grad_table                              ? a.grad_table.size[2]
                            : a.grad_bias && a.grad_bias.size[2] == 1 ? 1
                                                                      : 0;
  return {round_up(2 * shape.keys * shape.padded_depth * sizeof(T), 64),
          round_up(bias_rows * shape.padded_keys * sizeof(double), 64)};
}

// target = the partials' elements [offset, offset + n), added in order.
template <class T>
void sum_partials(T* target, const char* partials, int64_t count, int64_t stride, int64_t offset, int64_t n) {
  for (int64_t j = 0; j < n; ++j) target[j] = 0;
  for (int64_t c = 0; c < count; ++c) {
    const T* source = reinterpret_cast<const T*>(partials + c * stride) + offset;
    for (int64_t j = 0; j < n; ++j) target[j] += source[j];
  }
}

template <class T>
void store_key_value(const Attention& a, int64_t b, int64_t h, const char* partials, int64_t count,
                     int64_t stride) {
  const Shape shape = shape_of<T>(a);
  const int64_t D = shape.padded_depth, S = shape.keys;
  const T* sum = reinterpret_cast<const T*>(partials);
  if (count != 1) {
    T* total = static_cast<T*>(thread_scratch(Scratch::kTask, 2 * S * D * sizeof(T)));
    sum_partials(total, partials, count, stride, 0, 2 * S * D);
    sum = total;
  }
  if (a.grad_key) store_rows(sum, D, a.grad_key, b, h, 0, S, T(a.scale));
  if (a.grad_value) store_rows(sum + S * D, D, a.grad_value, b, h, 0, S, T(1));
}

template <class T>
void store_bias(const Attention& a, int64_t b, int64_t h, const char* partials, int64_t count,
                int64_t stride) {
  const Shape shape = shape_of<T>(a);
  double* row = static_cast<double*>(thread_scratch(Scratch::kTask, shape.padded_keys * sizeof(double)));
  const Tensor& target = a.grad_table ? a.grad_table : a.grad_bias;
  for (int64_t g = 0; g < target.size[2]; ++g) {
    sum_partials(row, partials, count, stride, g * shape.padded_keys, shape.padded_keys);
    if (target.size[3] == 1) {
      for (int64_t j = 1; j < shape.keys; ++j) row[0] += row[j];
    }
    store_rows(row, shape.padded_keys, target, b, h, g, 1, 1.0);
  }
}

// A task: buffers that are placed once, batch row after batch row.
template <class T, class Buffers>
void backward_task(const Attention& a, const BackwardTask& task) {
  const Shape shape = shape_of<T>(a);
  Buffers m = placed<Buffers>(a, shape, task.heads);
  zero_bias_gradient<T>(a, task, shape);
  for (int64_t b = task.batch.begin; b < task.batch.end; ++b) backward_batch(a, task, shape, m, b);
}

}  // namespace
}  // namespace CK_ISA
}  // namespace ck
