// Vectors of four floats with no assumption about the processor: plain loops over the compiler's vector
// type. The other simd_*.h files offer the same names; the algorithms are written on these names alone.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

constexpr int W = 4;  // floats in a vector
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));

// dot4() takes the row operand as q + kQueryOffset and p + kProbOffset: VNNI wants it unsigned,
// the others signed. The products with the offset are subtracted by the caller.
constexpr int kQueryOffset = 0;
constexpr int kProbOffset = -127;
constexpr int kQkTile = 4, kQkRest = 4;      // keys per register tile, 8-bit; of the last ones
constexpr int kPvTile = 4;                   // channels
constexpr int kFullTile = 4;                 // the same in fp32

static inline vf load(const float* p) { vf v; memcpy(&v, p, sizeof v); return v; }
static inline void store(float* p, vf v) { memcpy(p, &v, sizeof v); }
static inline vi loadi(const void* p) { vi v; memcpy(&v, p, sizeof v); return v; }
static inline void storei(void* p, vi v) { memcpy(p, &v, sizeof v); }
static inline vf set1(float x) { return vf{x, x, x, x}; }
static inline vi set1i(int32_t x) { return vi{x, x, x, x}; }
typedef double vd __attribute__((vector_size(32)));
// Rounded once like a real fused multiply-add (the product is exact in fp64): sums are as exact as elsewhere.
static inline vf fma(vf a, vf b, vf c) {
  vd wide = __builtin_convertvector(a, vd) * __builtin_convertvector(b, vd) + __builtin_convertvector(c, vd);
  return __builtin_convertvector(wide, vf);
}
// The larger of the two; b where a is NaN.
static inline vf vmax(vf a, vf b) { return a > b ? a : b; }
static inline vf vmin(vf a, vf b) { return a < b ? a : b; }
static inline vf vabs(vf a) { return (vf)((vi)a & 0x7fffffff); }
static inline vf to_float(vi a) { return __builtin_convertvector(a, vf); }
static inline vf float_of_bits(vi a) { return (vf)a; }
static inline vi bits_of(vf a) { return (vi)a; }
static inline vi maxi(vi a, vi b) { return a > b ? a : b; }
static inline vi round_to_int(vf a) {
  return vi{(int32_t)lrintf(a[0]), (int32_t)lrintf(a[1]), (int32_t)lrintf(a[2]), (int32_t)lrintf(a[3])};
}
static inline vi shift_left(vi a, int n) { return a << n; }
static inline vi either(vi a, vi b) { return a | b; }
static inline vi addi(vi a, vi b) { return a + b; }
static inline bool any_above(vf a, vf b) {
  vi m = a > b;
  return (m[0] | m[1] | m[2] | m[3]) != 0;
}
static inline bool any_differs(vf a, vf b) {
  vi m = a != b;
  return (m[0] | m[1] | m[2] | m[3]) != 0;
}
// 2^x for x <= 0 and anything a masked or broken score brings: -inf gives 0, NaN stays NaN.
static inline vf exp2_full(vf x) {
  vf r;
  for (int i = 0; i < W; ++i) r[i] = x[i] < -126.f ? 0.f : exp2f(x[i]);
  return r;
}
static inline vf exp2_fast(vf x) { return exp2_full(x); }
static inline vf where_minus_inf_zero(vf a) { return a == set1(-INFINITY) ? set1(0.f) : a; }
// a where the lane's bit is set, else b; `bits` holds the W lanes in its low bits.
static inline vf choose_bits(vf a, vf b, uint32_t bits) {
  for (int i = 0; i < W; ++i)
    if (!(bits >> i & 1)) a[i] = b[i];
  return a;
}
static inline uint32_t above_bits(vf a, vf b) {
  uint32_t r = 0;
  for (int i = 0; i < W; ++i) r |= (uint32_t)(a[i] > b[i]) << i;
  return r;
}
// Lanes that are so far apart change places.
template <int kApart>
static inline vf swapped(vf a) {
  return kApart == 1 ? vf{a[1], a[0], a[3], a[2]} : vf{a[2], a[3], a[0], a[1]};
}
static inline float sum_lanes(vf a) { return (a[0] + a[1]) + (a[2] + a[3]); }
static inline float max_lanes(vf a) {
  float m = a[0];
  for (int i = 1; i < W; ++i) m = a[i] > m ? a[i] : m;
  return m;
}
static inline int32_t max_lanes_of(vi a) {
  int32_t m = a[0];
  for (int i = 1; i < W; ++i) m = a[i] > m ? a[i] : m;
  return m;
}
// Four bytes in every lane, in whatever form dot4 takes its last operand.
static inline vi broadcast4(const int8_t* p) {
  int32_t four;
  memcpy(&four, p, 4);
  return set1i(four);
}
// acc[lane] += sum over 4 bytes of row[4*lane + t] * other[t]
static inline vi dot4(vi acc, vi row, vi other) {
  int8_t a[16], b[16];
  memcpy(a, &row, 16);
  memcpy(b, &other, 16);
  for (int i = 0; i < W; ++i)
    acc[i] += a[4 * i] * b[4 * i] + a[4 * i + 1] * b[4 * i + 1] + a[4 * i + 2] * b[4 * i + 2] +
              a[4 * i + 3] * b[4 * i + 3];
  return acc;
}
// acc[lane] += the four bytes of the lane.
static inline vi add_bytes(vi acc, vi bytes) {
  int8_t b[16];
  memcpy(b, &bytes, 16);
  for (int i = 0; i < W; ++i) acc[i] += b[4 * i] + b[4 * i + 1] + b[4 * i + 2] + b[4 * i + 3];
  return acc;
}
// Numbers of 8 bits as the four bytes of each lane; and, 4 W of them, one after the other.
static inline vi bytes_in_lanes(vi a, vi b, vi c, vi d) {
  return (a & 255) | ((b & 255) << 8) | ((c & 255) << 16) | (d << 24);
}
static inline void store_bytes(int8_t* p, vi a, vi b, vi c, vi d) {
  for (int i = 0; i < W; ++i) {
    p[i] = (int8_t)a[i], p[W + i] = (int8_t)b[i], p[2 * W + i] = (int8_t)c[i], p[3 * W + i] = (int8_t)d[i];
  }
}
static inline float half_to_float(uint16_t h);
static inline vf load_bf16(const uint16_t* p) {
  vi v;
  for (int i = 0; i < W; ++i) v[i] = (int32_t)((uint32_t)p[i] << 16);
  return (vf)v;
}
static inline vf load_fp16(const uint16_t* p) {
  vf v;
  for (int i = 0; i < W; ++i) v[i] = half_to_float(p[i]);
  return v;
}
// The low byte of each lane, W bytes.
static inline void store_bytes(int8_t* p, vi v) {
  for (int i = 0; i < W; ++i) p[i] = (int8_t)v[i];
}
// to[c * ld_to + r] = from[r * ld_from + c] for a W x W tile of 32-bit words.
static inline void transpose_tile(const float* from, int64_t ld_from, float* to, int64_t ld_to) {
  for (int r = 0; r < W; ++r)
    for (int c = 0; c < W; ++c) memcpy(to + c * ld_to + r, from + r * ld_from + c, 4);
}
// 1 where a >= b, else 0.
static inline vf one_where_reaches(vf a, vf b) { return a >= b ? set1(1.f) : set1(0.f); }
