// Value as the first operand of tile products, O[channel][row] += V[channel][key] . P[key][row]: bf16,
// [wide channels][64 keys] for each 64 keys, zero beyond the last key and channel.
#pragma once
#include "prepare.h"

// Above this the sum of a product might leave fp32 and turn into a NaN whose sign is lost.
constexpr float kTame = 1e15f;

static inline __m256i to_bf16(vf x) { return (__m256i)_mm512_cvtneps_pbh(x); }

// From rows in any dtype. `rows` is [64][padded] fp32, `words` and `turned` [32 * 16] each.
static bool turn_values(const tamis_attend_args& a, int64_t b, int64_t h, int64_t j0, int64_t n, uint16_t* to,
                        float* rows, float* words, float* turned) {
  const int64_t padded = round_up(a.value_dim, 16);
  for (int64_t j = 0; j < n; ++j) {
    memset(rows + j * padded + a.value_dim, 0, (padded - a.value_dim) * 4);
    load_row(a.value, b, h, j0 + j, a.value_dim, rows + j * padded);
  }
  memset(rows + n * padded, 0, (64 - n) * padded * 4);
  vf broken = set1(0.f);
  for (int64_t c = 0; c < padded; c += W) {
    for (int64_t j = 0; j < 64; j += 2) {
      const vf x = load(rows + j * padded + c), y = load(rows + (j + 1) * padded + c);
      broken = fma(x, set1(0.f), fma(y, set1(0.f), broken));
      const vi low = _mm512_cvtepu16_epi32(to_bf16(x)), high = _mm512_cvtepu16_epi32(to_bf16(y));
      storei(words + j / 2 * W, either(low, shift_left(high, 16)));
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
    finite = finite && scale * 0.f == 0.f;
    for (int64_t j = 0; j < 64; j += W) {
      const vi wide_bytes = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(bytes + j)));
      _mm256_storeu_si256((__m256i*)(to + c * 64 + j), to_bf16(to_float(wide_bytes) * set1(scale)));
    }
  }
  memset(to + a.value_dim * 64, 0, (wide - a.value_dim) * 64 * 2);
  return finite;
}
static bool tame_keys(const tamis_attend_args& a, int64_t b, int64_t h, int64_t j0, int64_t n, float* row) {
  vf bad = set1(0.f);
  const int64_t padded = round_up(a.head_dim, 16);
  memset(row, 0, padded * 4);
  for (int64_t j = 0; j < n; ++j) {
    load_row(a.key, b, h, j0 + j, a.head_dim, row);
    for (int64_t c = 0; c < padded; c += W)
      bad = bad + choose_bits(set1(0.f), set1(1.f), above_bits(set1(kTame), vabs(load(row + c))));
  }
  return sum_lanes(bad) == 0.f;
}

static int prepare_tiles(const tamis_attend_args& a, const Prepared& p) {
  const int64_t padded = round_up(greatest(a.value_dim, a.head_dim), 16);
  const int64_t entries = a.batch * a.kv_heads * a.geometry.kv_len * (a.value_dim + (p.tame ? a.head_dim : 0));
  int error = TAMIS_OK;
#pragma omp parallel num_threads(threads_for(a, 2 * entries))
  {
    float* rows = (float*)aligned_alloc(64, round_up((64 * padded + 2 * 32 * W) * 4, 64));
    if (!rows) {
#pragma omp atomic write
      error = TAMIS_NO_MEMORY;
    }
    float *words = rows + 64 * padded, *turned = words + 32 * W;
#pragma omp for schedule(static)
    for (int64_t n = 0; n < a.batch * a.kv_heads * p.parts; ++n) {
      if (!rows || !p.used[n]) continue;
      const int64_t head = n / p.parts, part = n % p.parts, b = head / a.kv_heads, h = head % a.kv_heads;
      const int64_t j0 = part * 64, keys = least(64, a.geometry.kv_len - j0);
      uint16_t* to = p.value + n * p.wide * 64;
      p.finite[n] = a.value.data ? turn_values(a, b, h, j0, keys, to, rows, words, turned)
                                 : scale_values(a, head * a.packed.capacity + part, p.wide, to);
      if (p.tame) p.tame[n] = tame_keys(a, b, h, j0, keys, rows);
    }
    free(rows);
  }
  return error;
}
