// Runs every kernel over awkward shapes on heap blocks of exactly the size that they may touch, and compares
// with a plain double-precision loop. Built with sanitizers: an access outside a tensor ends the program.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "common/thread_pool.h"
#include "cpu/attention.h"
#include "cpu/eigen.h"
#include "cpu/low_rank.h"

namespace {

using ck::DType;
using ck::Tensor;

std::mt19937 generator(0);

// A tensor on a heap block of its own that holds not one element more, filled with NaN or normal values; and
// the same values as doubles.
struct Block {
  Tensor tensor;
  std::unique_ptr<char[]> memory;

  Block(DType dtype, std::vector<int64_t> size, std::vector<int64_t> order = {0, 1, 2, 3}) {
    int64_t count = 1;
    for (int i = 3; i >= 0; --i) {
      tensor.size[order[i]] = size[order[i]];
      tensor.stride[order[i]] = count;
      count *= size[order[i]];
    }
    tensor.given = true;
    tensor.dtype = dtype;
    memory.reset(new char[count * ck::item_size(dtype)]);
    tensor.data = memory.get();
    std::memset(tensor.data, 0xff, count * ck::item_size(dtype));  // a NaN in every floating type
  }

  template <class Value>
  void fill(Value value) {
    for_each([&](int64_t b, int64_t h, int64_t n, int64_t d) { set(b, h, n, d, value()); });
  }

  template <class Visit>
  void for_each(Visit visit) const {
    for (int64_t b = 0; b < tensor.size[0]; ++b)
      for (int64_t h = 0; h < tensor.size[1]; ++h)
        for (int64_t n = 0; n < tensor.size[2]; ++n)
          for (int64_t d = 0; d < tensor.size[3]; ++d) visit(b, h, n, d);
  }

  // Only bfloat16, float and double are filled and read; float16 differs from bfloat16 in the conversion
  // alone, which the Python tests cover.
  void set(int64_t b, int64_t h, int64_t n, int64_t d, double x) {
    void* p = tensor.at(b, h, n, d);
    if (tensor.dtype == DType::kFloat64) {
      *static_cast<double*>(p) = x;
    } else if (tensor.dtype == DType::kFloat32) {
      *static_cast<float*>(p) = float(x);
    } else if (tensor.dtype == DType::kInt32) {
      *static_cast<int32_t*>(p) = int32_t(x);
    } else {
      const float wide = float(x);
      uint32_t bits;
      std::memcpy(&bits, &wide, 4);
      *static_cast<uint16_t*>(p) = uint16_t(bits >> 16);
    }
  }

