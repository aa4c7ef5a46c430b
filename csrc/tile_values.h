// Value and key as the first operands of tile products, made once a call.
//
// Value, in O[channel][row] += V[channel][key] . P[key][row], is bf16, [wide channels][64 keys] for each 64 keys, zero beyond
// the last key and channel. Key is copied only where its rows are not whole tiles of 64 bytes.
#pragma once
#include "prepare.h"
#include "softmax.h"

static inline __m256i to_bf16(vf x) { return (__m256i)_mm512_cvtneps_pbh(x); }
// The same in the upper halves of 32 bits, which makes them floats.
static inline vi turned_bits(vf x) { return shift_left(_mm512_cvtepu16_epi32(to_bf16(x)), 16); }
static inline vf as_float(vi x) { return _mm512_castsi512_ps(x); }

// From rows in any dtype. `rows` is [64][padded] fp32, `words` and `turned` [32 * 16] each.
static bool turn_values(const tamis_attend_args& a, int64_t b, int64_t h, int64_t j0, int64_t n, uint16_t* to,
                        float* rows, float* words, float* turned) {
  const int64_t padded = round_up(a.value_dim, 16);
  Ahead next = rows_ahead(a.key, b, h, j0 + 64, least(j0 + 128, a.geometry.kv_len), a.head_dim);
  for (int64_t j = 0; j < n; ++j) {
    next.a_row();
    memset(rows + j * padded + a.value_dim, 0, (padded - a.value_dim) * 4);
    load_row(a.value, b, h, j0 + j, a.value_dim, rows + j * padded);
  }
  memset(rows + n * padded, 0, (64 - n) * padded * 4);
  vf broken = set1(0.f);
  for (int64_t c = 0; c < padded; c += W) {
    for (int64_t j = 0; j < 64; j += 2) {
      const vi low = turned_bits(load(rows + j * padded + c)), high = turned_bits(load(rows + (j + 1) * padded + c));
      // Of the rounded ones, since rounding may have made infinities.
      broken = fma(as_float(low), set1(0.f), fma(as_float(high), set1(0.f), broken));
      storei(words + j / 2 * W, either(_mm512_srli_epi32(low, 16), high));
    }
    transpose(words, W, 32, W, turned, 32);
    memcpy(to + c * 64, turned, W * 64 * 2);
  }
  return sum_lanes(broken) == 0.f;
}
// From a pack: bytes and a scale for each channel.
static bool scale_values(const tamis_attend_args& a, int64_t at, int64_t wide, uint16_t* to) {
  const int8_t* bytes = a.packed.value + at * a.value_dim * 64;
  bool finite = true;
  for (int64_t c = 0; c < a.value_dim; ++c, bytes += 64) {
    const float scale = a.packed.value_scale[at * a.value_dim + c];
    finite = finite && fabsf(scale) * 127.f < 3.38e38f;  // bf16 ends a little below fp32
    for (int64_t j = 0; j < 64; j += W) {
      const vi wide_bytes = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(bytes + j)));
      _mm256_storeu_si256((__m256i*)(to + c * 64 + j), to_bf16(to_float(wide_bytes) * set1(scale)));
    }
  }
  memset(to + a.value_dim * 64, 0, (wide - a.value_dim) * 64 * 2);
  return finite;
}
// The largest absolute entry of some keys; NaN where one is not finite.
static float key_size(const tamis_attend_args& a, int64_t b, int64_t h, int64_t j0, int64_t n, float* row) {
  vf top = set1(0.f), broken = set1(0.f);
  const int64_t padded = round_up(a.head_dim, 16);
  memset(row, 0, padded * 4);
  for (int64_t j = 0; j < n; ++j) {
    load_row(a.key, b, h, j0 + j, a.head_dim, row);
    for (int64_t c = 0; c < padded; c += W) {
      const vf x = vabs(load(row + c));
      top = vmax(x, top);
      broken = fma(x, set1(0.f), broken);
    }
  }
  return sum_lanes(broken) == 0.f ? max_lanes(top) : NAN;
}
// 64 keys in rows of whole tiles.
static void copy_keys(const tamis_attend_args& a, const Prepared& p, int64_t b, int64_t h, int64_t part, int64_t n,
                      char* to) {
  memset(to, 0, 64 * p.key_bytes);
  const int64_t head = b * a.kv_heads + h;
  for (int64_t j = 0; j < n; ++j, to += p.key_bytes) {
    if (a.int8) {
      memcpy(to, a.packed.key + ((head * a.packed.capacity + part) * 64 + j) * a.packed.dim4, a.packed.dim4);
      continue;
    }
    const uint16_t* from = (const uint16_t*)row_of(a.key, b, h, part * 64 + j);
    for (int64_t c = 0; c < a.head_dim; ++c) memcpy(to + 2 * c, from + c * a.key.stride[3], 2);
  }
}

// Part n of value, and of key where its rows are not whole tiles. `rows` is [64][padded] fp32, and 64 W behind it.
static void prepare_tiles(const tamis_attend_args& a, const Prepared& p, int64_t n, int64_t padded, float* rows) {
  const int64_t head = n / p.parts, part = n % p.parts, b = head / a.kv_heads, h = head % a.kv_heads;
  const int64_t j0 = part * 64, keys = least(64, a.geometry.kv_len - j0);
  float *words = rows + 64 * padded, *turned = words + 32 * W;
  uint16_t* to = p.value + n * p.wide * 64;
  p.finite[n] = a.value.data ? turn_values(a, b, h, j0, keys, to, rows, words, turned)
                             : scale_values(a, head * a.packed.capacity + part, p.wide, to);
  if (p.key_top) p.key_top[n] = key_size(a, b, h, j0, keys, rows);
  if (p.key) copy_keys(a, p, b, h, part, keys, p.key + n * 64 * p.key_bytes);
}

// A hidden value that is NaN or infinite would leak through 0 * NaN. The tiles get a zero for it, and the rows that do
// see it get it afterwards: a row's output is the same whatever it does not see.
static const uint16_t* finite_values(const uint16_t* value, int64_t wide, uint16_t* copy) {
  const vi exponent = _mm512_set1_epi16(0x7f80);
  for (int64_t i = 0; i < wide * 64; i += 32) {
    const vi x = loadi(value + i);
    const __mmask32 broken = _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, exponent), exponent);
    storei(copy + i, _mm512_mask_mov_epi16(x, broken, _mm512_setzero_si512()));
  }
  return copy;
}
// Bit i of seen[j]: row i of the tile sees key j; bit r of `moving`: the rows of vector r take part.
static void add_broken_values(const uint16_t* value, int64_t value_dim, int64_t keys, const uint32_t* seen,
                              const uint16_t* p, uint32_t moving, float* o) {
  for (int64_t c = 0; c < value_dim; ++c)
    for (int64_t j = 0; j < keys; ++j) {
      const uint16_t v = value[c * 64 + j];
      if ((v & 0x7f80) != 0x7f80) continue;
      for (int i = 0; i < kTileRows; ++i)
        if (seen[j] >> i & 1 && moving >> (i / W) & 1)
          o[c * kTileRows + i] += bf16_to_float(p[(j / 2 * kTileRows + i) * 2 + j % 2]) * bf16_to_float(v);
    }
}
