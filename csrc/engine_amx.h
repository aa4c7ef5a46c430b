// precision="int8" on AMX: the formulas and layouts of engine_int8.h, with tiles for both products.
//
// A tile product is C[16][16] += A[16][64 bytes] . B[16][16][4 bytes]. Keys (or value channels) are the rows
// of A and query rows the columns of B, so scores and output come out transposed as everywhere else.
//
// What was found by measuring, and shaped this file:
// - For some 700 cycles after any tile instruction only one of two ports takes 512-bit floating point (1,024 FMAs take
//   360 cycles longer after one tilezero), and coming back to tiles after a longer pause costs as much again. So
//   vector work is counted in floating-point instructions: bytes are moved by integer ones, and O has three a vector.
// - One row tile at a time: its scores, weights and O must stay in the first-level cache beside the streaming blocks.
//   Several row tiles or key blocks a step, which would let the ports recover, spill and are slower.
// Exponentials have base 2 here, and so have the maxima.
#pragma once
#include "engine_int8.h"
#include "state.h"
#include "tiles.h"

struct AmxEngine {
  static constexpr int64_t kRowsAtOnce = kTileRows;
  static constexpr int kVecs = kTileRows / W;
  static_assert(kVecs == 2, "the tile code names both");

  // A key block whose softmax is done and whose PV product is not.
  struct Pending {
    int64_t block;
    uint32_t active, plain;  // bit r: the rows of vector r take part, and with a share of 1
    alignas(64) float keep[kTileRows], share[kTileRows];  // factors of O and of the product that is added to it
  };

  const tamis_attend_args& a;
  const int64_t dim, wide;  // head_dim in whole tiles of 64, value_dim in whole tiles of 16
  int32_t* s;               // [64][32]; floats where a block needs care
  int32_t* products;        // [2][16][32]: P . V of 16 channels and the 16 before
  int8_t* q;                // [dim / 4][32][4]
  uint8_t* p;               // [16][32][4]
  float* step;              // [wide]: what one step of a weight is worth, so that O has the size of values
  int8_t *key_copy, *value_copy, *row_bytes;  // a block in whole tiles where it is not; quantised rows
  TileScope scope;
  Pending pending;
  alignas(64) float reference[kTileRows];  // what O is relative to
  alignas(64) float row_scale[kTileRows], shift[kTileRows];

  static int64_t scratch_bytes(const tamis_attend_args& a) {
    const int64_t dim = round_up(a.head_dim, 64), wide = round_up(a.value_dim, 16);
    return kKeys * kTileRows * 5 + (2 * 16 * kTileRows + wide) * 4 + 2 * kTileRows * dim + kKeys * (dim + wide) + 64;
  }
  AmxEngine(const tamis_attend_args& args, char* scratch)
      : a(args), dim(round_up(args.head_dim, 64)), wide(round_up(args.value_dim, 16)) {
    s = (int32_t*)scratch;
    products = s + kKeys * kTileRows;
    step = (float*)(products + 2 * 16 * kTileRows);
    q = (int8_t*)(step + wide);
    p = (uint8_t*)q + kTileRows * dim;
    key_copy = (int8_t*)p + kTileRows * kKeys;
    value_copy = key_copy + kKeys * dim;
    row_bytes = value_copy + kKeys * wide;
    if (scratch) memset(key_copy, 0, kKeys * (dim + wide));
  }

  void set_queries(const Item& it, int64_t, float* rows, int64_t ld, int64_t) {
    quantise_tile(a, it, rows, ld, dim, row_bytes, (uint8_t*)q, row_scale, shift);
    for (float& x : reference) x = -INFINITY;
    pending.active = pending.plain = 0;
  }

