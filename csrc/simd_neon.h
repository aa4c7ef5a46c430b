// Four floats a vector: ARMv8.2 with the dot product of bytes. See simd_generic.h for what each name means.
#pragma once
#include <arm_neon.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

constexpr int W = 4;
typedef float32x4_t vf;
typedef int32x4_t vi;

constexpr int kQueryOffset = 0;
constexpr int kProbOffset = -127;
// 16 accumulators, two row vectors and at most eight broadcasts, of 32 registers. 12 a tile would also fit, but leaves
// channels over at every usual head_dim, and those go one by one.
constexpr int kQkTile = 8, kQkRest = 4, kPvTile = 8;
constexpr int kFullTile = 8;

static inline vf load(const float* p) { return vld1q_f32(p); }
static inline void store(float* p, vf v) { vst1q_f32(p, v); }
static inline vi loadi(const void* p) { return vreinterpretq_s32_u8(vld1q_u8((const uint8_t*)p)); }
static inline void storei(void* p, vi v) { vst1q_u8((uint8_t*)p, vreinterpretq_u8_s32(v)); }
static inline vf set1(float x) { return vdupq_n_f32(x); }
static inline vi set1i(int32_t x) { return vdupq_n_s32(x); }
static inline vf fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
// Not fmax or fmaxnm: both treat a NaN in `b` and one in `a` alike.
static inline vf vmax(vf a, vf b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
static inline vf vmin(vf a, vf b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
static inline vf vabs(vf a) { return vabsq_f32(a); }
static inline vf to_float(vi a) { return vcvtq_f32_s32(a); }
static inline vf float_of_bits(vi a) { return vreinterpretq_f32_s32(a); }
static inline vi bits_of(vf a) { return vreinterpretq_s32_f32(a); }
static inline vi maxi(vi a, vi b) { return vmaxq_s32(a, b); }
static inline vi round_to_int(vf a) { return vcvtnq_s32_f32(a); }
static inline vi shift_left(vi a, int n) { return a << n; }
static inline vi either(vi a, vi b) { return vorrq_s32(a, b); }
static inline vi addi(vi a, vi b) { return vaddq_s32(a, b); }
static inline uint32x4_t lane_bits() {
  const uint32x4_t bits = {1, 2, 4, 8};
  return bits;
}
static inline uint32_t above_bits(vf a, vf b) { return vaddvq_u32(vandq_u32(vcgtq_f32(a, b), lane_bits())); }
static inline bool any_above(vf a, vf b) { return vmaxvq_u32(vcgtq_f32(a, b)) != 0; }
static inline bool any_differs(vf a, vf b) { return vminvq_u32(vceqq_f32(a, b)) == 0; }
// 2^n * 2^f with f in [-.5, .5]; n goes straight into the exponent field. Below 2^-126 the result is 0. A NaN converts
// to the integer 0 and is not less than anything: it stays.
static inline vf scale_by_power(vf poly, vf n, vf x) {
  const vi r = vaddq_s32(vreinterpretq_s32_f32(poly), vshlq_n_s32(vcvtnq_s32_f32(n), 23));
  return vreinterpretq_f32_s32(vbicq_s32(r, vreinterpretq_s32_u32(vcltq_f32(x, set1(-126.f)))));
}
static inline vf exp2_full(vf x) {
  const vf n = vrndnq_f32(x), f = vsubq_f32(x, n);
  vf p = set1(1.326472684e-3f);
  p = fma(p, f, set1(9.671512665e-3f));
  p = fma(p, f, set1(5.550733744e-2f));
  p = fma(p, f, set1(2.402224208e-1f));
  p = fma(p, f, set1(6.931469776e-1f));
  p = fma(p, f, set1(1.f));
  return scale_by_power(p, n, x);
}
static inline vf exp2_fast(vf x) {
  const vf n = vrndnq_f32(x), f = vsubq_f32(x, n);
  vf p = set1(9.582852812e-3f);
  p = fma(p, f, set1(5.590642500e-2f));
  p = fma(p, f, set1(2.402409862e-1f));
  p = fma(p, f, set1(6.931241933e-1f));
  p = fma(p, f, set1(1.f));
  return scale_by_power(p, n, x);
}
static inline vf where_minus_inf_zero(vf a) {
  const uint32x4_t lost = vceqq_f32(a, set1(-INFINITY));
  return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(a), lost));
}
static inline vf choose_bits(vf a, vf b, uint32_t bits) {
  return vbslq_f32(vtstq_u32(vdupq_n_u32(bits), lane_bits()), a, b);
}
template <int kApart>
static inline vf swapped(vf a) {
  return kApart == 1 ? vrev64q_f32(a) : vextq_f32(a, a, 2);
}
static inline float sum_lanes(vf a) { return vaddvq_f32(a); }
static inline float max_lanes(vf a) {
  float m = a[0];
  for (int i = 1; i < W; ++i) m = a[i] > m ? a[i] : m;
  return m;
}
static inline int32_t max_lanes_of(vi a) { return vmaxvq_s32(a); }
// Only loaded: sdot takes the bytes of one lane for all.
static inline int8x8_t broadcast4(const int8_t* p) {
  uint32_t four;
  memcpy(&four, p, 4);
  return vcreate_s8(four);
}
static inline vi dot4(vi acc, vi row, int8x8_t other) {
  return vdotq_lane_s32(acc, vreinterpretq_s8_s32(row), other, 0);
}
static inline vi add_bytes(vi acc, vi bytes) { return vdotq_s32(acc, vreinterpretq_s8_s32(bytes), vdupq_n_s8(1)); }
static inline int8x16_t narrowed(vi a, vi b, vi c, vi d) {
  const int16x8_t ab = vcombine_s16(vmovn_s32(a), vmovn_s32(b)), cd = vcombine_s16(vmovn_s32(c), vmovn_s32(d));
  return vcombine_s8(vmovn_s16(ab), vmovn_s16(cd));
}
static inline vi bytes_in_lanes(vi a, vi b, vi c, vi d) {
  const uint8x16_t by_lane = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  return vreinterpretq_s32_s8(vqtbl1q_s8(narrowed(a, b, c, d), by_lane));
}
static inline void store_bytes(int8_t* p, vi a, vi b, vi c, vi d) { vst1q_s8(p, narrowed(a, b, c, d)); }
static inline vf load_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
static inline vf load_fp16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
static inline void store_bytes(int8_t* p, vi v) {
  const int16x4_t half = vmovn_s32(v);
  const int8x8_t bytes = vmovn_s16(vcombine_s16(half, half));
  memcpy(p, &bytes, 4);
}
static inline void transpose_tile(const float* from, int64_t ld_from, float* to, int64_t ld_to) {
  const vf a = load(from), b = load(from + ld_from), c = load(from + 2 * ld_from), d = load(from + 3 * ld_from);
  const vf ac = vzip1q_f32(a, c), bd = vzip1q_f32(b, d), ac2 = vzip2q_f32(a, c), bd2 = vzip2q_f32(b, d);
  store(to, vzip1q_f32(ac, bd));
  store(to + ld_to, vzip2q_f32(ac, bd));
  store(to + 2 * ld_to, vzip1q_f32(ac2, bd2));
  store(to + 3 * ld_to, vzip2q_f32(ac2, bd2));
}
static inline vf one_where_reaches(vf a, vf b) {
  return vreinterpretq_f32_u32(vandq_u32(vcgeq_f32(a, b), vreinterpretq_u32_f32(set1(1.f))));
}
