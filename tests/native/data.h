// Random numbers, the library's dtypes, and tensors in memory of several layouts, with NaN wherever nothing may read.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <cmath>
#include <vector>

#include "attend.h"

struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9e3779b97f4a7c15u + 1) { next(), next(); }
  uint64_t next() {  // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  double uniform() { return (double)(next() >> 11) * 0x1p-53; }
  bool chance(double p) { return uniform() < p; }
  int64_t below(int64_t n) { return (int64_t)(next() % (uint64_t)n); }
  double normal() { return sqrt(-2 * log(1 - uniform())) * cos(6.283185307179586 * uniform()); }
  template <size_t n>
  int64_t pick(const int64_t (&from)[n]) { return from[below(n)]; }
};

inline std::vector<double> normals(Random& random, int64_t n, double size = 1) {
  std::vector<double> x(n);
  for (double& y : x) y = size * random.normal();
  return x;
}

inline double epsilon(int dtype) { return dtype == TAMIS_FP32 ? 0x1p-23 : dtype == TAMIS_BF16 ? 0x1p-7 : 0x1p-10; }

// The nearest number of a dtype, ties to even.
inline double rounded(double x, int dtype) {
  if (x == 0 || !std::isfinite(x)) return x;
  const int digits = dtype == TAMIS_FP32 ? 23 : dtype == TAMIS_BF16 ? 7 : 10, lowest = dtype == TAMIS_FP16 ? -14 : -126;
  const double step = ldexp(1, (ilogb(x) > lowest ? ilogb(x) : lowest) - digits);
  return nearbyint(x / step) * step;
}
// Bits of a number that `rounded` returned, and back.
inline uint16_t half_bits(double x, int dtype) {
  if (dtype == TAMIS_BF16) {
    const float f = (float)x;
    uint32_t u;
    memcpy(&u, &f, 4);
    return (uint16_t)(u >> 16);
  }
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return 0x7e00;
  if (std::isinf(x)) return sign | 0x7c00;
  const double size = fabs(x);
  if (size < 0x1p-14) return (uint16_t)(sign | (int)(size * 0x1p24));
  return (uint16_t)(sign | ((ilogb(size) + 15) << 10 | ((int)ldexp(size, 10 - ilogb(size)) & 1023)));
}
inline double half_value(uint16_t bits, int dtype) {
  if (dtype == TAMIS_BF16) {
    const uint32_t u = (uint32_t)bits << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
  }
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double size = exponent == 31 ? (fraction ? NAN : INFINITY)
                      : exponent     ? ldexp(1024 + fraction, exponent - 25)
                                     : ldexp(fraction, -24);
  return bits & 0x8000 ? -size : size;
}

inline int64_t size_of(int dtype) { return dtype == TAMIS_FP32 ? 4 : dtype == TAMIS_BOOL ? 1 : 2; }
inline void write(void* data, int64_t at, int dtype, double x) {
  if (dtype == TAMIS_FP32)
    ((float*)data)[at] = (float)x;
  else if (dtype == TAMIS_BOOL)
    ((uint8_t*)data)[at] = x != 0;
  else
    ((uint16_t*)data)[at] = half_bits(x, dtype);
}
inline double read(const void* data, int64_t at, int dtype) {
  return dtype == TAMIS_FP32 ? ((const float*)data)[at] : half_value(((const uint16_t*)data)[at], dtype);
}

// How [batch, heads, seq, dim] lies in memory.
enum Layout { dense, heads_inside, gaps, every_other, kLayouts };

// Keeps the memory of a view; `numbers` are rounded to its dtype first.
struct Stored {
  std::vector<uint8_t> bytes;
  tamis_tensor view;
  Stored() { memset(&view, 0, sizeof view); }
  Stored(std::vector<double>& numbers, const int64_t (&shape)[4], int dtype, int layout) : Stored() {
    const int64_t step = layout == every_other ? 2 : 1, row = (shape[3] + (layout == gaps ? 5 : 0)) * step;
    view.dtype = dtype;
    view.stride[3] = step;
    view.stride[2] = layout == heads_inside ? row * shape[1] : row;
    view.stride[1] = layout == heads_inside ? row : row * shape[2];
    view.stride[0] = row * shape[1] * shape[2];
    const int64_t entries = view.stride[0] * shape[0];
    bytes.resize(entries * size_of(dtype) + 1);
    for (int64_t i = 0; i < entries; ++i) write(bytes.data(), i, dtype, NAN);
    int64_t at = 0;
    for (int64_t b = 0; b < shape[0]; ++b)
      for (int64_t h = 0; h < shape[1]; ++h)
        for (int64_t i = 0; i < shape[2]; ++i)
          for (int64_t c = 0; c < shape[3]; ++c, ++at) {
            numbers[at] = dtype == TAMIS_BOOL ? numbers[at] : rounded(numbers[at], dtype);
            write(bytes.data(), b * view.stride[0] + h * view.stride[1] + i * view.stride[2] + c * step, dtype,
                  numbers[at]);
          }
    view.data = bytes.data();
  }
};

inline std::vector<float> floats(const std::vector<double>& x) { return std::vector<float>(x.begin(), x.end()); }
inline std::vector<double> doubles(const std::vector<float>& x) { return std::vector<double>(x.begin(), x.end()); }
