// Eight floats a vector: AVX2, FMA and F16C; AVX-VNNI where TAMIS_VNNI is set. See simd_generic.h for what each name means.
#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

constexpr int W = 8;
typedef __m256 vf;
typedef __m256i vi;

constexpr int kQueryOffset = 128;
constexpr int kProbOffset = 0;
#ifdef TAMIS_VNNI
// 12 accumulators, 2 row vectors, 1 broadcast: 15 of 16 registers.
constexpr int kQkTile = 6, kQkRest = 4, kPvTile = 6;
#else
#define TAMIS_PAIRS 1  // bytes are multiplied by engine_pairs.h
// By four vectors of rows: 12 accumulators, broadcast, product, row, ones: 16 registers.
constexpr int kQkTile = 3, kQkRest = 1, kPvTile = 3;
#endif
constexpr int kFullTile = 6;             // 12 accumulators, 2 row vectors, 1 broadcast: 15 of 16 registers

static inline vf load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, vf v) { _mm256_storeu_ps(p, v); }
static inline vi loadi(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
static inline void storei(void* p, vi v) { _mm256_storeu_si256((__m256i*)p, v); }
static inline vf set1(float x) { return _mm256_set1_ps(x); }
static inline vi set1i(int32_t x) { return _mm256_set1_epi32(x); }
static inline vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
static inline vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
static inline vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }
static inline vf vabs(vf a) { return _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff))); }
static inline vf to_float(vi a) { return _mm256_cvtepi32_ps(a); }
static inline vf float_of_bits(vi a) { return _mm256_castsi256_ps(a); }
static inline vi bits_of(vf a) { return _mm256_castps_si256(a); }
static inline vi maxi(vi a, vi b) { return _mm256_max_epi32(a, b); }
static inline vi round_to_int(vf a) { return _mm256_cvtps_epi32(a); }
static inline vi addi(vi a, vi b) { return _mm256_add_epi32(a, b); }
static inline uint32_t above_bits(vf a, vf b) {
  return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ));
}
static inline bool any_above(vf a, vf b) { return above_bits(a, b) != 0; }
static inline bool any_differs(vf a, vf b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NEQ_UQ)) != 0; }
// 2^n * 2^f with f in [-.5, .5]; n goes straight into the exponent field. Below 2^-126 the result is 0;
// NaN fails the "not less than" and stays.
static inline vf scale_by_power(vf poly, vf n, vf x) {
  vi e = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  vf r = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(poly), e));
  vf keep = _mm256_cmp_ps(x, set1(-126.f), _CMP_NLT_UQ);
  // A NaN has no integer exponent: take it from x itself.
  vf nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  return _mm256_blendv_ps(_mm256_and_ps(r, keep), x, nan);
}
static inline vf exp2_full(vf x) {
  vf n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  vf f = _mm256_sub_ps(x, n);
  vf p = set1(1.326472684e-3f);
  p = fma(p, f, set1(9.671512665e-3f));
  p = fma(p, f, set1(5.550733744e-2f));
  p = fma(p, f, set1(2.402224208e-1f));
  p = fma(p, f, set1(6.931469776e-1f));
  p = fma(p, f, set1(1.f));
  return scale_by_power(p, n, x);
}
static inline vf exp2_fast(vf x) {
  vf n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  vf f = _mm256_sub_ps(x, n);
  vf p = set1(9.582852812e-3f);
  p = fma(p, f, set1(5.590642500e-2f));
  p = fma(p, f, set1(2.402409862e-1f));
  p = fma(p, f, set1(6.931241933e-1f));
  p = fma(p, f, set1(1.f));
  return scale_by_power(p, n, x);
}
// 254 e^x for x <= 0, exactly 254 at 0, by the polynomial of exp2_fast. Added to 1.5 * 2^23 + 127, x log2(e) is rounded to
// n, and the low bits are the exponent field of 2^n: 0 for n = -127, and so is the result. A NaN stays one.
#define TAMIS_LEVELS 1
static inline vf level_of(vf x) {
  const vf log2e = set1(1.44269504088896f), magic = set1(12582912.f + 127.f);
  x = vmax(set1(-88.03f), x);
  const vf t = fma(x, log2e, magic);
  const vf f = _mm256_fmsub_ps(x, log2e, _mm256_sub_ps(t, magic));
  vf p = set1(254 * 9.582852812e-3f);
  p = fma(p, f, set1(254 * 5.590642500e-2f));
  p = fma(p, f, set1(254 * 2.402409862e-1f));
  p = fma(p, f, set1(254 * 6.931241933e-1f));
  p = fma(p, f, set1(254.f));
  return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(t), 23)));
}
// Four numbers from 0 to 255 as the bytes of each lane.
static inline vi bytes_of(vi a, vi b, vi c, vi d) {
  const vi by_key = _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
  return _mm256_shuffle_epi8(by_key, _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0, 4, 8, 12,
                                                      1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
}
static inline vf where_minus_inf_zero(vf a) {
  return _mm256_andnot_ps(_mm256_cmp_ps(a, set1(-INFINITY), _CMP_EQ_OQ), a);
}
static inline vf choose_bits(vf a, vf b, uint32_t bits) {
  const vi lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  vi on = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), lane), lane);
  return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(on));
}
template <int kApart>
static inline vf swapped(vf a) {
  return kApart == 1 ? _mm256_permute_ps(a, 0xb1) : kApart == 2 ? _mm256_permute_ps(a, 0x4e) : _mm256_permute2f128_ps(a, a, 1);
}
static inline float sum_lanes(vf a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
static inline float max_lanes(vf a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
static inline int32_t max_lanes_of(vi a) {
  __m128i s = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  s = _mm_max_epi32(s, _mm_unpackhi_epi64(s, s));
  return _mm_cvtsi128_si32(_mm_max_epi32(s, _mm_shuffle_epi32(s, 1)));
}
static inline vi broadcast4(const int8_t* p) {
  int32_t four;
  memcpy(&four, p, 4);
  return set1i(four);
}
static inline vi dot4(vi acc, vi row, vi other) {
#ifdef TAMIS_VNNI
  // Through the intrinsic, GCC 12 copies accumulators. {vex}: the assembler's default is AVX-512's encoding.
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(row), "x"(other));
  return acc;
#else
  // Through intrinsics, GCC 12 copies every accumulator in each turn of the loop and runs out of registers.
  vi products;
  __asm__("vpmaddubsw %2, %3, %1\n\tvpmaddwd %4, %1, %1\n\tvpaddd %1, %0, %0"
          : "+x"(acc), "=&x"(products)
          : "x"(other), "x"(row), "x"(_mm256_set1_epi16(1)));
  return acc;
#endif
}
static inline vi add_bytes(vi acc, vi bytes) {
  return addi(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes), _mm256_set1_epi16(1)));
}
// Four bytes of a, b, c, d in turn, from each half.
static inline vi narrowed(vi a, vi b, vi c, vi d) {
  return _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
}
static inline vi bytes_in_lanes(vi a, vi b, vi c, vi d) {
  return _mm256_shuffle_epi8(narrowed(a, b, c, d), _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,
                                                                   0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
}
static inline void store_bytes(int8_t* p, vi a, vi b, vi c, vi d) {
  storei(p, _mm256_permutevar8x32_epi32(narrowed(a, b, c, d), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
}
#ifdef TAMIS_PAIRS
// Copies 64 bytes and negates the second of a pair where both have one sign. `forms` gets, for each of 16 groups of two
// pairs, which of them those are. Returns lanes that add up to the sum of the bytes before their negation.
constexpr int kFirstPairForm = 128, kSecondPairForm = 256;
static inline vi opposite(vi bytes, vi* flip) {
  const vi differ = _mm256_xor_si256(bytes, _mm256_slli_epi16(bytes, 8));
  *flip = _mm256_srai_epi16(_mm256_andnot_si256(differ, _mm256_set1_epi16((short)0x8000)), 7);
  return _mm256_sub_epi8(_mm256_xor_si256(bytes, *flip), *flip);
}
static inline vi oppose_pairs(const int8_t* from, int8_t* to, uint16_t* forms) {
  const vi a = loadi(from), b = loadi(from + 32), one = _mm256_set1_epi8(1);
  vi flip_a, flip_b;
  storei(to, opposite(a, &flip_a));
  storei(to + 32, opposite(b, &flip_b));
  // Words of 0xff00 saturate to bytes of 128.
  const vi marks = _mm256_permute4x64_epi64(_mm256_packs_epi16(flip_a, flip_b), 0xd8);
  storei(forms, _mm256_maddubs_epi16(marks, _mm256_set1_epi16(0x0201)));
  const vi pairs = _mm256_add_epi16(_mm256_maddubs_epi16(one, _mm256_and_si256(a, flip_a)),
                                    _mm256_maddubs_epi16(one, _mm256_and_si256(b, flip_b)));
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
static inline int32_t sum_lanes_of(vi a) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  s = _mm_add_epi32(s, _mm_unpackhi_epi64(s, s));
  return _mm_cvtsi128_si32(s) + _mm_extract_epi32(s, 1);
}
#endif
static inline vf load_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
static inline vf load_fp16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
static inline void store_bytes(int8_t* p, vi v) {
  __m128i w = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(w, w));
}
static inline void transpose_tile(const float* from, int64_t ld_from, float* to, int64_t ld_to) {
  __m256 t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    __m256 a = load(from + i * ld_from), b = load(from + (i + 1) * ld_from);
    t[i] = _mm256_unpacklo_ps(a, b);
    t[i + 1] = _mm256_unpackhi_ps(a, b);
  }
  for (int i = 0; i < 8; i += 4)
    for (int k = 0; k < 2; ++k) {
      u[i + 2 * k] = _mm256_shuffle_ps(t[i + k], t[i + 2 + k], 0x44);
      u[i + 2 * k + 1] = _mm256_shuffle_ps(t[i + k], t[i + 2 + k], 0xee);
    }
  for (int k = 0; k < 4; ++k) {
    store(to + k * ld_to, _mm256_permute2f128_ps(u[k], u[4 + k], 0x20));
    store(to + (4 + k) * ld_to, _mm256_permute2f128_ps(u[k], u[4 + k], 0x31));
  }
}
static inline vf one_where_reaches(vf a, vf b) {
  return _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ), set1(1.f));
}