  // Broadcast dimensions are read at index 0.
  double get(int64_t b, int64_t h, int64_t n, int64_t d) const {
    const void* p = tensor.at(tensor.size[0] == 1 ? 0 : b, tensor.size[1] == 1 ? 0 : h,
                              tensor.size[2] == 1 ? 0 : n, tensor.size[3] == 1 ? 0 : d);
    if (tensor.dtype == DType::kFloat64) return *static_cast<const double*>(p);
    if (tensor.dtype == DType::kFloat32) return *static_cast<const float*>(p);
    if (tensor.dtype == DType::kInt32) return *static_cast<const int32_t*>(p);
    const uint32_t bits = uint32_t(*static_cast<const uint16_t*>(p)) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
  }
};

double normal() {
  return std::normal_distribution<double>()(generator);
}

void expect_close(double got, double wanted, double tolerance, const char* what) {
  if (std::abs(got - wanted) <= tolerance * (1 + std::abs(wanted))) return;
  std::printf("%s: got %.9g, wanted %.9g\n", what, got, wanted);
  std::exit(1);
}

enum class Bias { kNone, kFull, kPerKey, kPerQuery, kTable };

void check_attention(int64_t B, int64_t H, int64_t N, int64_t D, int64_t S, DType dtype, Bias kind,
                     int threads) {
  const std::vector<int64_t> tokens_first = {0, 2, 1, 3};
  const DType sums = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const double tolerance = dtype == DType::kFloat64 ? 1e-12 : dtype == DType::kFloat32 ? 2e-5 : 3e-2;
  Block query(dtype, {B, H, N, D}, tokens_first), key(dtype, {B, H, S, D}),
      value(dtype, {B, H, S, D}, tokens_first);
  Block grad_out(dtype, {B, H, N, D}), out(dtype, {B, H, N, D}, tokens_first);
  Block grad_query(dtype, {B, H, N, D}), grad_key(dtype, {B, H, S, D}), grad_value(dtype, {B, H, S, D});
  for (Block* block : {&query, &key, &value, &grad_out}) block->fill(normal);

  constexpr int64_t kRegions = 3;
  std::vector<int64_t> bias_size = {1, 1, 1, 1};
  if (kind == Bias::kFull) bias_size = {B, H, N, S};
  if (kind == Bias::kPerKey) bias_size = {1, H, 1, S};
  if (kind == Bias::kPerQuery) bias_size = {B, 1, N, S};
  if (kind == Bias::kTable) bias_size = {1, 1, kRegions, S};
  Block bias(sums, bias_size), grad_bias(sums, bias_size), labels(DType::kInt32, {B, 1, N, 1});
  bias.fill(normal);
  if (kind != Bias::kNone && S > 1) {  // one key that no query may see
    bias.for_each([&](int64_t b, int64_t h, int64_t n, int64_t s) {
      if (s == S - 1) bias.set(b, h, n, s, -std::numeric_limits<double>::infinity());
    });
  }
  labels.fill([] { return double(generator() % kRegions); });
  auto bias_at = [&](int64_t b, int64_t h, int64_t n, int64_t s) {
    if (kind == Bias::kNone) return 0.0;
    return kind == Bias::kTable ? bias.get(0, 0, int64_t(labels.get(b, 0, n, 0)), s) : bias.get(b, h, n, s);
  };

  ck::Attention a;
  a.query = query.tensor, a.key = key.tensor, a.value = value.tensor, a.out = out.tensor;
  a.scale = 1 / std::sqrt(double(D));
  if (kind == Bias::kTable) {
    a.table = bias.tensor, a.labels = labels.tensor, a.grad_table = grad_bias.tensor;
  } else if (kind != Bias::kNone) {
    a.bias = bias.tensor, a.grad_bias = grad_bias.tensor;
  }
  ck::attention_forward(a, threads);
  a.grad_out = grad_out.tensor;
  a.grad_query = grad_query.tensor, a.grad_key = grad_key.tensor, a.grad_value = grad_value.tensor;
  ck::attention_backward(a, threads);

  Block dk(DType::kFloat64, {B, H, S, D}), dv(DType::kFloat64, {B, H, S, D}), db(DType::kFloat64, bias_size);
  for (Block* block : {&dk, &dv, &db}) block->fill([] { return 0.0; });
  auto add = [](Block& block, int64_t b, int64_t h, int64_t n, int64_t d, double x) {
    block.set(b, h, n, d, block.get(b, h, n, d) + x);
  };
  std::vector<double> p(S), dp(S), dq(D);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < H; ++h)
      for (int64_t n = 0; n < N; ++n) {
        double largest = -std::numeric_limits<double>::infinity(), sum = 0, dot = 0;
        for (int64_t s = 0; s < S; ++s) {
          p[s] = dp[s] = 0;
          for (int64_t d = 0; d < D; ++d) {
            p[s] += a.scale * query.get(b, h, n, d) * key.get(b, h, s, d);
            dp[s] += grad_out.get(b, h, n, d) * value.get(b, h, s, d);
          }
          p[s] += bias_at(b, h, n, s);
          largest = std::max(largest, p[s]);
        }
        for (int64_t s = 0; s < S; ++s) sum += p[s] = std::exp(p[s] - largest);
        for (int64_t s = 0; s < S; ++s) dot += (p[s] /= sum) * dp[s];
        for (int64_t d = 0; d < D; ++d) {
          double o = 0;
          for (int64_t s = 0; s < S; ++s) o += p[s] * value.get(b, h, s, d);
          expect_close(out.get(b, h, n, d), o, tolerance, "out");
          dq[d] = 0;
        }
        for (int64_t s = 0; s < S; ++s) {
          const double ds = p[s] * (dp[s] - dot);
          for (int64_t d = 0; d < D; ++d) {
            dq[d] += a.scale * ds * key.get(b, h, s, d);
            add(dk, b, h, s, d, a.scale * ds * query.get(b, h, n, d));
            add(dv, b, h, s, d, p[s] * grad_out.get(b, h, n, d));
          }
          const int64_t row = kind == Bias::kTable ? int64_t(labels.get(b, 0, n, 0))
                              : bias_size[2] == 1  ? 0
                                                   : n;
          if (kind != Bias::kNone) add(db, bias_size[0] == 1 ? 0 : b, bias_size[1] == 1 ? 0 : h, row, s, ds);
        }
        for (int64_t d = 0; d < D; ++d)
          expect_close(grad_query.get(b, h, n, d), dq[d], tolerance, "grad_query");
      }
  dk.for_each([&](int64_t b, int64_t h, int64_t s, int64_t d) {
    expect_close(grad_key.get(b, h, s, d), dk.get(b, h, s, d), tolerance, "grad_key");
    expect_close(grad_value.get(b, h, s, d), dv.get(b, h, s, d), tolerance, "grad_value");
  });
  if (kind != Bias::kNone) {
    db.for_each([&](int64_t b, int64_t h, int64_t n, int64_t s) {
      expect_close(grad_bias.get(b, h, n, s), db.get(b, h, n, s), tolerance, "grad_bias");
    });
  }

