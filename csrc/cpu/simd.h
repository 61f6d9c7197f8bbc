// Vectors of the instruction set that this translation unit is compiled for, through the compilers' vector
// extensions: arithmetic, comparison and `condition ? a : b` work lane by lane on Vec<T>.
//
// Everything that kernels.cpp includes lives in an unnamed namespace and calls no inline function of the
// standard library: the linker keeps one copy of such a function for the whole program, and it might keep the
// AVX-512 one.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace ck {
namespace CK_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRegisters = 32;
constexpr bool kHalfVectors = true;  // a 512-bit vector's lower half costs half: 40 columns are 16 + 16 + 8
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 16;
constexpr bool kHalfVectors = false;
#else
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 16;
constexpr bool kHalfVectors = false;
#endif

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};

template <class T>
constexpr int kLanes = kVectorBytes / sizeof(T);
template <class T>
using Vec = typename VectorOf<T, kLanes<T>>::type;
template <class T>
using HalfVec = typename VectorOf<T, kLanes<T> / 2>::type;

// Columns are padded to whole vectors, or to half vectors where those are cheaper.
template <class T>
constexpr int64_t kColumnUnit = kHalfVectors ? kLanes<T> / 2 : kLanes<T>;

inline int64_t round_up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit * unit;
}

template <class V, class T>
inline V load(const T* source) {
  V v;
  __builtin_memcpy(&v, source, sizeof(V));
  return v;
}

template <class V, class T>
inline void store(T* target, V v) {
  __builtin_memcpy(target, &v, sizeof(V));
}

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

inline float sum_lanes(Vec<float> v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);
#else
  float sum = v[0];
  for (int i = 1; i < kLanes<float>; ++i) sum += v[i];
  return sum;
#endif
}

inline float max_lanes(Vec<float> v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(v);
#else
  float max = v[0];
  for (int i = 1; i < kLanes<float>; ++i) max = v[i] > max ? v[i] : max;
  return max;
#endif
}

inline double sum_lanes(Vec<double> v) {
  double sum = v[0];
  for (int i = 1; i < kLanes<double>; ++i) sum += v[i];
  return sum;
}

inline double max_lanes(Vec<double> v) {
  double max = v[0];
  for (int i = 1; i < kLanes<double>; ++i) max = v[i] > max ? v[i] : max;
  return max;
}

// 4^x for x <= 0 (or NaN, which stays NaN); 0 below the normal range, or gradually where that costs nothing.
// The polynomial is the minimax of 4^f on [-1/4, 1/4] with relative error 2e-9, below float's rounding.
inline Vec<float> exp4_nonpositive(Vec<float> x) {
#if defined(__AVX512DQ__)
  const Vec<float> f = _mm512_reduce_ps(x, 0x18);  // x - (x rounded to half an integer)
#else
  typedef VectorOf<uint32_t, kLanes<float>>::type Bits;
  const Vec<float> zero = {}, lowest = zero - 63.f;
  // The exponent of a NaN, whatever its payload, is 0: what is added to p below must leave it a NaN.
  const Vec<float> number = x < zero ? x : zero;
  const float shift = 6291456.f;  // 1.5 * 2^22: adding it rounds to half an integer, left in the low bits
  const Vec<float> shifted = number + shift;
  const Vec<float> f = x - (shifted - shift);
#endif
  Vec<float> p = f * 9.826151605244800e-3f + 4.287639810853037e-2f;
  p = p * f + 1.538949977227942e-1f;
  p = p * f + 4.440265976930247e-1f;
  p = p * f + 9.609059165452048e-1f;
  p = p * f + 1.386294405710084f;
  p = p * f + 1.f;
#if defined(__AVX512DQ__)
  return _mm512_scalef_ps(p, 2 * (x - f));
#else
  const Vec<float> power = bit_cast<Vec<float>>(bit_cast<Bits>(p) + (bit_cast<Bits>(shifted) << 23));
  return x < lowest ? zero : power;
#endif
}

inline Vec<double> exp4_nonpositive(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp2(2 * x[i]);
  return x;
}

// Rows of four, transposed: out[i] = (a[i], b[i], c[i], d[i]).
template <class T>
inline void transpose4(typename VectorOf<T, 4>::type a, typename VectorOf<T, 4>::type b,
                       typename VectorOf<T, 4>::type c, typename VectorOf<T, 4>::type d, T* out,
                       int64_t stride) {
#if defined(__clang__)
#define CK_SHUFFLE(x, y, i, j, k, l) __builtin_shufflevector(x, y, i, j, k, l)
#else
  typedef typename VectorOf<typename std::conditional<sizeof(T) == 8, int64_t, int32_t>::type, 4>::type Index;
#define CK_SHUFFLE(x, y, i, j, k, l) __builtin_shuffle(x, y, Index{i, j, k, l})
#endif
  const auto ab_low = CK_SHUFFLE(a, b, 0, 4, 1, 5), ab_high = CK_SHUFFLE(a, b, 2, 6, 3, 7);
  const auto cd_low = CK_SHUFFLE(c, d, 0, 4, 1, 5), cd_high = CK_SHUFFLE(c, d, 2, 6, 3, 7);
  store(out, CK_SHUFFLE(ab_low, cd_low, 0, 1, 4, 5));
  store(out + stride, CK_SHUFFLE(ab_low, cd_low, 2, 3, 6, 7));
  store(out + 2 * stride, CK_SHUFFLE(ab_high, cd_high, 0, 1, 4, 5));
  store(out + 3 * stride, CK_SHUFFLE(ab_high, cd_high, 2, 3, 6, 7));
#undef CK_SHUFFLE
}

}  // namespace
}  // namespace CK_ISA
}  // namespace ck
