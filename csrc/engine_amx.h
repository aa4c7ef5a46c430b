// precision="int8" on AMX: the formulas and layouts of engine_int8.h, with tiles for both products.
//
// A tile product is C[16][16] += A[16][64 bytes] . B[16][16][4 bytes]. Keys (or value channels) are the rows
// of A and query rows the columns of B, so scores and output come out transposed as everywhere else.
//
// For some 700 cycles after any tile instruction a core runs 512-bit vectors at half rate (measured: 1,024 FMAs after
// one tilezero take 360 cycles longer). So a step takes several key blocks at once: first the tiles work, on the QK
// products of these blocks and the PV products of those of the step before, with the update of O under them; then
// the exponentials of all, undisturbed. Their base is 2 here, and so is that of the running maximum.
#pragma once
#include "engine_int8.h"
#include "state.h"
#include "tiles.h"

struct AmxEngine {
  static constexpr int64_t kRowsAtOnce = 64;
  static constexpr int kTiles = kRowsAtOnce / kTileRows, kParts = 4;
  static constexpr int kVecs = kTileRows / W;

  // 64 keys (fewer at the end), and what their softmax leaves for the PV product.
  struct Part {
    int64_t block, j0, keys;
    double weight;
    Sight sights[kTiles];
    uint32_t active[kTiles];  // bit r: the rows of vector r take part in the PV product
    alignas(64) float alpha[kTiles][kTileRows], beta[kTiles][kTileRows];
  };

  const tamis_attend_args& a;
  const int64_t dim, wide;  // head_dim in whole tiles of 64, value_dim in whole tiles of 16
  int8_t* q;                // [tiles][dim / 4][32][4]
  int32_t* s;               // [parts][tiles][64][32]; becomes floats where a tile needs care
  uint8_t* p;               // [parts][tiles][16][32][4]
  int32_t* products;        // [2][16][32]: P . V of 16 channels and the 16 before
  int8_t *key_copy, *value_copy;  // a block in whole tiles where it is not
  float *row_scale, *shift;
  int8_t* row_bytes;
  TileScope scope;
  alignas(64) Part parts[kParts];  // of this step until softmax is done, then of the one before
  alignas(64) int32_t tops[kParts][kTiles][kTileRows];
  int old = 0, fresh = 0;  // parts whose PV, whose QK product is to be done
  Part incoming[kParts];

  static int64_t scratch_bytes(const tamis_attend_args& a) {
    const int64_t dim = round_up(a.head_dim, 64), wide = round_up(a.value_dim, 16), rows = kRowsAtOnce;
    return rows * dim + kParts * rows * kKeys * 5 + 2 * 16 * kTileRows * 4 + kKeys * (dim + wide) + 8 * rows +
           kTileRows * dim + 64;
  }
  AmxEngine(const tamis_attend_args& args, char* scratch)
      : a(args), dim(round_up(args.head_dim, 64)), wide(round_up(args.value_dim, 16)) {
    const int64_t rows = kRowsAtOnce;
    s = (int32_t*)scratch;
    products = s + kParts * rows * kKeys;
    row_scale = (float*)(products + 2 * 16 * kTileRows);
    shift = row_scale + rows;
    q = (int8_t*)(shift + rows);
    p = (uint8_t*)q + rows * dim;
    key_copy = (int8_t*)p + kParts * rows * kKeys;
    value_copy = key_copy + kKeys * dim;
    row_bytes = value_copy + kKeys * wide;
    if (scratch) memset(key_copy, 0, kKeys * (dim + wide));
  }

  void set_queries(const Item& it, int64_t tile, float* rows, int64_t ld, int64_t n) {
    quantise_tile(a, it, rows, ld, n, dim, row_bytes, (uint8_t*)q + tile * kTileRows * dim, row_scale + tile * kTileRows,
                  shift + tile * kTileRows);
  }

