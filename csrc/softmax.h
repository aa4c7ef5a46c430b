// One tile of scores, [keys][32 rows], made ready for the exponential: logit options, then visibility.
// Scores are natural logarithms; base 2 appears only where exponentials are taken.
#pragma once
#include "geometry.h"
#include "rows.h"

constexpr int kTileRows = 32;
constexpr int kGroupRows = 16;  // stage 2 skips or keeps this many rows together, on every target
constexpr int64_t kMostRows = 128;  // of a query block
constexpr int kKeys = TAMIS_PACK_BLOCK;
constexpr float kLog2e = 1.44269504088896f, kLn2 = .69314718055995f;

// Everything about one query block that the inner loops need.
struct Item {
  int64_t b, h, kv_head, qb, i0, rows;
};

// e^x for x <= 0. Differences are taken before the change of base, so large scores keep their precision.
static inline vf exp_of(vf x) { return exp2_full(x * set1(kLog2e)); }

// cap * tanh(s / cap). tanh x = (1 - t) / (1 + t) with t = e^(-2 |x|), signed; below 1/4, where the difference
// would cancel, the series x - x^3/3 + 2x^5/15 - 17x^7/315 + 62x^9/2835.
static void apply_softcap(float* s, int64_t keys, float cap) {
  vf inv = set1(1.f / cap), out = set1(cap), one = set1(1.f);
  for (int64_t i = 0; i < keys * kTileRows; i += W) {
    vf x = load(s + i) * inv;
    vf t = exp_of(vabs(x) * set1(-2.f));
    vf sign = vmax(set1(-1.f), vmin(one, x * set1(1e30f)));
    vf small = vmax(set1(-.25f), vmin(set1(.25f), x)), square = small * small;
    vf series = fma(square, set1(62.f / 2835), set1(-17.f / 315));
    series = fma(series, square, set1(2.f / 15));
    series = fma(series, square, set1(-1.f / 3));
    series = fma(series * square, small, small);
    // A NaN fails the comparison and keeps the large branch, which keeps it a NaN.
    store(s + i, choose_bits(series, (one - t) / (one + t) * sign, above_bits(set1(.25f), vabs(x))) * out);
  }
}

// Whether scores stay what the products make of them, but for those that are hidden: an added mask changes them, and may
// add NaN to single ones, and a cap leaves NaN beside numbers where scores of a row were infinite.
static inline bool keeps_scores(const tamis_attend_args& a) {
  return !(a.softcap > 0) && (!a.attn_mask.data || a.attn_mask.dtype == TAMIS_BOOL);
}

// Adds an additive mask, and clears the bits of the rows that a mask hides.
static void apply_mask(const tamis_attend_args& a, const Item& it, int64_t row0, int64_t rows, int64_t j0,
                       int64_t keys, float* s, uint32_t* seen) {
  const tamis_tensor& m = a.attn_mask;
  for (int64_t r = 0; r < rows; ++r) {
    const char* row = row_of(m, it.b, it.h, row0 + r);
    for (int64_t j = 0; j < keys; ++j) {
      int64_t at = (j0 + j) * m.stride[3];
      if (m.dtype == TAMIS_BOOL) {
        if (!row[at]) seen[j] &= ~(1u << r);
        continue;
      }
      float add = load_scalar(row, at, m.dtype);
      if (add == -INFINITY) seen[j] &= ~(1u << r);
      // The most negative finite mask means "almost never", not "never": the sum stays finite.
      float sum = s[j * kTileRows + r] + add;
      s[j * kTileRows + r] = sum == -INFINITY ? -3.4028235e38f : sum;
    }
  }
}

static void apply_visibility(float* s, int64_t keys, const uint32_t* seen) {
  for (int64_t j = 0; j < keys; ++j) {
    if (seen[j] == ~0u) continue;
    for (int r = 0; r < kTileRows; r += W)
      store(s + j * kTileRows + r, choose_bits(load(s + j * kTileRows + r), set1(-INFINITY), seen[j] >> r));
  }
}

// All of the above where it applies. Returns the bits of rows that see at least one key.
static uint32_t finish_scores(const tamis_attend_args& a, const Item& it, Sight sight, int64_t row0, int64_t rows,
                              int64_t j0, int64_t keys, float* s, uint32_t* seen) {
  if (a.softcap > 0) apply_softcap(s, keys, a.softcap);
  for (int64_t j = 0; j < keys; ++j)
    seen[j] = sight == Sight::all ? ~0u : rows_seeing(a.geometry, it.b, row0, rows, j0 + j);
  if (a.attn_mask.data) apply_mask(a, it, row0, rows, j0, keys, s, seen);
  apply_visibility(s, keys, seen);
  uint32_t any = 0;
  for (int64_t j = 0; j < keys; ++j) any |= seen[j];
  return any;
}

static inline vf column_max(const float* s, int64_t keys, int r) {
  vf m = set1(-INFINITY);
  for (int64_t j = 0; j < keys; ++j) m = vmax(load(s + j * kTileRows + r * W), m);
  return m;
}
