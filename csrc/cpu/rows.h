// Rows of a tensor of any dtype and stride, to and from packed rows of the type that the kernels compute in.
#pragma once

#include <cstddef>

#include "common/tensor.h"
#include "cpu/simd.h"

namespace ck {
namespace CK_ISA {
namespace {

// Lays buffers out one after the other, each on its own cache line; with a null base it only counts.
struct Arena {
  char* base;
  size_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* buffer = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += round_up(count * sizeof(T), 64);
    return buffer;
  }
};

inline float from_bfloat16(uint16_t x) {
  return bit_cast<float>(uint32_t(x) << 16);
}

// Round to nearest even; a NaN stays one.
inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  return x != x ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__F16C__)
inline float from_float16(uint16_t x) {
  return _cvtsh_ss(x);
}
inline uint16_t to_float16(float x) {
  return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
}
#else
inline float from_float16(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000) << 16, magnitude = x & 0x7fff;
  if (magnitude >= 0x7c00) return bit_cast<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Scaling by 2^112 rebiases the exponent, and makes subnormals normal.
  const float scaled = bit_cast<float>(magnitude << 13) * bit_cast<float>(uint32_t(127 + 112) << 23);
  return bit_cast<float>(sign | bit_cast<uint32_t>(scaled));
}

inline uint16_t to_float16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffff;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and above round to infinity
  if (magnitude < 0x38800000) {                       // subnormal: adding 1/2 leaves multiples of 2^-24
    const uint32_t rounded = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f);
    return sign | uint16_t(rounded - 0x3f000000);
  }
  return sign | uint16_t((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13);
}
#endif

// A finite double that float cannot hold becomes the greatest float, not infinity: -inf hides a key, -1e300
// does not.
template <class T>
inline T narrow(double x) {
  constexpr double greatest = double(__FLT_MAX__);
  if (sizeof(T) == sizeof(float) && __builtin_isfinite(x)) {
    x = x > greatest ? greatest : x < -greatest ? -greatest : x;
  }
  return T(x);
}

// target[i] = scale * source[i * stride] for i < n, zero for n <= i < padded.
template <class T>
inline void load_row(T* target, const void* source, DType dtype, int64_t stride, int64_t n, int64_t padded,
                     T scale) {
  int64_t i = 0;
  switch (dtype) {
    case DType::kFloat32: {
      const float* x = static_cast<const float*>(source);
      if (stride == 1) {
        for (; i < n; ++i) target[i] = scale * T(x[i]);
      } else {
        for (; i < n; ++i) target[i] = scale * T(x[i * stride]);
      }
      break;
    }
    case DType::kFloat64: {
      const double* x = static_cast<const double*>(source);
      for (; i < n; ++i) target[i] = scale * narrow<T>(x[i * stride]);
      break;
    }
    case DType::kBFloat16: {
      const uint16_t* x = static_cast<const uint16_t*>(source);
      if (stride == 1) {
        for (; i < n; ++i) target[i] = scale * T(from_bfloat16(x[i]));
      } else {
        for (; i < n; ++i) target[i] = scale * T(from_bfloat16(x[i * stride]));
      }
      break;
    }
    default: {
      const uint16_t* x = static_cast<const uint16_t*>(source);
#if defined(__F16C__)
      if (sizeof(T) == sizeof(float) && stride == 1) {
        for (; i + 8 <= n; i += 8) {
          const __m256 wide = _mm256_cvtph_ps(load<__m128i>(x + i));
          store(target + i, _mm256_mul_ps(wide, _mm256_set1_ps(float(scale))));
        }
      }
#endif
      for (; i < n; ++i) target[i] = scale * T(from_float16(x[i * stride]));
    }
  }
  for (; i < padded; ++i) target[i] = T(0);
}