  // S = K . Q for 16 keys from j. Work alternates between two sets of tiles, so that one set's sums are stored while
  // the other's are made.
  void tile_scores(const int8_t* key, int64_t ld, int64_t j) const {
    const int64_t row = kTileRows * 4;
    int32_t* to = s + j * kTileRows;
    key += j * ld;
    if (j & 16) {
      TILE_ZERO(2);
      TILE_ZERO(3);
    } else {
      TILE_ZERO(0);
      TILE_ZERO(1);
    }
    for (int64_t c = 0; c < dim; c += 64) {
      if (dim > 64 || j == 0) {  // else they are still there
        TILE_LOAD(6, q + c * kTileRows, row);
        TILE_LOAD(7, q + c * kTileRows + 64, row);
      }
      if (j & 16) {
        TILE_LOAD(5, key + c, ld);
        TILE_DOT_SSD(2, 5, 6);
        TILE_DOT_SSD(3, 5, 7);
      } else {
        TILE_LOAD(4, key + c, ld);
        TILE_DOT_SSD(0, 4, 6);
        TILE_DOT_SSD(1, 4, 7);
      }
    }
    if (j & 16) {
      TILE_STORE(2, to, row);
      TILE_STORE(3, to + W, row);
    } else {
      TILE_STORE(0, to, row);
      TILE_STORE(1, to + W, row);
    }
  }
  // P . V for 16 channels from c.
  void tile_values(const int8_t* value, int64_t c) const {
    const int64_t row = kTileRows * 4;
    int32_t* to = products + (c & 16) * kTileRows;
    const bool first = pending.active & 1, second = pending.active & 2;
    if (c == 0) {
      TILE_LOAD(6, p, row);
      TILE_LOAD(7, p + 64, row);
    }
    if (c & 16) {
      TILE_LOAD(5, value + c * kKeys, kKeys);
      if (first) {
        TILE_ZERO(2);
        TILE_DOT_SUD(2, 5, 6);
      }
      if (second) {
        TILE_ZERO(3);
        TILE_DOT_SUD(3, 5, 7);
      }
      if (first) TILE_STORE(2, to, row);
      if (second) TILE_STORE(3, to + W, row);
    } else {
      TILE_LOAD(4, value + c * kKeys, kKeys);
      if (first) {
        TILE_ZERO(0);
        TILE_DOT_SUD(0, 4, 6);
      }
      if (second) {
        TILE_ZERO(1);
        TILE_DOT_SUD(1, 4, 7);
      }
      if (first) TILE_STORE(0, to, row);
      if (second) TILE_STORE(1, to + W, row);
    }
  }
  // O = O keep + P . V, for 16 channels from c.
  void update(int64_t c, float* o) const {
    const int64_t n = least(16, a.value_dim - c);
    o += c * kTileRows;
    const int32_t* sums = products + (c & 16) * kTileRows;
    const uint32_t both = (1u << kVecs) - 1;
    if (pending.active == both && pending.plain == both) {
      const vf k0 = load(pending.keep), k1 = load(pending.keep + W);
      for (int64_t i = 0; i < n; ++i, o += kTileRows, sums += kTileRows) {
        const vf by = set1(step[c + i]);
        store(o, fma(to_float(loadi(sums)), by, load(o) * k0));
        store(o + W, fma(to_float(loadi(sums + W)), by, load(o + W) * k1));
      }
      return;
    }
    for (int r = 0; r < kVecs; ++r) {
      if (!(pending.active >> r & 1)) continue;
      const vf keep = load(pending.keep + r * W), share = load(pending.share + r * W);
      float* at = o + r * W;
      const int32_t* from = sums + r * W;
      if (pending.plain >> r & 1)
        for (int64_t i = 0; i < n; ++i, at += kTileRows, from += kTileRows)
          store(at, fma(to_float(loadi(from)), set1(step[c + i]), load(at) * keep));
      else
        for (int64_t i = 0; i < n; ++i, at += kTileRows, from += kTileRows)
          store(at, fma(to_float(loadi(from)) * share, set1(step[c + i]), load(at) * keep));
    }
  }
  void finish_pending(State& st) {
    if (!pending.active) return;
    const float* scale = a.packed.value_scale + pending.block * a.value_dim;
    const int8_t* value = a.packed.value + pending.block * kKeys * a.value_dim;
    if (a.value_dim % 16) value = (int8_t*)memcpy(value_copy, value, kKeys * a.value_dim);
    for (int64_t c = 0; c < wide; c += 16)
      store(step + c, load_some(scale + c, least(16, a.value_dim - c)) * set1(1.f / kProbLevels));
    for (int64_t c = 0; c < wide; c += 16) {
      tile_values(value, c);
      if (c) update(c - 16, st.o);
    }
    update(wide - 16, st.o);
    pending.active = pending.plain = 0;
  }

