// Mixing of channels before they are rounded to 8 bits.
//
// Query and key are both multiplied by D H / sqrt(n) for every n neighbours, H the Walsh-Hadamard matrix, D a diagonal
// of signs. That is orthogonal: their products stay. A channel that is far larger than the others is spread over n, and
// the step of 8 bits, which follows the largest entry, is smaller for all; the signs keep what channels have in common
// from being gathered in one. src/tamis/mixing.py has the same in Python, and the sources.
#pragma once
#include "rows.h"

// 1 where the lane is the first of two that are 1, 2, 4, 8 apart, -1 where it is the second.
struct LaneSigns {
  alignas(64) float of[4][16];
  constexpr LaneSigns() : of() {
    for (int power = 0; power < 4; ++power)
      for (int lane = 0; lane < 16; ++lane) of[power][lane] = lane >> power & 1 ? -1.f : 1.f;
  }
};
static constexpr LaneSigns kLaneSigns;

constexpr int64_t kMostMixed = 256;
// 256, 64, 16, 8, 4, 2 or 1, the largest that divides `dim`: the signs do their work best with powers of four.
static inline int64_t mixed_of(int64_t dim) {
  const int64_t most = (dim & -dim) < kMostMixed ? dim & -dim : kMostMixed;
  return most == 32 || most == 128 ? most / 2 : most;
}
// D / n: the signs of Rudin and Shapiro. With n = 1 there are none.
struct Shares {
  alignas(64) float of[9][kMostMixed];
  constexpr Shares() : of() {
    for (int power = 0; power < 9; ++power)
      for (int channel = 0; channel < kMostMixed; ++channel) {
        int pairs = 0;
        for (int digit = 0; digit < 8; ++digit) pairs += (channel & channel >> 1) >> digit & 1;
        of[power][channel] = (power && pairs % 2 ? -1.f : 1.f) / (float)(1 << power);
      }
  }
};
static constexpr Shares kShares;

// Sums of lanes that are so far apart, in the place of the first, and differences.
template <int kPower>
static inline vf add_and_subtract(vf x) {
  return fma(x, load(kLaneSigns.of[kPower]), swapped<1 << kPower>(x));
}
static inline void add_and_subtract(vf& a, vf& b) {
  const vf sum = a + b;
  b = a - b;
  a = sum;
}

// Of a packed key's scale and a row's: what mix_row leaves out.
static inline float root_of_mixed(const tamis_packed& p) { return sqrtf((float)p.mixed); }

// The first steps: of neighbours within a vector.
static inline vf mix_lanes(vf x, int64_t mixed) {
  if (mixed > 1) x = add_and_subtract<0>(x);
  if (mixed > 2) x = add_and_subtract<1>(x);
  if constexpr (W > 4)
    if (mixed > 4) x = add_and_subtract<2>(x);
  if constexpr (W > 8)
    if (mixed > 8) x = add_and_subtract<3>(x);
  return x;
}
// Two more steps, of four vectors.
static inline void mix_four(vf (&x)[4]) {
  add_and_subtract(x[0], x[1]), add_and_subtract(x[2], x[3]);
  add_and_subtract(x[0], x[2]), add_and_subtract(x[1], x[3]);
}

