// Rows of any dtype and stride as contiguous fp32, and the reverse.
#pragma once
#include "attend.h"

static inline float bf16_to_float(uint16_t h) {
  uint32_t u = (uint32_t)h << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline uint16_t float_to_bf16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return (uint16_t)(u >> 16 | 0x40);  // a NaN stays one
  return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
static inline float half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  uint32_t u;
  if (exponent == 31) {
    u = sign | 0x7f800000 | fraction << 13;
  } else if (exponent == 0) {
    float f = (float)fraction * 0x1p-24f;  // zero and subnormals are exact in fp32
    return sign ? -f : f;
  } else {
    u = sign | (exponent + 112) << 23 | fraction << 13;
  }
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline uint16_t float_to_half(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  uint32_t sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // rounds to 65520 or more: infinity
  if (magnitude < 0x38800000) {                                   // subnormal: let fp32 addition round
    float a;
    memcpy(&a, &magnitude, 4);
    a += 0.5f;
    memcpy(&u, &a, 4);
    return (uint16_t)(sign | (u - 0x3f000000));
  }
  magnitude += 0xfff + (magnitude >> 13 & 1);
  return (uint16_t)(sign | ((magnitude - 0x38000000) >> 13));
}

static inline float load_scalar(const void* p, int64_t i, int dtype) {
  if (dtype == TAMIS_FP32) return ((const float*)p)[i];
  uint16_t h = ((const uint16_t*)p)[i];
  return dtype == TAMIS_BF16 ? bf16_to_float(h) : half_to_float(h);
}
static inline int64_t dtype_size(int dtype) { return dtype == TAMIS_FP32 ? 4 : dtype == TAMIS_BOOL ? 1 : 2; }

static inline const char* row_of(const tamis_tensor& t, int64_t b, int64_t h, int64_t i) {
  return (const char*)t.data + (b * t.stride[0] + h * t.stride[1] + i * t.stride[2]) * dtype_size(t.dtype);
}
// True when rows can be read in place as fp32.
static inline bool is_plain(const tamis_tensor& t) { return t.dtype == TAMIS_FP32 && t.stride[3] == 1; }

static void load_row(const tamis_tensor& t, int64_t b, int64_t h, int64_t i, int64_t dim, float* to) {
  const char* from = row_of(t, b, h, i);
  int64_t c = 0;
  if (t.stride[3] != 1) {
    for (; c < dim; ++c) to[c] = load_scalar(from, c * t.stride[3], t.dtype);
    return;
  }
  if (t.dtype == TAMIS_FP32) {
    const float* x = (const float*)from;
    for (; c + W <= dim; c += W) store(to + c, load(x + c));
    for (; c < dim; ++c) to[c] = x[c];
    return;
  }
  const uint16_t* half = (const uint16_t*)from;
  if (t.dtype == TAMIS_BF16)
    for (; c + W <= dim; c += W) store(to + c, load_bf16(half + c));
  else
    for (; c + W <= dim; c += W) store(to + c, load_fp16(half + c));
  for (; c < dim; ++c) to[c] = load_scalar(half, c, t.dtype);
}

// A row as contiguous fp32, zero from dim to `padded`: where it lies, or in `room`.
static inline const float* row_in(const tamis_tensor& t, int64_t b, int64_t h, int64_t i, int64_t dim, int64_t padded,
                                  float* room) {
  if (is_plain(t) && dim == padded) return (const float*)row_of(t, b, h, i);
  load_row(t, b, h, i, dim, room);
  for (int64_t c = dim; c < padded; ++c) room[c] = 0.f;
  return room;
}

// Times `factor`.
static void store_row(void* to, int64_t at, int dtype, const float* from, float factor, int64_t dim) {
  if (dtype == TAMIS_FP32) {
    float* out = (float*)to + at;
    int64_t c = 0;
    for (; c + W <= dim; c += W) store(out + c, load(from + c) * set1(factor));
    for (; c < dim; ++c) out[c] = from[c] * factor;
  } else {
    uint16_t* out = (uint16_t*)to + at;
    for (int64_t c = 0; c < dim; ++c)
      out[c] = dtype == TAMIS_BF16 ? float_to_bf16(from[c] * factor) : float_to_half(from[c] * factor);
  }
}

// Zero for every finite x, NaN for the others: sums of it find a NaN or infinity without a branch.
static bool all_finite(const float* x, int64_t dim) {
  vf s = set1(0.f);
  int64_t c = 0;
  for (; c + W <= dim; c += W) s = fma(load(x + c), set1(0.f), s);
  float t = sum_lanes(s);
  for (; c < dim; ++c) t += x[c] * 0.f;
  return t == 0.f;
}
static float dot(const float* x, const float* y, int64_t dim) {
  // Four chains: quicker, and their rounding is that of sums a quarter as long.
  vf s[4] = {set1(0.f), set1(0.f), set1(0.f), set1(0.f)};
  int64_t c = 0;
  for (; c + 4 * W <= dim; c += 4 * W)
    for (int i = 0; i < 4; ++i) s[i] = fma(load(x + c + i * W), load(y + c + i * W), s[i]);
  for (; c + W <= dim; c += W) s[0] = fma(load(x + c), load(y + c), s[0]);
  float t = sum_lanes((s[0] + s[1]) + (s[2] + s[3]));
  for (; c < dim; ++c) t += x[c] * y[c];
  return t;
}
static float max_abs(const float* x, int64_t dim) {
  vf m = set1(0.f);
  int64_t c = 0;
  for (; c + W <= dim; c += W) m = vmax(vabs(load(x + c)), m);
  float r = max_lanes(m);
  for (; c < dim; ++c) r = fabsf(x[c]) > r ? fabsf(x[c]) : r;
  return r;
}
// to[c * ld_to + r] = from[r * ld_from + c]; 32-bit words, so packed bytes may travel as floats.
static void transpose(const float* from, int64_t ld_from, int rows, int cols, float* to, int64_t ld_to) {
  int r = 0;
  for (; r + W <= rows; r += W) {
    int c = 0;
    for (; c + W <= cols; c += W) transpose_tile(from + r * ld_from + c, ld_from, to + c * ld_to + r, ld_to);
    for (; c < cols; ++c)
      for (int i = 0; i < W; ++i) memcpy(to + c * ld_to + r + i, from + (r + i) * ld_from + c, 4);
  }
  for (; r < rows; ++r)
    for (int c = 0; c < cols; ++c) memcpy(to + c * ld_to + r, from + r * ld_from + c, 4);
}

static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Adds to the bits of largest absolute entries, which order as numbers do: above all of them infinity and NaN.
static inline vi larger_bits(vi top, vf x) { return maxi(top, bits_of(vabs(x))); }
static inline float largest_of(vi tops) {
  const int32_t bits = max_lanes_of(tops);
  float top;
  memcpy(&top, &bits, 4);
  return top;
}

// 127 / top, or 0 where that is not a number to multiply with: top 0, NaN, infinite or so small that it overflows.
constexpr float kLeastTop = 4e-37f;
static inline float inverse_scale(float top) { return top > kLeastTop && top < INFINITY ? 127.f / top : 0.f; }

// int8 = round(x inverse), inverse = 127 / max|x|: however both are rounded, 127.00002 at most. Returns the sum of the
// bytes. `x` and `to` are readable and writable up to a multiple of 16, where x is zero. x is finite.
static inline int32_t quantise_row(const float* x, int64_t padded, float inverse, int8_t* to) {
  vi sum = set1i(0);
  const vf inv = set1(inverse);
  int64_t c = 0;
  for (; c + 4 * W <= padded; c += 4 * W) {
    vi q[4];
    for (int i = 0; i < 4; ++i) q[i] = round_to_int(load(x + c + i * W) * inv);
    store_bytes(to + c, q[0], q[1], q[2], q[3]);
    sum = addi(sum, addi(addi(q[0], q[1]), addi(q[2], q[3])));
  }
  for (; c < padded; c += W) {
    const vi q = round_to_int(load(x + c) * inv);
    store_bytes(to + c, q);
    sum = addi(sum, q);
  }
  return (int32_t)sum_lanes(to_float(sum));  // at most 256 * 127: exact in fp32
}
