// Sixteen floats a vector: AVX-512 F, BW, DQ, VL; VNNI where TAMIS_VNNI is set. See simd_generic.h.
#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

constexpr int W = 16;
typedef __m512 vf;
typedef __m512i vi;

constexpr int kQueryOffset = 128;
constexpr int kProbOffset = 0;
#ifdef TAMIS_VNNI
constexpr int kQkTile = 12, kQkRest = 8, kPvTile = 8;
#else
#define TAMIS_PAIRS 1  // bytes are multiplied by engine_pairs.h
constexpr int kQkTile = 8, kQkRest = 4, kPvTile = 8;
#endif
constexpr int kFullTile = 8;  // 16 accumulators hide the latency of two FMA pipes

static inline vf load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, vf v) { _mm512_storeu_ps(p, v); }
static inline vi loadi(const void* p) { return _mm512_loadu_si512(p); }
static inline void storei(void* p, vi v) { _mm512_storeu_si512(p, v); }
static inline vf set1(float x) { return _mm512_set1_ps(x); }
static inline vi set1i(int32_t x) { return _mm512_set1_epi32(x); }
static inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
static inline vf vabs(vf a) { return _mm512_abs_ps(a); }
static inline vf to_float(vi a) { return _mm512_cvtepi32_ps(a); }
static inline vi round_to_int(vf a) { return _mm512_cvtps_epi32(a); }
static inline vi shift_left(vi a, int n) { return _mm512_slli_epi32(a, n); }
static inline vi either(vi a, vi b) { return _mm512_or_si512(a, b); }
static inline vi bits_of(vf a) { return _mm512_castps_si512(a); }
static inline vf float_of_bits(vi a) { return _mm512_castsi512_ps(a); }
static inline vi maxi(vi a, vi b) { return _mm512_max_epi32(a, b); }
static inline vi addi(vi a, vi b) { return _mm512_add_epi32(a, b); }
static inline uint32_t above_bits(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
static inline bool any_above(vf a, vf b) { return above_bits(a, b) != 0; }
static inline bool any_differs(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ) != 0; }
// x - floor(x) in one instruction, and a scale by 2^floor(x) in another: -inf gives 0, NaN stays.
static inline vf fraction(vf x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
static inline vf times_power(vf a, vf x) { return _mm512_scalef_ps(a, x); }
static inline vf exp2_full(vf x) {
  vf f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  vf p = set1(1.867130117e-3f);
  p = fma(p, f, set1(9.017030192e-3f));
  p = fma(p, f, set1(5.579991323e-2f));
  p = fma(p, f, set1(2.401644501e-1f));
  p = fma(p, f, set1(6.931513118e-1f));
  p = fma(p, f, set1(1.f));
  return _mm512_scalef_ps(p, x);
}
static inline vf where_minus_inf_zero(vf a) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, set1(-INFINITY), _CMP_NEQ_UQ), a);
}
static inline vf choose_bits(vf a, vf b, uint32_t bits) { return _mm512_mask_mov_ps(b, (__mmask16)bits, a); }
static inline vf numbers_only(vf a) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, a, _CMP_ORD_Q), a); }
static inline vf load_some(const float* p, int64_t n) { return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
template <int kApart>
static inline vf swapped(vf a) {
  return kApart == 1   ? _mm512_permute_ps(a, 0xb1)
         : kApart == 2 ? _mm512_permute_ps(a, 0x4e)
         : kApart == 4 ? _mm512_shuffle_f32x4(a, a, 0xb1)
                       : _mm512_shuffle_f32x4(a, a, 0x4e);
}
static inline float sum_lanes(vf a) { return _mm512_reduce_add_ps(a); }
static inline float max_lanes(vf a) { return _mm512_reduce_max_ps(a); }
static inline int32_t max_lanes_of(vi a) { return _mm512_reduce_max_epi32(a); }
static inline vi broadcast4(const int8_t* p) {
  int32_t four;
  memcpy(&four, p, 4);
  return set1i(four);
}
static inline vi dot4(vi acc, vi row, vi other) {
#ifdef TAMIS_VNNI
  // Through the intrinsic, GCC 12 copies every accumulator twice in each turn of the loop.
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(row), "v"(other));
  return acc;
#else
  return _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(row, other), _mm512_set1_epi16(1)));