// Every `mixed` neighbours of a row less `mean`, times D H / mixed, which overflows nowhere; returns lanes of the bits of its
// largest entries. All three are `padded` long, a multiple of 16; the row is zero behind its channels, of which `mixed`
// divides the number. `to` may be the row itself.
static inline vi mix_row(const float* row, const float* mean, float* to, int64_t padded, int64_t mixed) {
  const float* shares = kShares.of[__builtin_ctzll((unsigned long long)mixed)];
  vi tops[4] = {set1i(0), set1i(0), set1i(0), set1i(0)};
  const auto shared = [=](int64_t c) {
    return mix_lanes((load(row + c) - load(mean + c)) * load(shares + c % kMostMixed), mixed);
  };
  int64_t apart = W;
  if (mixed < 4 * W) {
    for (int64_t c = 0; c < padded; c += W) {
      const vf y = shared(c);
      store(to + c, y);
      tops[0] = larger_bits(tops[0], y);
    }
  } else {
    apart = 4 * W;
    for (int64_t c = 0; c < padded; c += 4 * W) {
      vf y[4];
      for (int i = 0; i < 4; ++i) y[i] = shared(c + i * W);
      mix_four(y);
      for (int i = 0; i < 4; ++i) store(to + c + i * W, y[i]), tops[i] = larger_bits(tops[i], y[i]);
    }
  }
  for (; apart * 4 <= mixed; apart *= 4) {
    for (vi& top : tops) top = set1i(0);
    for (int64_t from = 0; from < padded; from += 4 * apart)
      for (float *at = to + from, *end = at + apart; at < end; at += W) {
        vf y[4];
        for (int i = 0; i < 4; ++i) y[i] = load(at + i * apart);
        mix_four(y);
        for (int i = 0; i < 4; ++i) store(at + i * apart, y[i]), tops[i] = larger_bits(tops[i], y[i]);
      }
  }
  for (; apart < mixed; apart *= 2) {
    for (vi& top : tops) top = set1i(0);
    for (int64_t from = 0; from < padded; from += 2 * apart)
      for (float *at = to + from, *end = at + apart; at < end; at += W) {
        vf a = load(at), b = load(at + apart);
        add_and_subtract(a, b);
        store(at, a), store(at + apart, b);
        tops[0] = larger_bits(tops[0], a), tops[1] = larger_bits(tops[1], b);
      }
  }
  return maxi(maxi(tops[0], tops[1]), maxi(tops[2], tops[3]));
}

// One step, or with four two, of columns: each is one channel of W rows. `shares` only before the first step, `top` only in
// the last: of each row.
template <int kColumns>
static inline void mix_columns_once(float* x, int64_t dim, int64_t apart, const float* shares, vi* top) {
  for (int64_t from = 0; from < dim; from += kColumns * apart)
    for (int64_t c = from; c < from + apart; ++c) {
      vf y[kColumns];
      for (int i = 0; i < kColumns; ++i) y[i] = load(x + (c + i * apart) * W);
      if (shares)
        for (int i = 0; i < kColumns; ++i) y[i] = y[i] * set1(shares[(c + i * apart) % kMostMixed]);
      if constexpr (kColumns == 4) mix_four(y);
      if constexpr (kColumns == 2) add_and_subtract(y[0], y[1]);
      for (int i = 0; i < kColumns; ++i) store(x + (c + i * apart) * W, y[i]);
      if (top)
        for (int i = 0; i < kColumns; ++i) top[i] = larger_bits(top[i], y[i]);
    }
}
// The same of W rows at once, without a mean, whose channels are columns. Returns the bits of each row's largest entry.
static inline vi mix_columns(float* x, int64_t dim, int64_t mixed) {
  const float* shares = kShares.of[__builtin_ctzll((unsigned long long)mixed)];
  vi tops[4] = {set1i(0), set1i(0), set1i(0), set1i(0)};
  if (mixed == 1) mix_columns_once<1>(x, dim, 1, nullptr, tops);
  for (int64_t apart = 1; apart < mixed; shares = nullptr) {
    const bool two = apart * 4 <= mixed, last = apart * (two ? 4 : 2) == mixed;
    if (two)
      mix_columns_once<4>(x, dim, apart, shares, last ? tops : nullptr), apart *= 4;
    else
      mix_columns_once<2>(x, dim, apart, shares, last ? tops : nullptr), apart *= 2;
  }
  return maxi(maxi(tops[0], tops[1]), maxi(tops[2], tops[3]));
}

// Rows so small that 127 / top would overflow, or nearly, are multiplied with kEnlarged.
constexpr float kTinyTop = 1e-36f, kEnlarged = 0x1p40f;
// Returns the factor.
static inline float enlarge_if_tiny(float* rows, int64_t count, float top) {
  if (!(top < kTinyTop && top > 0.f)) return 1.f;
  for (int64_t i = 0; i < count; ++i) rows[i] *= kEnlarged;
  return kEnlarged;
}
