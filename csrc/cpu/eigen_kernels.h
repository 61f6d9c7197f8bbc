// Eigenvalues of a symmetric matrix, all of them, and eigenvectors of its tridiagonal form, a few: what
// LAPACK's syevx does, with a reduction that reads and writes the matrix once for each column.
#pragma once

#include "common/thread_pool.h"
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace ck {
namespace CK_ISA {
namespace {

constexpr int kRowsAtOnce = 4;  // kLanes<float> is a multiple in every instruction set

// A -= v wᵀ + w vᵀ and y = A x for the leading m rows. Of A (row stride `lda`), the tiles of kLanes rows and
// columns on the diagonal are kept whole and of the others those below it. All vectors are zero from m to the
// next whole tile.
inline void update_and_multiply(float* a, int64_t lda, int64_t m, const float* v, const float* w,
                                const float* x, float* y) {
  using V = Vec<float>;
  constexpr int64_t kTile = kLanes<float>;
  const int64_t padded = round_up(m, kTile);
  for (int64_t i = 0; i < padded; ++i) y[i] = 0;
  for (int64_t i = 0; i < padded; i += kRowsAtOnce) {
    const int64_t diagonal = i / kTile * kTile;
    float* rows = a + i * lda;
    V sums[kRowsAtOnce] = {};
    const auto update = [&](int r, int64_t c, V v_c, V w_c) {
      V entry = load<V>(rows + r * lda + c);
      entry -= v[i + r] * w_c;
      entry -= w[i + r] * v_c;
      store(rows + r * lda + c, entry);
      return entry;
    };
    for (int64_t c = 0; c < diagonal; c += kTile) {
      const V v_c = load<V>(v + c), w_c = load<V>(w + c), x_c = load<V>(x + c);
      V y_c = load<V>(y + c);
      for (int r = 0; r < kRowsAtOnce; ++r) {
        const V entry = update(r, c, v_c, w_c);
        sums[r] += entry * x_c;
        y_c += entry * x[i + r];
      }
      store(y + c, y_c);
    }
    const V v_c = load<V>(v + diagonal), w_c = load<V>(w + diagonal), x_c = load<V>(x + diagonal);
    for (int r = 0; r < kRowsAtOnce; ++r) {
      sums[r] += update(r, diagonal, v_c, w_c) * x_c;
      y[i + r] += sum_lanes(sums[r]);
    }
  }
}

// T = Qᵀ A Q in the order of LAPACK's uplo = 'L' for A with rows and columns in reverse order: the reduction
// starts from the last row, whose entries lie together.
inline void tridiagonalize(const EigenTask& t) {
  const int64_t n = t.size, padded = round_up(n, kLanes<float>);
  const int64_t lda = padded + kLanes<float>;  // a row stride that is no multiple of a page
  float* a = static_cast<float*>(thread_scratch(Scratch::kTask, (padded * lda + 4 * padded) * sizeof(float)));
  float *v = a + padded * lda, *w = v + padded, *x = w + padded, *y = x + padded;
  double largest = 0;
  for (int64_t i = 0; i < padded; ++i) {
    float* row = a + i * lda;
    for (int64_t j = 0; j < padded; ++j) {
      row[j] = i >= n || j >= n ? 0 : j <= i ? t.matrix[i * n + j] : t.matrix[j * n + i];
      const double size = __builtin_fabsf(row[j]);
      largest = size > largest ? size : largest;
    }
    v[i] = w[i] = 0;
  }
  // Far below the rounding of A: what is left of a matrix of low rank underflows if it is reduced further.
  const double negligible = 0x1p-120 * largest * largest;
  for (int64_t k = n - 1; k > 0; --k) {
    float* row = a + k * lda;
    for (int64_t c = 0; c <= k; ++c) row[c] -= v[k] * w[c] + w[k] * v[c];
    t.diagonal[n - 1 - k] = row[k];
    double squares = 0;
    for (int64_t c = 0; c < k - 1; ++c) squares += static_cast<double>(row[c]) * row[c];
    const double first = row[k - 1], norm = __builtin_sqrt(first * first + squares);
    const bool done = squares <= negligible;
    const double beta = done ? first : first > 0 ? -norm : norm;
    const double tau = done ? 0 : (beta - first) / beta;
    const float scale = done ? 0 : static_cast<float>(1 / (first - beta));
    for (int64_t c = 0; c < k - 1; ++c) x[c] = scale * row[c];
    x[k - 1] = 1;
    for (int64_t c = k; c < padded; ++c) x[c] = 0;
    t.off_diagonal[n - 1 - k] = static_cast<float>(beta);
    t.tau[n - 1 - k] = static_cast<float>(tau);
    float* reflector = t.reflectors + (n - 1 - k) * (n - 1);
    for (int64_t c = 0; c < n - 1; ++c) reflector[c] = c < n - 1 - k ? 0 : x[n - 2 - c];

    update_and_multiply(a, lda, k, v, w, x, y);
    double dot = 0;
    for (int64_t c = 0; c < k; ++c) dot += static_cast<double>(y[c]) * x[c];
    const float factor = static_cast<float>(tau), shift = static_cast<float>(tau * tau * dot / 2);
    for (int64_t c = 0; c < padded; ++c) {
      w[c] = c < k ? factor * y[c] - shift * x[c] : 0;
      v[c] = x[c];
    }
  }
  t.diagonal[n - 1] = a[0] - 2 * v[0] * w[0];
}

// Every eigenvalue of T, descending, by bisection on the number of negative pivots of T - λ (Sturm): kGroup
// neighbours at a time, so that divisions overlap.
inline void eigenvalues(const EigenTask& t) {
  using V = Vec<float>;
  using Count = VectorOf<int32_t, kLanes<float>>::type;
  constexpr int kGroup = 4;
  constexpr int64_t kTogether = kGroup * kLanes<float>;
  const int64_t n = t.size;
  const float *d = t.diagonal, *e = t.off_diagonal;
  float low = d[0], high = d[0];
  for (int64_t i = 0; i < n; ++i) {
    const float left = i == 0 ? 0 : __builtin_fabsf(e[i - 1]), right = i == n - 1 ? 0 : __builtin_fabsf(e[i]);
    low = d[i] - left - right < low ? d[i] - left - right : low;
    high = d[i] + left + right > high ? d[i] + left + right : high;
  }
  const float size = high > -low ? high : -low, tiny = size * 0x1p-60f + 0x1p-120f;
  low -= 0x1p-20f * size + tiny, high += 0x1p-20f * size + tiny;
  for (int64_t first = 0; first < n; first += kTogether) {
    V lower[kGroup], upper[kGroup];
    Count wanted[kGroup];  // so many are smaller
    for (int g = 0; g < kGroup; ++g) {
      for (int l = 0; l < kLanes<float>; ++l) {
        const int64_t index = first + g * kLanes<float> + l;
        wanted[g][l] = static_cast<int32_t>(index < n ? n - 1 - index : 0);
        lower[g][l] = low, upper[g][l] = high;
      }
    }
    for (int step = 0; step < 80; ++step) {
      V middle[kGroup], pivot[kGroup];
      Count smaller[kGroup] = {};
      bool done = true;
      for (int g = 0; g < kGroup; ++g) {
        middle[g] = 0.5f * (lower[g] + upper[g]);
        pivot[g] = d[0] - middle[g];
        for (int l = 0; l < kLanes<float>; ++l) {
          const float width = upper[g][l] - lower[g][l];
          done = done && width <= 0x1p-22f * __builtin_fabsf(middle[g][l]) + 0x1p-34f * size;
        }
      }
      if (done) break;
      for (int64_t i = 0;; ++i) {
        for (int g = 0; g < kGroup; ++g) {
          const V zero = {}, small = zero - tiny;
          pivot[g] = pivot[g] < tiny && pivot[g] > small ? small : pivot[g];
          smaller[g] -= pivot[g] < zero;
        }
        if (i == n - 1) break;
        const float square = e[i] * e[i], next = d[i + 1];
        for (int g = 0; g < kGroup; ++g) pivot[g] = (next - middle[g]) - square / pivot[g];
      }
      for (int g = 0; g < kGroup; ++g) {
        lower[g] = smaller[g] <= wanted[g] ? middle[g] : lower[g];
        upper[g] = smaller[g] <= wanted[g] ? upper[g] : middle[g];
      }
    }
    for (int64_t i = first; i < n && i < first + kTogether; ++i) {
      const int g = static_cast<int>((i - first) / kLanes<float>), l = (i - first) % kLanes<float>;
      t.values[i] = 0.5f * (lower[g][l] + upper[g][l]);
      if (upper[g][l] < high) high = upper[g][l];
    }
  }
}

void symmetric_eigenvalues(const EigenTask& task) {
  tridiagonalize(task);
  eigenvalues(task);
}

// Unit eigenvectors of T for up to kLanes<double> of its eigenvalues, in double: Rayleigh quotient iteration
// on the twisted factorisation of T - λ (Dhillon and Parlett, 2004), whose smallest |γ| is where the vector
// is large.
inline void vectors_at_once(const EigenTask& t, int64_t first, int64_t lanes, float* vectors) {
  using V = Vec<double>;
  using Index = VectorOf<int64_t, kLanes<double>>::type;
  constexpr double kTiny = 1e-290;
  const int64_t n = t.size;
  V* down = static_cast<V*>(thread_scratch(Scratch::kTask, 2 * n * sizeof(V)));
  V *up = down + n, lambda, zero = {};
  const auto guard = [&](V q) { return q < kTiny && q > zero - kTiny ? zero - kTiny : q; };
  for (int l = 0; l < kLanes<double>; ++l) lambda[l] = t.values[first + (l < lanes ? l : 0)];
  for (int iteration = 0; iteration < 3; ++iteration) {
    down[0] = guard(t.diagonal[0] - lambda);
    for (int64_t i = 1; i < n; ++i) {
      const double e = t.off_diagonal[i - 1];
      down[i] = guard(t.diagonal[i] - lambda - e * e / down[i - 1]);
    }
    V least = zero + 1e300, gamma = zero;
    Index twist = {};
    for (int64_t i = n - 1; i >= 0; --i) {
      const V shifted = t.diagonal[i] - lambda;
      const double e = i == n - 1 ? 0 : t.off_diagonal[i];
      up[i] = i == n - 1 ? guard(shifted) : guard(shifted - e * e / up[i + 1]);
      const V found = down[i] + up[i] - shifted, size = found < zero ? -found : found;
      const auto better = size < least;
      least = better ? size : least;
      gamma = better ? found : gamma;
      twist = better ? Index{} + i : twist;
    }
    // The vector replaces the pivots: those of `down` before the twist, of `up` after it.
    V z = zero, squares = zero;
    for (int64_t i = n - 1; i >= 0; --i) {
      const Index at = Index{} + i;
      const V before = i == n - 1 ? zero : -(t.off_diagonal[i] / down[i]) * z;
      z = at == twist ? zero + 1 : at < twist ? before : zero;
      down[i] = z;
      squares += z * z;
    }
    z = zero;
    for (int64_t i = 0; i < n; ++i) {
      const Index at = Index{} + i;
      const V after = i == 0 ? zero : -(t.off_diagonal[i - 1] / up[i]) * z;
      z = at == twist ? zero + 1 : at > twist ? after : zero;
      down[i] += at > twist ? z : zero;
      squares += at > twist ? z * z : zero;
    }
    lambda += gamma / squares;
    for (int l = 0; l < lanes && iteration == 2; ++l) {
      const double scale = 1 / __builtin_sqrt(squares[l]);
      for (int64_t i = 0; i < n; ++i) vectors[l * n + i] = static_cast<float>(down[i][l] * scale);
    }
  }
}

void tridiagonal_vectors(const EigenTask& t, int64_t first, int64_t count, float* vectors) {
  constexpr int64_t kTogether = kLanes<double>;
  for (int64_t i = 0; i < count; i += kTogether)
    vectors_at_once(t, first + i, count - i < kTogether ? count - i : kTogether, vectors + i * t.size);
}

}  // namespace
}  // namespace CK_ISA
}  // namespace ck