  double sum = 0, squares = 0;
  dk.for_each([&](int64_t b, int64_t h, int64_t s, int64_t d) {
    if (d != 0) return;
    for (int64_t n = 0; n < N; ++n) {
      double score = 0;
      for (int64_t i = 0; i < D; ++i) score += query.get(b, h, n, i) * key.get(b, h, s, i);
      sum += score;
      squares += score * score;
    }
  });
  const ck::Moments moments = ck::score_moments(query.tensor, key.tensor, threads);
  expect_close(moments.sum, sum, 1e-9, "sum of scores");
  expect_close(moments.sum_of_squares, squares, 1e-9, "sum of squared scores");
}

// A matrix (rows, columns), row-major or with its columns contiguous.
Block matrix(DType dtype, int64_t rows, int64_t columns, bool turned = false) {
  Block block(dtype, {1, 1, rows, columns},
              turned ? std::vector<int64_t>{0, 1, 3, 2} : std::vector<int64_t>{0, 1, 2, 3});
  block.fill(normal);
  return block;
}

double at(const Block& block, int64_t row, int64_t column) {
  return block.get(0, 0, row, column);
}

double tolerance_of(DType dtype) {
  return dtype == DType::kFloat64 ? 1e-12 : dtype == DType::kFloat32 ? 1e-4 : 3e-2;
}