  // S = K . Q for 16 keys from j and 32 rows. Work alternates between two sets of tiles, so that one set's sums are
  // stored while the other's are made.
  void tile_scores(const int8_t* key, int64_t ld, int64_t j, const int8_t* rows, int32_t* to) const {
    key += j * ld, to += j * kTileRows;
    const bool odd = j & 16;
    if (odd) {
      TILE_ZERO(2);
      TILE_ZERO(3);
    } else {
      TILE_ZERO(0);
      TILE_ZERO(1);
    }
    for (int64_t c = 0; c < dim; c += 64) {
      if (dim > 64 || j == 0) {  // else they are still there
        TILE_LOAD(6, rows + c * kTileRows, kTileRows * 4);
        TILE_LOAD(7, rows + c * kTileRows + 64, kTileRows * 4);
      }
      if (odd) {
        TILE_LOAD(5, key + c, ld);
        TILE_DOT_SSD(2, 5, 6);
        TILE_DOT_SSD(3, 5, 7);
      } else {
        TILE_LOAD(4, key + c, ld);
        TILE_DOT_SSD(0, 4, 6);
        TILE_DOT_SSD(1, 4, 7);
      }
    }
    if (odd) {
      TILE_STORE(2, to, kTileRows * 4);
      TILE_STORE(3, to + W, kTileRows * 4);
    } else {
      TILE_STORE(0, to, kTileRows * 4);
      TILE_STORE(1, to + W, kTileRows * 4);
    }
  }
  // P . V for 16 channels from c and 32 rows.
  void tile_values(const uint8_t* rows, const int8_t* value, int64_t c) const {
    int32_t* to = products + (c & 16) * kTileRows;
    if (c == 0) {
      TILE_LOAD(6, rows, kTileRows * 4);
      TILE_LOAD(7, rows + 64, kTileRows * 4);
    }
    if (c & 16) {
      TILE_LOAD(5, value + c * kKeys, kKeys);
      TILE_ZERO(2);
      TILE_DOT_SUD(2, 5, 6);
      TILE_ZERO(3);
      TILE_DOT_SUD(3, 5, 7);
      TILE_STORE(2, to, kTileRows * 4);
      TILE_STORE(3, to + W, kTileRows * 4);
    } else {
      TILE_LOAD(4, value + c * kKeys, kKeys);
      TILE_ZERO(0);
      TILE_DOT_SUD(0, 4, 6);
      TILE_ZERO(1);
      TILE_DOT_SUD(1, 4, 7);
      TILE_STORE(0, to, kTileRows * 4);
      TILE_STORE(1, to + W, kTileRows * 4);
    }
  }
  // Largest score of each row so far, with 16 more keys.
  static void take_maxima(const int32_t* from, int64_t j, int32_t* tops) {
    vi top[kVecs];
    from += j * kTileRows;
    for (int r = 0; r < kVecs; ++r) top[r] = loadi((j ? tops : from) + r * W);
#pragma GCC unroll 16
    for (int64_t n = 0; n < 16; ++n)
      for (int r = 0; r < kVecs; ++r) top[r] = maxi(top[r], loadi(from + n * kTileRows + r * W));
    for (int r = 0; r < kVecs; ++r) storei(tops + r * W, top[r]);
  }
  // O = O alpha + (P . V) beta, for 16 channels from c.
  void update(const Part& part, int64_t t, const float* value_scale, int64_t c, float* o) const {
    const int32_t* from = products + ((c & 16) - c) * kTileRows;
    const int64_t end = least(c + 16, a.value_dim);
    const float *alpha = part.alpha[t], *beta = part.beta[t];
    const vf a0 = load(alpha), a1 = load(alpha + W), b0 = load(beta), b1 = load(beta + W);
    if (part.active[t] == (1u << kVecs) - 1) {
      for (; c < end; ++c) {
        float* at = o + c * kTileRows;
        const int32_t* by = from + c * kTileRows;
        const vf scale = set1(value_scale[c]);
        store(at, fma(to_float(loadi(by)), b0 * scale, load(at) * a0));
        store(at + W, fma(to_float(loadi(by + W)), b1 * scale, load(at + W) * a1));
      }
      return;
    }
    const int r = part.active[t] == 1 ? 0 : W;
    for (; c < end; ++c) {
      float* at = o + c * kTileRows + r;
      store(at, fma(to_float(loadi(from + c * kTileRows + r)), (r ? b1 : b0) * set1(value_scale[c]),
                    load(at) * (r ? a1 : a0)));
    }
  }