#endif
}
static inline vi add_bytes(vi acc, vi bytes) { return dot4(acc, _mm512_set1_epi8(1), bytes); }
// Four bytes of a, b, c, d in turn, from each quarter.
static inline vi narrowed(vi a, vi b, vi c, vi d) {
  return _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
}
static inline vi bytes_in_lanes(vi a, vi b, vi c, vi d) {
  const __m128i by_lane = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_shuffle_epi8(narrowed(a, b, c, d), _mm512_broadcast_i32x4(by_lane));
}
static inline void store_bytes(int8_t* p, vi a, vi b, vi c, vi d) {
  const vi in_turn = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  storei(p, _mm512_permutexvar_epi32(in_turn, narrowed(a, b, c, d)));
}
#ifdef TAMIS_PAIRS
// As in simd_avx2.h.
constexpr int kFirstPairForm = 128, kSecondPairForm = 256;
static inline vi oppose_pairs(const int8_t* from, int8_t* to, uint16_t* forms) {
  const vi a = loadi(from), differ = _mm512_xor_si512(a, _mm512_slli_epi16(a, 8));
  const vi marks = _mm512_andnot_si512(differ, _mm512_set1_epi16((short)0x8000)), flip = _mm512_srai_epi16(marks, 7);
  storei(to, _mm512_sub_epi8(_mm512_xor_si512(a, flip), flip));
  const vi offsets = _mm512_madd_epi16(_mm512_srli_epi16(marks, 15), set1i(kSecondPairForm << 16 | kFirstPairForm));
  _mm256_storeu_si256((__m256i*)forms, _mm512_cvtepi32_epi16(offsets));
  return dot4(_mm512_setzero_si512(), _mm512_set1_epi8(1), _mm512_and_si512(a, flip));
}
static inline int32_t sum_lanes_of(vi a) { return _mm512_reduce_add_epi32(a); }
#endif
#define TAMIS_WORDS 1
// Weights e^x in 16 bits, x a score less the largest of its row, for Int8Engine::weigh_block. With u = -x to the base
// of 2, rounded to 64ths, the whole part of u shifts what a table has for the rest, 32512 2^-rest; 32512 = 128 * 254. That
// is .55% off at most, where products of one row differ by as much as head_dim 256 allows .8%, and less by up to 1 that
// the shift cuts off; 1/128 of it, rounded, is the byte. u beyond 16 bits saturates, which gives 0.
struct Octave {
  alignas(64) uint16_t part[64];
  constexpr Octave() : part() {
    double power = 32512;
    for (int i = 0; i < 64; ++i, power /= 1.0108892860517005) part[i] = (uint16_t)(power + .5);  // 2^(1 / 64)
  }
};
static constexpr Octave kOctave;
constexpr float kFarFactor = 1.69e-4f;  // scores of 170 and more are possible then at head_dim 64
enum class Of {
  scores,        // some may be NaN, which the sum shows
  products,      // kSumBase + products of bytes: no difference is taken before u
  far_products,  // the same but for rows of large factors, whose rounding, in products that include kSumBase, shows in u
};
template <Of kOf>
struct Words {
  static constexpr float kUnit = 32512.f, kPerScore = 64 * 1.44269504088896f, kMagic = 8388608.f;  // 2^23
  vf largest, unit, start;  // start: kMagic + unit * largest, where nothing is subtracted before
  vi total;                 // of pairs of keys, in units of kUnit
  __mmask16 broken, far;