  // The 64 keys from j0. Returns the rows whose PV product will be done.
  int64_t visit_part(const Item& it, State& st, Sight sight, int64_t j0, int64_t keys) {
    finish_pending(st);
    if (sight == Sight::none) return it.rows;
    pending.block = (it.b * a.kv_heads + it.kv_head) * a.packed.capacity + j0 / kKeys;
    const int8_t* key = a.packed.key + pending.block * kKeys * a.packed.dim4;
    int64_t ld = a.packed.dim4;
    if (ld % 64) {
      for (int64_t j = 0; j < kKeys; ++j) memcpy(key_copy + j * dim, key + j * ld, ld);
      key = key_copy, ld = dim;
    }
    for (int64_t j = 0; j < kKeys; j += 16) tile_scores(key, ld, j);
    return softmax(it, st, sight, j0, keys);
  }
  void finish(State& st) {
    finish_pending(st);
    for (int r = 0; r < kVecs; ++r) {
      const vf top = load(st.m + r * W);
      const vf left = exp2_full(load(reference + r * W) - where_minus_inf_zero(top));
      float* o = st.o + r * W;
      for (int64_t c = 0; c < a.value_dim; ++c, o += kTileRows) store(o, load(o) * left);
      // Back to natural logarithms, in which the lowest score was the lowest float too.
      const vf lowest = set1(-3.4028235e38f);
      const uint32_t at_lowest = above_bits(top, set1(-INFINITY)) & ~above_bits(top, lowest);
      store(st.m + r * W, choose_bits(lowest, top * set1(1.f / kLog2e), at_lowest));
      store(st.l + r * W, load(st.l + r * W) * set1(1.f / kProbLevels));
    }
  }

  // Scores to probabilities in bytes, and what is pending of the block. Returns as visit_part.
  int64_t softmax(const Item& it, State& st, Sight sight, int64_t j0, int64_t keys) {
    const float key_scale = a.packed.key_scale[pending.block];
    const float threshold = a.pv_threshold ? a.pv_threshold[it.h] * kLog2e : 0.f;
    const bool plain = sight == Sight::all && !a.attn_mask.data && !(a.softcap > 0);
    bool whole = plain && keys == kKeys && a.scale >= 0;
    vf factor[kVecs], block_top[kVecs], base[kVecs], share[kVecs];
    vi top_score[kVecs];
    for (int r = 0; r < kVecs; ++r) {
      factor[r] = load(row_scale + r * W) * set1(key_scale * kLog2e);
      whole = whole && !any_differs(factor[r], factor[r]);
    }
    if (whole) {
      for (int r = 0; r < kVecs; ++r) top_score[r] = loadi(s + r * W);
      for (int64_t j = 1; j < kKeys; ++j)
        for (int r = 0; r < kVecs; ++r) top_score[r] = maxi(top_score[r], loadi(s + j * kTileRows + r * W));
      for (int r = 0; r < kVecs; ++r) block_top[r] = to_float(top_score[r]) * factor[r];
    } else {
      careful_scores(it, sight, j0, keys, factor, block_top);
    }
    // Weights are relative to their block's maximum, and O to that of the last block that was added: then products need
    // no factor. Only a block 2^-20 below the running maximum gets one, since O relative to it might overflow.
    int64_t done = 0;
    for (int r = 0; r < kVecs; ++r) {
      const uint32_t rows = it.rows >= (r + 1) * W ? 0xffff : it.rows <= r * W ? 0 : (1u << (it.rows - r * W)) - 1;
      const vf old = load(st.m + r * W), before = load(reference + r * W);
      const vf top = vmax(block_top[r], old), origin = where_minus_inf_zero(top);
      const uint32_t sees = above_bits(block_top[r], set1(-INFINITY));
      const bool moves = rows && (threshold == 0 || (above_bits(block_top[r] - origin, set1(-threshold)) & rows));
      base[r] = where_minus_inf_zero(block_top[r]);
      share[r] = exp2_full(block_top[r] - origin);
      store(st.m + r * W, top);
      store(st.l + r * W, load(st.l + r * W) * exp2_full(old - origin));
      if (moves) {  // elsewhere the product is skipped, and the weights still count in the denominator
        const vf lowest = top - set1(20.f);
        const vf now = choose_bits(vmax(block_top[r], lowest), before, sees);
        store(reference + r * W, now);
        store(pending.keep + r * W, exp2_full(before - where_minus_inf_zero(now)));
        store(pending.share + r * W, exp2_full(block_top[r] - where_minus_inf_zero(now)));
        pending.active |= 1u << r;
        if (above_bits(block_top[r], lowest) == 0xffff) pending.plain |= 1u << r;
      }
      if (moves || !(sees & rows)) done += least(W, greatest(0, it.rows - r * W));  // blind rows skip nothing
    }
    for (int r = 0; r * W < it.rows && r < kVecs; ++r) {
      const vf sum = whole ? exponentials<true>(s + r * W, top_score[r], factor[r], base[r], p + r * W * 4)
                           : exponentials<false>(s + r * W, top_score[r], factor[r], base[r], p + r * W * 4);
      store(st.l + r * W, fma(sum, share[r], load(st.l + r * W)));
    }
    return done;
  }