  // PV products of the step before.
  void finish_old(const Item& it, State& st) {
    for (int64_t t = 0; t * kTileRows < it.rows; ++t)
      for (int n = 0; n < old; ++n) {
        const Part& part = parts[n];
        if (!part.active[t]) continue;
        const float* scale = a.packed.value_scale + part.block * a.value_dim;
        const int8_t* value = a.packed.value + part.block * kKeys * a.value_dim;
        float* o = st.o + t * a.value_dim * kTileRows;
        if (a.value_dim % 16) value = (int8_t*)memcpy(value_copy, value, kKeys * a.value_dim);
        for (int64_t c = 0; c < wide; c += 16) {
          tile_values(p + (n * kTiles + t) * kTileRows * kKeys, value, c);
          if (c) update(part, t, scale, c - 16, o);
        }
        update(part, t, scale, wide - 16, o);
      }
    old = 0;
  }
  // QK products of this step, and under them the largest scores.
  void start_fresh(const Item& it) {
    const int32_t* last = nullptr;
    int32_t* last_tops = nullptr;
    for (int n = 0; n < fresh; ++n) {
      const Part& part = incoming[n];
      const int8_t* key = a.packed.key + part.block * kKeys * a.packed.dim4;
      int64_t ld = a.packed.dim4;
      if (ld % 64) {
        for (int64_t j = 0; j < kKeys; ++j) memcpy(key_copy + j * dim, key + j * ld, ld);
        key = key_copy, ld = dim;
      }
      for (int64_t t = 0; t * kTileRows < it.rows; ++t) {
        if (part.sights[t] == Sight::none) continue;
        int32_t* to = s + (n * kTiles + t) * kTileRows * kKeys;
        for (int64_t j = 0; j < kKeys; j += 16) {
          tile_scores(key, ld, j, q + t * kTileRows * dim, to);
          if (last) take_maxima(last, j, last_tops);
        }
        last = to, last_tops = tops[n][t];
      }
    }
    for (int64_t j = 0; last && j < kKeys; j += 16) take_maxima(last, j, last_tops);
  }
  void step(const Item& it, State& st) {
    finish_old(it, st);
    start_fresh(it);
    const float threshold = a.pv_threshold ? a.pv_threshold[it.h] * kLog2e : 0.f;
    for (int n = 0; n < fresh; ++n) {
      Part& part = parts[n];
      part = incoming[n];
      int64_t done = 0;
      for (int64_t t = 0; t * kTileRows < it.rows; ++t) {
        const int64_t rows = least(kTileRows, it.rows - t * kTileRows);
        part.active[t] = 0;
        done += part.sights[t] == Sight::none ? rows : softmax(it, st, part, n, t, rows, threshold);
      }
      st.pv += (double)done * part.weight;
    }
    old = fresh, fresh = 0;
  }

  void visit_part(const Item& it, State& st, const Sight* sights, int64_t j0, int64_t keys, double weight) {
    Part& part = incoming[fresh++];
    part.block = (it.b * a.kv_heads + it.kv_head) * a.packed.capacity + j0 / kKeys;
    part.j0 = j0, part.keys = keys, part.weight = weight;
    memcpy(part.sights, sights, sizeof part.sights);
    if (fresh == kParts) step(it, st);
  }
  void finish(const Item& it, State& st) {
    if (fresh) step(it, st);
    finish_old(it, st);
    for (int64_t i = 0; i < round_up(it.rows, kTileRows); ++i) st.m[i] *= 1.f / kLog2e;
  }