// Overlapping, nested and empty terms, factors of every dtype; new and in place.
void check_low_rank(int64_t R, int64_t E, DType dtype, int threads) {
  const DType dtypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat64};
  Block base = matrix(dtype, R, E, threads == 2), out(dtype, {1, 1, R, E});
  std::vector<Block> factors;
  factors.reserve(10);
  ck::LowRankSum sum;
  sum.base = base.tensor, sum.out = out.tensor;
  const int64_t parts[][3] = {
      {0, R, 3}, {R / 3, R / 2, 16}, {R / 2, 0, 5}, {0, R / 2, 0}, {R - R / 4, R / 4, 1}};
  for (const auto& [start, rows, rank] : parts) {
    const DType kind = dtypes[factors.size() / 2 % 3];
    factors.push_back(matrix(kind, rows, rank, rank == 16));
    factors.push_back(matrix(kind, rank, E, rank == 1));
    sum.terms.push_back(
        {factors[factors.size() - 2].tensor, factors.back().tensor, start, rank == 3 ? 1 : -0.5});
  }
  Block wanted(DType::kFloat64, {1, 1, R, E});
  wanted.for_each([&](int64_t, int64_t, int64_t i, int64_t j) {
    double x = at(base, i, j);
    for (size_t t = 0; t < sum.terms.size(); ++t) {
      const auto& [start, rows, rank] = parts[t];
      if (i < start || i >= start + rows) continue;
      for (int64_t k = 0; k < rank; ++k)
        x += sum.terms[t].scale * at(factors[2 * t], i - start, k) * at(factors[2 * t + 1], k, j);
    }
    wanted.set(0, 0, i, j, x);
  });
  const auto compare = [&](const Block& got) {
    got.for_each([&](int64_t, int64_t, int64_t i, int64_t j) {
      expect_close(at(got, i, j), at(wanted, i, j), tolerance_of(dtype), "low-rank sum");
    });
  };
  ck::low_rank_sum(sum, threads);
  compare(out);
  sum.out = base.tensor;
  ck::low_rank_sum(sum, threads);
  compare(base);
  sum.terms[0].start = 1;
  bool refused = false;
  try {
    ck::low_rank_sum(sum, threads);
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  expect_close(refused, 1, 0, "a term beyond the rows is refused");
}

void check_merge(int64_t R, int64_t E, DType dtype, int threads) {
  const DType sums = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const int64_t counts[] = {3, 0, 17}, total = 20;
  Block base = matrix(dtype, R, E), out(dtype, {1, 1, R, E}), residual(sums, {1, 1, R, total});
  Block basis = matrix(sums, total, E, threads == 3);
  std::vector<Block> weights, targets;
  ck::Merge merge;
  for (int64_t count : counts) {
    weights.push_back(matrix(dtype, R, E, count == 3));
    targets.push_back(matrix(sums, count, E));
  }
  for (int n = 0; n < 3; ++n) {
    merge.weights.push_back(weights[n].tensor);
    merge.targets.push_back(targets[n].tensor);
  }
  merge.base = base.tensor, merge.out = residual.tensor;
  ck::merge_residual(merge, threads);
  merge.basis = basis.tensor, merge.out = out.tensor;
  ck::merge_apply(merge, threads);
  for (int64_t i = 0; i < R; ++i) {
    std::vector<double> row(total, 0.0);
    for (int n = 0, k = 0; n < 3; ++n)
      for (int64_t t = 0; t < counts[n]; ++t, ++k)
        for (int64_t j = 0; j < E; ++j)
          row[k] += (at(weights[n], i, j) - at(base, i, j)) * at(targets[n], t, j);
    for (int64_t k = 0; k < total; ++k)
      expect_close(at(residual, i, k), row[k], tolerance_of(sums), "residual");
    for (int64_t j = 0; j < E; ++j) {
      double x = at(base, i, j), size = 0;
      for (int64_t k = 0; k < total; ++k)
        x += row[k] * at(basis, k, j), size += std::abs(row[k] * at(basis, k, j));
      expect_close(at(out, i, j), x, tolerance_of(dtype) * (1 + size), "merged");
    }
  }
}

void check_gram(int64_t T, int64_t E, DType dtype, int threads) {
  const Block features = matrix(dtype, T, E, threads == 2);
  Block out(DType::kFloat64, {1, 1, E, E});
  ck::gram(features.tensor, out.tensor, threads);
  out.for_each([&](int64_t, int64_t, int64_t i, int64_t j) {
    double x = 0;
    for (int64_t t = 0; t < T; ++t) x += at(features, t, i) * at(features, t, j);
    expect_close(at(out, i, j), x, 1e-12 * (1 + T), "gram");
  });
}