  // The scores as floats with every option and mask applied, base 2; -inf beyond the last key.
  void careful_scores(const Item& it, Sight sight, int64_t j0, int64_t keys, const vf* factor, vf* block_top) {
    float* x = (float*)s;
    if (!a.attn_mask.data && !(a.softcap > 0)) {  // nothing but who sees whom
      for (int r = 0; r < kVecs; ++r) block_top[r] = set1(-INFINITY);
      for (int64_t j = 0; j < kKeys; ++j) {
        const bool real = j < keys;
        const uint32_t seen = !real                ? 0
                              : sight == Sight::all ? ~0u
                                                    : rows_seeing(a.geometry, it.b, it.i0, it.rows, j0 + j);
        for (int r = 0; r < kVecs; ++r) {
          float* at = x + j * kTileRows + r * W;
          const vf y = choose_bits(to_float(loadi(at)) * factor[r], set1(-INFINITY), seen >> (r * W));
          block_top[r] = vmax(y, block_top[r]);
          store(at, y);
        }
      }
      return;
    }
    const vf unit = set1(1.f / kLog2e);
    for (int64_t j = 0; j < keys; ++j)
      for (int r = 0; r < kVecs; ++r) {
        vf y = to_float(loadi(s + j * kTileRows + r * W)) * (factor[r] * unit);
        if (a.softcap > 0) y = y + load(shift + r * W);  // it must see the scores of the unsmoothed key
        store(x + j * kTileRows + r * W, y);
      }
    uint32_t seen[kKeys];
    finish_scores(a, it, sight, it.i0, it.rows, j0, keys, x, seen);
    for (int64_t i = 0; i < keys * kTileRows; i += W) {
      // The lowest finite score is "almost never", which -inf is not.
      const vf natural = load(x + i), binary = vmax(set1(-3.4028235e38f), natural * set1(kLog2e));
      store(x + i, choose_bits(binary, natural, ~above_bits(set1(-3.4028235e38f), natural)));
    }
    for (int64_t i = keys * kTileRows; i < kKeys * kTileRows; i += W) store(x + i, set1(-INFINITY));
    for (int r = 0; r < kVecs; ++r) block_top[r] = column_max(x, keys, r);
  }

  // 254 * 2^x for x <= 0, within 1.1e-4 of it, exact at whole x.
  static vf weight_of(vf x) {
    const vf f = fraction(x);
    vf y = fma(set1(kProbLevels * 7.8267970e-2f), f, set1(kProbLevels * .22630768f));
    y = fma(y, f, set1(kProbLevels * .69542435f));
    y = fma(y, f, set1(kProbLevels));
    return times_power(y, x);
  }
  // Weights of 16 rows and 64 keys, as bytes in [key / 4][..][4]; returns their sums. Whole scores are
  // factor * (score - top), the difference exact; the others are floats that `base` is taken from. Among them may be a
  // NaN: the sum shows it, and its bytes must not reach the neighbours.
  template <bool kWhole>
  static vf exponentials(const int32_t* scores, vi top, vf factor, vf base, uint8_t* to) {
    // A float of 2^23 + n has n in its lowest byte and 0x4b in its highest. Bytes move within 128 bits by the shuffle
    // port; the 0x4b that comes along from the lane below (which the first of four does not have) is cancelled.
    const vf magic = set1(8388608.f);
    const vi exponents = _mm512_broadcast_i32x4(_mm_setr_epi32(0x4b000000, 0x4b4b4b4b, 0x4b4b4b4b, 0x4b4b4b4b));
    vf sum = set1(0.f);
    for (int j = 0; j < kKeys; j += 4) {
      vf e[4];
      vi n[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int32_t* at = scores + (j + i) * kTileRows;
        const vf x = kWhole ? to_float(_mm512_sub_epi32(loadi(at), top)) * factor : load((const float*)at) - base;
        e[i] = weight_of(x);
        n[i] = bits_of((kWhole ? e[i] : numbers_only(e[i])) + magic);
      }
      sum = sum + ((e[0] + e[1]) + (e[2] + e[3]));
      constexpr int kXor = 0x96;
      vi word = _mm512_ternarylogic_epi32(n[0], _mm512_bslli_epi128(n[1], 1), _mm512_bslli_epi128(n[2], 2), kXor);
      word = _mm512_ternarylogic_epi32(word, _mm512_bslli_epi128(n[3], 3), exponents, kXor);
      storei(to + j * kTileRows, word);
    }
    return sum;
  }
  float lse_shift(const Item&, int64_t row) const { return a.softcap > 0 ? 0.f : shift[row]; }
};