  // Multiplied by `factor`, what is given are scores.
  Words(vf top, vf factor) {
    largest = where_minus_inf_zero(top), unit = factor * set1(kPerScore), start = set1(kMagic);
    if (kOf != Of::scores) {
      // Rounding start would shift a row's u by up to half a unit. Since products are large, a change of `unit` by that
      // / largest, less than 2^-24, makes up for it, nearly so for the smaller ones; rounded up, so that the largest comes
      // to 0 or less.
      const vf near = fma(largest, unit, start), missing = _mm512_fnmadd_ps(largest, unit, near - start);
      far = _mm512_cmp_ps_mask(factor, set1(kFarFactor), _CMP_GE_OQ);
      unit = _mm512_mask3_fmadd_round_ps(missing, _mm512_rcp14_ps(largest), unit, (__mmask16)~far,
                                         _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
      start = _mm512_mask_mov_ps(near, far, start);
    }
    unit = vmax(unit, set1(1e-30f));  // -inf is infinitely far; also for the NaN of rows that see nothing
    total = _mm512_setzero_si512();
    broken = 0;
  }
  vi below(const float* at) {
    vf x = load(at);
    if (kOf == Of::scores) x = x - largest;
    if (kOf == Of::far_products) x = _mm512_mask_sub_ps(x, far, x, largest);
    if (kOf == Of::scores) broken |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_sub_epi32(bits_of(_mm512_fnmadd_ps(x, unit, start)), bits_of(set1(kMagic)));
  }
  vi weights(const float* first, const float* second) {
    const vi pairs = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
    const vi u = _mm512_shuffle_epi8(_mm512_packus_epi32(below(first), below(second)), pairs);
    const vi part = _mm512_permutex2var_epi16(loadi(kOctave.part), u, loadi(kOctave.part + 32));  // by u's low 6 bits
    const vi w = _mm512_srlv_epi16(part, _mm512_srli_epi16(u, 6));
#ifdef TAMIS_VNNI
    total = _mm512_dpwssd_epi32(total, w, _mm512_set1_epi16(1));
#else
    total = _mm512_add_epi32(total, _mm512_madd_epi16(w, _mm512_set1_epi16(1)));
#endif
    return _mm512_mulhrs_epi16(w, _mm512_set1_epi16(256));
  }
  // The weights of four keys, as bytes from 0 to 254 in each lane; their scores are so many floats apart.
  vi bytes(const float* at, int64_t apart) {
    const vi even = weights(at, at + 2 * apart);
    return either(even, _mm512_slli_epi16(weights(at + apart, at + 3 * apart), 8));
  }
  vf sum() const { return _mm512_mask_mov_ps(to_float(total) * set1(1.f / kUnit), broken, set1(NAN)); }
};
static inline bool are_tame_factors(vf factor) {
  return _mm512_cmp_ps_mask(factor, set1(kFarFactor), _CMP_LT_OQ) == 0xffff;
}
constexpr bool kRawScores = true;
static inline vf load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
static inline vf load_fp16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
static inline void store_bytes(int8_t* p, vi v) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(v)); }
static inline void transpose_tile(const float* from, int64_t ld_from, float* to, int64_t ld_to) {
  __m512 t[16];
  __m512d u[16];
  for (int i = 0; i < 16; i += 2) {
    __m512 a = load(from + i * ld_from), b = load(from + (i + 1) * ld_from);
    t[i] = _mm512_unpacklo_ps(a, b);
    t[i + 1] = _mm512_unpackhi_ps(a, b);
  }
  for (int i = 0; i < 16; i += 4)
    for (int k = 0; k < 2; ++k) {
      __m512d a = _mm512_castps_pd(t[i + k]), b = _mm512_castps_pd(t[i + 2 + k]);
      u[i + 2 * k] = _mm512_unpacklo_pd(a, b);
      u[i + 2 * k + 1] = _mm512_unpackhi_pd(a, b);
    }
  // u[4 i + k] now holds, in its 128-bit lane n, column 4 n + k of rows 4 i .. 4 i + 3.
  for (int k = 0; k < 4; ++k) {
    __m512 a = _mm512_castpd_ps(u[k]), b = _mm512_castpd_ps(u[4 + k]);
    __m512 c = _mm512_castpd_ps(u[8 + k]), d = _mm512_castpd_ps(u[12 + k]);
    __m512 even_ab = _mm512_shuffle_f32x4(a, b, 0x88), even_cd = _mm512_shuffle_f32x4(c, d, 0x88);
    __m512 odd_ab = _mm512_shuffle_f32x4(a, b, 0xdd), odd_cd = _mm512_shuffle_f32x4(c, d, 0xdd);
    store(to + k * ld_to, _mm512_shuffle_f32x4(even_ab, even_cd, 0x88));
    store(to + (4 + k) * ld_to, _mm512_shuffle_f32x4(odd_ab, odd_cd, 0x88));
    store(to + (8 + k) * ld_to, _mm512_shuffle_f32x4(even_ab, even_cd, 0xdd));
    store(to + (12 + k) * ld_to, _mm512_shuffle_f32x4(odd_ab, odd_cd, 0xdd));
  }
}
static inline vf one_where_reaches(vf a, vf b) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), set1(1.f));
}
