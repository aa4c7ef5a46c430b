// Mixing of channels before they are rounded to 8 bits.
//
// Query and key are both multiplied by H / sqrt(n) for every n neighbours, H the Walsh-Hadamard matrix, which is orthogonal:
// their products stay. A channel that is far larger than the others is spread over n, and the step of 8 bits, which follows
// the largest entry, is smaller for all. src/tamis/mixing.py has the same in Python, and the sources.
#pragma once
#include "rows.h"

// 1 where the lane is the first of two that are 1, 2, 4, 8 apart, -1 where it is the second.
struct Signs {
  alignas(64) float of[4][16];
  constexpr Signs() : of() {
    for (int power = 0; power < 4; ++power)
      for (int lane = 0; lane < 16; ++lane) of[power][lane] = lane >> power & 1 ? -1.f : 1.f;
  }
};
static constexpr Signs kSigns;

// Sums of lanes that are so far apart, in the place of the first, and differences.
template <int kPower>
static inline vf add_and_subtract(vf x) {
  return fma(x, load(kSigns.of[kPower]), swapped<1 << kPower>(x));
}
static inline void add_and_subtract(vf& a, vf& b) {
  const vf sum = a + b;
  b = a - b;
  a = sum;
}

// Of a packed key's scale and a row's: what mix_row leaves out.
static inline float root_of_mixed(const tamis_packed& p) { return sqrtf((float)p.mixed); }

// Every `mixed` neighbours of a row times H / mixed, which overflows nowhere; returns lanes of its largest absolute entries.
// The row is `padded` long, a multiple of 16, and zero behind its channels, of which `mixed` divides the number.
static inline vf mix_row(float* x, int64_t padded, int64_t mixed) {
  const vf share = set1(1.f / (float)mixed);
  vf top = set1(0.f);
  for (int64_t c = 0; c < padded; c += W) {
    vf y = load(x + c) * share;
    if (mixed > 1) y = add_and_subtract<0>(y);
    if (mixed > 2) y = add_and_subtract<1>(y);
    if constexpr (W > 4)
      if (mixed > 4) y = add_and_subtract<2>(y);
    if constexpr (W > 8)
      if (mixed > 8) y = add_and_subtract<3>(y);
    store(x + c, y);
    top = vmax(vabs(y), top);
  }
  if (mixed <= W) return top;
  top = set1(0.f);
  int64_t apart = W;
  for (; apart * 4 <= mixed; apart *= 4)
    for (int64_t from = 0; from < padded; from += 4 * apart)
      for (float *at = x + from, *end = at + apart; at < end; at += W) {
        vf y[4] = {load(at), load(at + apart), load(at + 2 * apart), load(at + 3 * apart)};
        add_and_subtract(y[0], y[1]), add_and_subtract(y[2], y[3]);
        add_and_subtract(y[0], y[2]), add_and_subtract(y[1], y[3]);
        for (int i = 0; i < 4; ++i) store(at + i * apart, y[i]);
        if (apart * 4 == mixed)
          for (int i = 0; i < 4; ++i) top = vmax(vabs(y[i]), top);
      }
  if (apart < mixed)
    for (int64_t from = 0; from < padded; from += mixed)
      for (float *at = x + from, *end = at + apart; at < end; at += W) {
        vf a = load(at), b = load(at + apart);
        add_and_subtract(a, b);
        store(at, a), store(at + apart, b);
        top = vmax(vabs(a), vmax(vabs(b), top));
      }
  return top;
}