// target[i * stride] = scale * source[i] for i < n, rounded to the dtype.
template <class T>
inline void store_row(const T* source, void* target, DType dtype, int64_t stride, int64_t n, T scale) {
  int64_t i = 0;
  switch (dtype) {
    case DType::kFloat32: {
      float* y = static_cast<float*>(target);
      if (stride == 1) {
        for (; i < n; ++i) y[i] = float(scale * source[i]);
      } else {
        for (; i < n; ++i) y[i * stride] = float(scale * source[i]);
      }
      break;
    }
    case DType::kFloat64: {
      double* y = static_cast<double*>(target);
      for (; i < n; ++i) y[i * stride] = double(scale * source[i]);
      break;
    }
    case DType::kBFloat16: {
      uint16_t* y = static_cast<uint16_t*>(target);
#if defined(__AVX512BF16__)
      if (sizeof(T) == sizeof(float) && stride == 1) {
        const auto scaled = [&](int64_t j) { return load<__m512>(source + j) * float(scale); };
        for (; i + 32 <= n; i += 32) store(y + i, _mm512_cvtne2ps_pbh(scaled(i + 16), scaled(i)));
        for (; i < n; i += 16) {
          const __mmask16 some = n - i < 16 ? (1u << (n - i)) - 1 : 0xffff;
          const __m512 x = _mm512_maskz_loadu_ps(some, source + i) * float(scale);
          _mm256_mask_storeu_epi16(y + i, some, bit_cast<__m256i>(_mm512_cvtneps_pbh(x)));
        }
      }
#endif
      if (stride == 1) {
        for (; i < n; ++i) y[i] = to_bfloat16(float(scale * source[i]));
      } else {
        for (; i < n; ++i) y[i * stride] = to_bfloat16(float(scale * source[i]));
      }
      break;
    }
    default: {
      uint16_t* y = static_cast<uint16_t*>(target);
#if defined(__F16C__)
      if (sizeof(T) == sizeof(float) && stride == 1) {
        for (; i + 8 <= n; i += 8) {
          const __m256 x = _mm256_mul_ps(load<__m256>(source + i), _mm256_set1_ps(float(scale)));
          store(y + i, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
        }
      }
#endif
      for (; i < n; ++i) y[i * stride] = to_float16(float(scale * source[i]));
    }
  }
}

// Rows of memory that are needed soon: asked for a few at a time, while a product is computed or the rows
// before them are copied, since the processor does not guess the next row of a strided tensor.
struct Ahead {
  const char* first = nullptr;
  int64_t stride = 0, bytes = 0, rows = 0;

  void fetch(int64_t row, int64_t count) const {
    const int64_t end = row + count < rows ? row + count : rows;
    for (; row < end; ++row) {
      const char* start = first + row * stride;
      for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(start + i);
      __builtin_prefetch(start + bytes - 1);
    }
  }
};

// Rows [first, first + rows) of tensor[b, h].
inline Ahead rows_ahead(const Tensor& t, int64_t b, int64_t h, int64_t first, int64_t rows) {
  if (t.stride[3] != 1 || rows == 0) return {};
  const int64_t item = item_size(t.dtype);
  return {static_cast<const char*>(t.at(b, h, first)), t.stride[2] * item, t.size[3] * item, rows};
}

constexpr int64_t kRowsAhead = 4;

// Rows [first, first + rows) of tensor[b, h] into packed rows of `padded` elements.
template <class T>
__attribute__((noinline)) void load_rows(T* target, int64_t padded, const Tensor& tensor, int64_t b,
                                         int64_t h, int64_t first, int64_t rows, T scale) {
  const Ahead ahead = rows_ahead(tensor, b, h, first, rows);
  for (int64_t i = 0; i < rows; ++i) {
    ahead.fetch(i + kRowsAhead, 1);
    load_row(target + i * padded, tensor.at(b, h, first + i), tensor.dtype, tensor.stride[3], tensor.size[3],
             padded, scale);
  }
}

// Rows of elements of type T, `stride` apart.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
};

// Rows [first, first + rows) of tensor[b, h] where they lie if they are of type T, else loaded into `room`.
// Only the first tensor.size[3] elements of a row may be read.
template <class T>
Rows<T> rows_of(const Tensor& tensor, int64_t b, int64_t h, int64_t first, int64_t rows, T* room,
                int64_t padded) {
  const DType own = sizeof(T) == sizeof(double) ? DType::kFloat64 : DType::kFloat32;
  if (tensor.dtype == own && tensor.stride[3] == 1) {
    return {static_cast<const T*>(tensor.at(b, h, first)), tensor.stride[2]};
  }
  load_rows(room, padded, tensor, b, h, first, rows, T(1));
  return {room, padded};
}

// The inverse of load_rows; row i is scaled by scale * row_scale[i] where row_scale is given.
template <class T>
__attribute__((noinline)) void store_rows(const T* source, int64_t padded, const Tensor& tensor, int64_t b,
                                          int64_t h, int64_t first, int64_t rows, T scale,
                                          const T* row_scale = nullptr) {
  for (int64_t i = 0; i < rows; ++i) {
    store_row(source + i * padded, tensor.at(b, h, first + i), tensor.dtype, tensor.stride[3], tensor.size[3],
              row_scale ? scale * row_scale[i] : scale);
  }
}

// (rows, columns) with `padded` elements a row -> (columns, rows) with `out_padded` >= rows, zeros beyond
// rows; `ahead`: the rows themselves, where they may not be in the cache yet.
template <class T>
__attribute__((noinline)) void transpose(const T* source, int64_t rows, int64_t columns, int64_t padded,
                                         T* out, int64_t out_padded, const Ahead& ahead = {}) {
  typedef typename VectorOf<T, 4>::type Four;
  const int64_t whole_rows = rows / 4 * 4, whole_columns = columns / 4 * 4;
  for (int64_t i = 0; i < whole_rows; i += 4) {
    const T* x = source + i * padded;
    ahead.fetch(i + kRowsAhead, 4);
    for (int64_t j = 0; j < whole_columns; j += 4, x += 4) {
      transpose4<T>(load<Four>(x), load<Four>(x + padded), load<Four>(x + 2 * padded),
                    load<Four>(x + 3 * padded), out + j * out_padded + i, out_padded);
    }
    for (int64_t j = whole_columns; j < columns; ++j, ++x) {
      for (int64_t l = 0; l < 4; ++l) out[j * out_padded + i + l] = x[l * padded];
    }
  }
  for (int64_t j = 0; j < columns; ++j) {
    T* y = out + j * out_padded;
    for (int64_t i = whole_rows; i < rows; ++i) y[i] = source[i * padded + j];
    for (int64_t i = rows; i < out_padded; ++i) y[i] = T(0);
  }
}

}  // namespace
}  // namespace CK_ISA
}  // namespace ck