// Every eigenvalue and half of the eigenvectors of three matrices: A Q = Q diag(λ) for T's own vectors.
void check_eigen(int64_t n, int threads) {
  Block matrices(DType::kFloat32, {3, 1, n, n}), reflectors(DType::kFloat32, {3, 1, n - 1, n - 1}),
      numbers(DType::kFloat32, {3, 1, 4, n});
  matrices.fill(normal);
  ck::symmetric_eigenvalues(matrices.tensor, reflectors.tensor, numbers.tensor, threads);
  for (int64_t g = 0; g < 3; ++g) {
    double trace = 0, sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      trace += matrices.get(g, 0, i, i);
      sum += numbers.get(g, 0, 3, i);
    }
    expect_close(sum, trace, 1e-4 * n, "sum of eigenvalues");
    Tensor one = numbers.tensor;
    one.size[0] = 1;
    one.data = numbers.tensor.at(g);
    Block vectors(DType::kFloat32, {1, 1, (n + 1) / 2, n});
    ck::tridiagonal_vectors(one, vectors.tensor, threads);
    for (int64_t r = 0; r < vectors.tensor.size[2]; ++r) {
      for (int64_t i = 0; i < n; ++i) {
        double product = numbers.get(g, 0, 0, i) * vectors.get(0, 0, r, i);
        if (i > 0) product += numbers.get(g, 0, 1, i - 1) * vectors.get(0, 0, r, i - 1);
        if (i < n - 1) product += numbers.get(g, 0, 1, i) * vectors.get(0, 0, r, i + 1);
        expect_close(product, numbers.get(g, 0, 3, r) * vectors.get(0, 0, r, i), 1e-4, "T v against λ v");
      }
    }
  }
}

void check_pool() {
  std::vector<int> visits(1000, 0);
  ck::parallel_for(4, 1000, [&](int64_t i) { ++visits[i]; });
  for (int count : visits) expect_close(count, 1, 0, "visits of a task");
  bool thrown = false;
  try {
    ck::parallel_for(3, 50, [](int64_t i) {
      if (i == 17) throw std::runtime_error("from a task");
    });
  } catch (const std::runtime_error&) {
    thrown = true;
  }
  expect_close(thrown, 1, 0, "an exception that crosses threads");
}

}  // namespace

int main() {
  check_pool();
  int cases = 0;
  for (const ck::Kernels* const* isa = ck::usable_kernels(); *isa != nullptr; ++isa) {
    setenv("CK_CPU_ISA", (*isa)->name, 1);
    for (int64_t n : {2, 3, 16, 17, 70}) check_eigen(n, 1 + cases++ % 3);
    const int64_t shapes[][5] = {{1, 1, 1, 1, 1},  {2, 1, 3, 5, 2},   {1, 2, 41, 40, 77}, {2, 3, 7, 13, 17},
                                 {1, 1, 83, 8, 3}, {1, 2, 5, 161, 9}, {1, 1, 2, 33, 130}, {1, 1, 250, 3, 5},
                                 {1, 2, 0, 8, 4},  {0, 2, 3, 8, 4}};
    for (const auto& shape : shapes) {
      for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16}) {
        for (Bias bias : {Bias::kNone, Bias::kFull, Bias::kPerKey, Bias::kPerQuery, Bias::kTable}) {
          check_attention(shape[0], shape[1], shape[2], shape[3], shape[4], dtype, bias, 1 + cases++ % 3);
        }
      }
    }
    for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16}) {
      for (const auto& [rows, width] :
           {std::pair<int64_t, int64_t>{0, 16}, {1, 1}, {70, 64}, {131, 33}, {9, 112}, {40, 0}}) {
        check_low_rank(rows, width, dtype, 1 + cases++ % 3);
        check_merge(rows, width, dtype, 1 + cases++ % 3);
        check_gram(rows, width, dtype, 1 + cases++ % 3);
      }
    }
  }
  std::printf("%d cases\n", cases);
  return 0;
}