  // Scores of part n and row tile t to probabilities in bytes. Returns the rows whose PV product will be done.
  int64_t softmax(const Item& it, State& st, Part& part, int64_t n, int64_t t, int64_t rows, float threshold) {
    int32_t* scores = s + (n * kTiles + t) * kTileRows * kKeys;
    uint8_t* bytes = p + (n * kTiles + t) * kTileRows * kKeys;
    const Sight sight = part.sights[t];
    const float key_scale = a.packed.key_scale[part.block];
    float *m = st.m + t * kTileRows, *l = st.l + t * kTileRows;
    const bool plain = sight == Sight::all && !a.attn_mask.data && !(a.softcap > 0);
    bool whole = plain && part.keys == kKeys;
    vf factor[kVecs], block_top[kVecs], sum[kVecs];
    for (int r = 0; r < kVecs; ++r) factor[r] = load(row_scale + t * kTileRows + r * W) * set1(key_scale * kLog2e);
    if (whole) {
      for (int r = 0; r < kVecs; ++r) {
        block_top[r] = vmax(to_float(loadi(tops[n][t] + r * W)) * factor[r], set1(-INFINITY));
        // Beyond this the one rounding of the maximum would push a probability over its byte.
        whole = whole && !any_above(vabs(block_top[r]), set1(16384.f)) && !any_differs(factor[r], factor[r]);
      }
    }
    if (!whole) careful_scores(it, t, rows, sight, part.j0, part.keys, plain, factor, scores, block_top);
    float real[kTileRows];
    for (int64_t i = 0; i < kTileRows; ++i) real[i] = i < rows ? 0.f : -INFINITY;
    vf base[kVecs];
    for (int r = 0; r < kVecs; ++r) base[r] = where_minus_inf_zero(block_top[r]), sum[r] = set1(0.f);
    if (whole)
      exponentials<true>(scores, bytes, factor, base, sum);
    else
      exponentials<false>(scores, bytes, factor, base, sum);
    int64_t done = 0;
    for (int r = 0; r * W < rows; ++r) {
      const vf old = load(m + r * W), top = vmax(block_top[r], old), origin = where_minus_inf_zero(top);
      const vf keep = exp2_full(old - origin), share = exp2_full(block_top[r] - origin) * set1(1.f / kProbLevels);
      const vf off = load(real + r * W);
      const bool blind = !any_above(block_top[r] + off, set1(-INFINITY));  // sees no key: nothing was skipped
      const bool moves = threshold == 0 || any_above(block_top[r] - origin + off, set1(-threshold));
      store(m + r * W, top);
      store(l + r * W, fma(load(l + r * W), keep, sum[r] * share));
      store(part.alpha[t] + r * W, keep);
      store(part.beta[t] + r * W, share);
      if (moves) part.active[t] |= 1u << r;
      if (moves || blind) done += least(W, rows - r * W);
    }
    return done;
  }

  // As floats with every option and mask applied, base 2; -inf beyond the last key.
  void careful_scores(const Item& it, int64_t t, int64_t rows, Sight sight, int64_t j0, int64_t keys, bool plain,
                      const vf* factor, int32_t* scores, vf* block_top) {
    float* x = (float*)scores;
    const vf unit = set1(plain ? 1.f : 1.f / kLog2e);
    for (int64_t j = 0; j < keys; ++j)
      for (int r = 0; r < kVecs; ++r) {
        const int64_t at = j * kTileRows + r * W;
        vf y = to_float(loadi(scores + at)) * (factor[r] * unit);
        if (a.softcap > 0) y = y + load(shift + t * kTileRows + r * W);
        store(x + at, y);
      }
    if (!plain) {
      uint32_t seen[kKeys];
      finish_scores(a, it, sight, it.i0 + t * kTileRows, rows, j0, keys, x, seen);
      for (int64_t i = 0; i < keys * kTileRows; i += W) store(x + i, load(x + i) * set1(kLog2e));
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
  // A float of 2^23 + n has n in its lowest byte, and no shift to the left by bytes brings its exponent along but
  // the shift by none: 75 in the highest byte, which the fourth probability makes up for by starting 181 higher.
  template <bool kInts>
  static void exponentials(const int32_t* scores, uint8_t* to, const vf* factor, const vf* base, vf* sum) {
    const vf whole = set1(8388608.f), fourth = set1(8388608.f + 181.f);
    for (int r = 0; r < kVecs; ++r) {
      const vf by = factor[r], less = set1(0.f) - base[r];
      vf total = set1(0.f);
      for (int g = 0; g < kKeys / 4; ++g) {
        const int32_t* at = scores + g * 4 * kTileRows + r * W;
        vf e[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          if (kInts)
            e[i] = weight_of(fma(to_float(loadi(at + i * kTileRows)), by, less));
          else
            e[i] = weight_of(load((const float*)at + i * kTileRows) + less);
        }
        total = total + ((e[0] + e[1]) + (e[2] + e[3]));
        const vi low = addi(bits_of(e[0] + whole), shift_left(bits_of(e[1] + whole), 8));
        const vi high = addi(shift_left(bits_of(e[2] + whole), 16), shift_left(bits_of(e[3] + fourth), 24));
        storei(to + (g * kTileRows + r * W) * 4, addi(low, high));
      }
      sum[r] = total;
    }
  }
  float lse_shift(const Item&, int64_t row) const { return a.softcap > 0 ? 0.f : shift[row]; }
};
