// precision="int8": both products in 8 bits with 32-bit sums.
//
//   S[j][rows]  = (q8 . k8) * q_scale[rows] * k_scale * scale           one k_scale per 64 keys
//   P8[j][rows] = round(254 * e^(S - block maximum)), unsigned          relative to the row's own block; with AVX-512
//                                                                       e^x is that of simd_avx512.h, Words
//   O[c][rows]  = O * alpha + (P8 . v8) * v_scale[c] * e^(block maximum - maximum) / 254
//
// Accumulators start at kSumBits, so that their bits are those of the float kSumBase + sum; those of keys with more than
// kMostDim bytes start at 0 and are converted.
//
// Lanes are query rows, as in engine_full.h. A query row has a scale of its own: it costs nothing here.
#pragma once
#include "prepare.h"
#include "softmax.h"

constexpr float kProbLevels = 254.f;      // even, so that an offset of 127 centres it for signed products
constexpr float kSumBase = 12582912.f;    // 1.5 * 2^23: sums of up to 2^22 on either side keep its exponent
constexpr int32_t kSumBits = 0x4b400000;  // its bits
constexpr int64_t kMostDim = 256;
static_assert(kMostDim * 127 * 127 < 1 << 22 && 64 * 254 * 127 < 1 << 22, "products of keys and of values leave kSumBase");

#ifndef TAMIS_WORDS
constexpr bool kRawScores = false;
#endif

// Stores kSumBase + q8 . k8 where kRawScores, else and where `kWide` the scores; `top` gets the largest of them.
template <bool kWide, int R, int N>
static inline void put_scores(const vi (&acc)[N][R], const vf* factor, float* s, vf* top) {
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    vf x[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      x[n] = kWide ? to_float(acc[n][r]) * factor[r] : float_of_bits(acc[n][r]);
      if (!kWide && !kRawScores) x[n] = (x[n] - set1(kSumBase)) * factor[r];
      store(s + n * kTileRows + r * W, x[n]);
    }
    if (kWide || !kRawScores) {  // one after the other, since that leaves out NaN
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) top[r] = vmax(x[n], top[r]);
      continue;
    }
    // By twos: one after the other took 1.05 times as long.
#pragma GCC unroll 4
    for (int apart = 1; apart < N; apart *= 2)
#pragma GCC unroll 16
      for (int n = 0; n + apart < N; n += 2 * apart) x[n] = vmax(x[n], x[n + apart]);
    top[r] = vmax(x[0], top[r]);
  }
}
// Adds sums, as bits of kSumBase + P8 . v8, to the running output.
template <int R, int N>
static inline void put_values(const vi (&acc)[N][R], const float* scale, const vf* share, const vf* alpha, float* o) {
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      float* at = o + n * kTileRows + r * W;
      const vf sum = float_of_bits(acc[n][r]) - set1(kSumBase);
      store(at, fma(sum, share[r] * set1(scale[n]), load(at) * alpha[r]));
    }
}

template <bool kWide, int R, int N>
static inline void qk_int8(const uint8_t* q, const int8_t* k, int64_t ld, int64_t dim4, const int32_t* start,
                           const vf* factor, float* s, vf* top) {
  vi acc[N][R];
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) acc[n][r] = set1i(start[n]);
  for (int64_t c = 0; c < dim4; c += 4) {
    vi row[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) row[r] = loadi(q + c * kTileRows + r * W * 4);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      const auto key = broadcast4(k + n * ld + c);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[n][r] = dot4(acc[n][r], row[r], key);
    }
  }
  put_scores<kWide, R, N>(acc, factor, s, top);
}

template <int R, int N>
static inline void pv_int8(const uint8_t* p, const int8_t* v, int64_t fours, const int32_t* start, const float* scale,
                           const vf* share, const vf* alpha, float* o) {
  vi acc[N][R];
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) acc[n][r] = set1i(start[n]);
#pragma GCC unroll 16
  for (int64_t g = 0; g < fours; ++g) {
    vi row[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) row[r] = loadi(p + (g * kTileRows + r * W) * 4);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      const auto value = broadcast4(v + n * kKeys + g * 4);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[n][r] = dot4(acc[n][r], row[r], value);
    }
  }
  put_values<R, N>(acc, scale, share, alpha, o);
}

// All of a part's keys, of `kDim` bytes or, where that is 0, of `bytes`. Not inlined: in a larger function GCC 12 keeps
// rows in memory.
template <bool kWide, int64_t kDim, int R>
static __attribute__((noinline)) void qk_part(const uint8_t* q, const int8_t* k, int64_t bytes, int64_t keys,
                                              const int32_t* start, const vf* factors, float* s, vf* tops) {
  const int64_t dim4 = kDim ? kDim : bytes;
  vf top[R], factor[R];
  for (int r = 0; r < R; ++r) top[r] = tops[r], factor[r] = factors[r];
  int64_t j = 0;
  for (; j + kQkTile + kQkRest <= keys || j + kQkTile == keys; j += kQkTile)
    qk_int8<kWide, R, kQkTile>(q, k + j * dim4, dim4, dim4, start + j, factor, s + j * kTileRows, top);
  for (; j + kQkRest <= keys; j += kQkRest)
    qk_int8<kWide, R, kQkRest>(q, k + j * dim4, dim4, dim4, start + j, factor, s + j * kTileRows, top);
  for (; j < keys; ++j)
    qk_int8<kWide, R, 1>(q, k + j * dim4, dim4, dim4, start + j, factor, s + j * kTileRows, top);
  for (int r = 0; r < R; ++r) tops[r] = top[r];
}
// All channels of a part's values, of `kFours` times four keys or, where that is 0, of so many.
template <int64_t kFours, int R>
static __attribute__((noinline)) void pv_part(const uint8_t* p, const int8_t* v, int64_t groups, int64_t channels,
                                              const int32_t* start, const float* scale, const vf* shares,
                                              const vf* alphas, float* o) {
  const int64_t fours = kFours ? kFours : groups;
  vf alpha[R], share[R];
  for (int r = 0; r < R; ++r) alpha[r] = alphas[r], share[r] = shares[r] * set1(1.f / kProbLevels);
  int64_t c = 0;
  for (; c + kPvTile <= channels; c += kPvTile)
    pv_int8<R, kPvTile>(p, v + c * kKeys, fours, start + c, scale + c, share, alpha, o + c * kTileRows);
  for (; c < channels; ++c)
    pv_int8<R, 1>(p, v + c * kKeys, fours, start + c, scale + c, share, alpha, o + c * kTileRows);
}

// Mixes and quantises a tile of query rows, `dim` (a multiple of 4 from head_dim on) bytes each, into [dim / 4][32][4].
// `row_scale` gets each row's scale, the softmax scale included; `shift` its scaled product with the key mean.
// `columns`: room for head_dim, rounded up to 4, times W: those of both vectors of rows at once would have half of level
// 1's sets to themselves at head dims that are powers of two.
static void quantise_tile(const tamis_attend_args& a, const Item& it, const float* rows, int64_t ld, int64_t dim,
                          float* columns, uint8_t* to, float* row_scale, float* shift) {
  const float* mean = a.packed.key_mean + (it.b * a.kv_heads + it.kv_head) * a.head_dim;
  const int64_t padded = round_up(a.head_dim, 4);
  const vf scale = set1(a.scale * root_of_mixed(a.packed));
  for (int r = 0; r < kTileRows; r += W) {
    float* x = columns;
    transpose(rows + r * ld, ld, W, (int)a.head_dim, x, W);
    memset(x + a.head_dim * W, 0, (padded - a.head_dim) * W * 4);
    vf product[4] = {set1(0.f), set1(0.f), set1(0.f), set1(0.f)};
    for (int64_t c = 0; c < a.head_dim; ++c) product[c % 4] = fma(load(x + c * W), set1(mean[c]), product[c % 4]);
    store(shift + r, ((product[0] + product[1]) + (product[2] + product[3])) * set1(a.scale));

    const vf tops = float_of_bits(mix_columns(x, a.head_dim, a.packed.mixed));
    // A NaN or infinite row keeps a broken scale, so that its own output shows it and no other does.
    const uint32_t finite = above_bits(set1(INFINITY), tops);
    const vi whole = bits_of(choose_bits(float_of_bits(set1i(-1)), set1(0.f), finite));
    store(row_scale + r, choose_bits(tops / set1(127.f) * scale, set1(NAN), finite));
    const uint32_t tiny = above_bits(set1(kTinyTop), tops) & above_bits(tops, set1(0.f));
    const vf larger = choose_bits(set1(kEnlarged), set1(1.f), tiny);
    if (tiny)
      for (int64_t c = 0; c < padded; ++c) store(x + c * W, load(x + c * W) * larger);
    const vf enlarged = tops * larger;
    const vf inverse = choose_bits(set1(127.f) / enlarged, set1(0.f), finite & above_bits(enlarged, set1(kLeastTop)));
    for (int64_t c = 0; c < padded; c += 4) {
      vi q[4];
      for (int i = 0; i < 4; ++i) q[i] = round_to_int(load(x + (c + i) * W) * inverse);
      storei(to + (c * kTileRows + r * 4), bytes_in_lanes(q[0], q[1], q[2], q[3]) & whole);
    }
  }
  memset(to + padded * kTileRows, 0, (dim - padded) * kTileRows);
}

struct Int8Engine {
  static constexpr int64_t kPartsAtOnce = 8;
  static constexpr int kMostVecs = 2;  // of rows in one register tile: 2 or 4
  const tamis_attend_args& a;
  uint8_t* q;        // [tiles][dim4 / 4][32][4], with kQueryOffset added
  uint8_t* p;        // [16][32][4], with kProbOffset added
  float* row_scale;  // of each row, softmax scale included
  float* shift;      // scale * q . key_mean, natural log
  float* columns;    // one vector of rows, a channel each
  // Of one of the parts at hand, 64 keys.
  struct Block {
    int64_t keys, kv_block;
    int32_t *key_start, *value_start;  // where the accumulators start
  };
  Block blocks[kPartsAtOnce];
  int64_t keys, kv_block;  // of the one in use, as the next two
  const int32_t *key_start, *value_start;
  // Of the tile at hand, one vector of rows: what makes scores of products, whether they are left as such, their largest.
  vf factors[kTileRows / W];
#ifdef TAMIS_WORDS
  bool raw[kTileRows / W];
  vf raw_top[kTileRows / W];
#endif

  // Of a quantised row: a pack may have room behind its channels.
  static int64_t query_bytes(const tamis_attend_args& a) { return round_up(greatest(a.head_dim, a.packed.dim4), 16); }
  static int64_t scratch_bytes(const tamis_attend_args& a) {
    const int64_t dim = query_bytes(a), channels = round_up(a.value_dim, 16);
    return a.geometry.block_q * (dim + 8) + kKeys * kTileRows + W * dim * 4 +
           kPartsAtOnce * 4 * (kKeys + channels) + 256;
  }
  Int8Engine(const tamis_attend_args& args, const Prepared&, char* scratch) : a(args) {
    const int64_t dim = query_bytes(a), rows = a.geometry.block_q;
    q = (uint8_t*)scratch;
    p = q + rows * dim;
    columns = (float*)(p + kKeys * kTileRows);
    row_scale = columns + W * dim;
    shift = row_scale + rows;
    const int64_t channels = round_up(a.value_dim, 16);
    int32_t* rest = (int32_t*)(shift + rows);
    for (Block& b : blocks) b.key_start = rest, b.value_start = rest + kKeys, rest += kKeys + channels;
  }

  void set_queries(const Item& it, int64_t tile, const float* rows, int64_t ld, int64_t) {
    const int64_t ld_to = a.packed.dim4;
    uint8_t* to = q + tile * kTileRows * ld_to;
    quantise_tile(a, it, rows, ld, ld_to, columns, to, row_scale + tile * kTileRows, shift + tile * kTileRows);
    if (kQueryOffset)
      for (int64_t i = 0; i < kTileRows * ld_to; ++i) to[i] = (uint8_t)(to[i] ^ 0x80);
  }

  // Makes up to kPartsAtOnce parts ready, of which use_part takes one.
  void set_part(int64_t at, const Item& it, int64_t j0, int64_t n) {
    Block& b = blocks[at];
    b.keys = n, b.kv_block = (it.b * a.kv_heads + it.kv_head) * a.packed.capacity + j0 / kKeys;
    set_starts(b.key_start, a.packed.key_sum + b.kv_block * kKeys, kKeys, kQueryOffset, is_wide() ? 0 : kSumBits);
    set_starts(b.value_start, a.packed.value_sum + b.kv_block * a.value_dim, a.value_dim, kProbOffset, kSumBits);
  }
  void use_part(int64_t at) {
    const Block& b = blocks[at];
    keys = b.keys, kv_block = b.kv_block, key_start = b.key_start, value_start = b.value_start;
  }
  static void set_starts(int32_t* __restrict to, const int32_t* sums, int64_t count, int32_t offset, int32_t base) {
    for (int64_t i = 0; i < count; ++i) to[i] = base - offset * sums[i];
  }
  bool is_wide() const { return a.packed.dim4 > kMostDim; }

  template <int R>
  void scores(int64_t tile, int r0, bool kept, float* s, vf* top) {
    const tamis_packed& k = a.packed;
    const uint8_t* rows = q + tile * kTileRows * k.dim4 + r0 * W * 4;
    const int8_t* block = k.key + kv_block * kKeys * k.dim4;
    const vf* factor = set_factors<R>(tile, r0);
    s += r0 * W;
    if (is_wide())
      qk_part<true, 0, R>(rows, block, k.dim4, keys, key_start, factor, s, top);
    else if (k.dim4 == 64)
      qk_part<false, 64, R>(rows, block, k.dim4, keys, key_start, factor, s, top);
    else if (k.dim4 == 128)
      qk_part<false, 128, R>(rows, block, k.dim4, keys, key_start, factor, s, top);
    else
      qk_part<false, 0, R>(rows, block, k.dim4, keys, key_start, factor, s, top);
    settle<R>(r0, kept, s, top);
  }
  template <int R>
  const vf* set_factors(int64_t tile, int r0) {
    for (int r = r0; r < r0 + R; ++r)
      factors[r] = load(row_scale + tile * kTileRows + r * W) * set1(a.packed.key_scale[kv_block]);
    return factors + r0;
  }
#ifndef TAMIS_WORDS
  template <int R>
  void settle(int, bool, float*, vf*) {}
  static vf top_score(int, vf top) { return top; }
#else
  // Weights can be made from products as they are where scores are `kept`, unless a factor is negative: then
  // products become scores. A row whose factor is NaN has its NaN from its sum of weights.
  template <int R>
  void settle(int r0, bool kept, float* s, vf* top) {
    for (int r = 0; r < R; ++r) {
      const vf factor = numbers_only(factors[r0 + r]);
      raw[r0 + r] = kept && !is_wide() && !any_above(set1(0.f), factor);
      if (raw[r0 + r]) top[r] = top_score(r0 + r, top[r]);
      if (raw[r0 + r] || is_wide()) continue;
      top[r] = set1(-INFINITY);
      for (int64_t j = 0; j < keys; ++j) {
        const vf x = (load(s + j * kTileRows + r * W) - set1(kSumBase)) * factors[r0 + r];
        store(s + j * kTileRows + r * W, x);
        top[r] = vmax(x, top[r]);
      }
    }
  }
  // Of the largest that is stored for vector r, -inf where a row sees nothing or its factor is NaN.
  vf top_score(int r, vf top) {
    if (!raw[r]) return top;
    raw_top[r] = top;
    return vmax((top - set1(kSumBase)) * factors[r], set1(-INFINITY));
  }
#endif

#ifndef TAMIS_WORDS
  // Exactly 1 at 0, so that a single key gives its value.
  static vf weight_of(vf x) { return exp2_fast(x * set1(kLog2e)); }
  static vi probability_bytes(vf e) {
    return kProbOffset ? round_to_int(fma(e, set1(kProbLevels), set1((float)kProbOffset))) & set1i(255)
                       : round_to_int(e * set1(kProbLevels));
  }
  // Of one vector of rows and four keys: adds to `sum`, in units of kSumUnit, and returns the four bytes of each row.
#ifdef TAMIS_LEVELS
  static constexpr float kSumUnit = kProbLevels;
  static vi weigh(const float* at, vf base, vf* sum) {
    const vf y0 = level_of(load(at) - base), y1 = level_of(load(at + kTileRows) - base);
    const vf y2 = level_of(load(at + 2 * kTileRows) - base), y3 = level_of(load(at + 3 * kTileRows) - base);
    *sum = *sum + ((y0 + y1) + (y2 + y3));
    return bytes_of(round_to_int(y0), round_to_int(y1), round_to_int(y2), round_to_int(y3));
  }
#else
  static constexpr float kSumUnit = 1.f;
  static vi weigh(const float* at, vf base, vf* sum) {
    const vf e0 = weight_of(load(at) - base), e1 = weight_of(load(at + kTileRows) - base);
    const vf e2 = weight_of(load(at + 2 * kTileRows) - base), e3 = weight_of(load(at + 3 * kTileRows) - base);
    *sum = *sum + ((e0 + e1) + (e2 + e3));
    const vi low = either(probability_bytes(e0), shift_left(probability_bytes(e1), 8));
    const vi high = either(shift_left(probability_bytes(e2), 16), shift_left(probability_bytes(e3), 24));
    return either(low, high);
  }
#endif
#endif
  // Calls put(g, r, bytes) for every four keys and vector of rows.
  template <int R, class Put>
  void weigh_block(int r0, float* s, const vf* block_top, vf* sum, Put put) const {
    for (int64_t j = keys; j & 3; ++j)  // the last four keys may be fewer: value bytes are 0 there
      for (int r = 0; r < R; ++r) store(s + j * kTileRows + (r0 + r) * W, set1(-INFINITY));
#ifdef TAMIS_WORDS
    for (int r = 0; r < R; ++r) {
      const int at = r0 + r;
      const vf factor = vmin(numbers_only(factors[at]), set1(1e30f));  // more is no different, and may overflow
      if (raw[at])
        sum[r] = choose_bits(factors[at] * set1(0.f), set1(0.f), above_bits(raw_top[at], set1(-INFINITY))) +
                 (are_tame_factors(factor) ? weigh_rows(Words<Of::products>(raw_top[at], factor), at, s, put)
                                           : weigh_rows(Words<Of::far_products>(raw_top[at], factor), at, s, put));
      else
        sum[r] = weigh_rows(Words<Of::scores>(block_top[r], set1(1.f)), at, s, put);
    }
#else
    vf base[R], total[R];
    for (int r = 0; r < R; ++r) base[r] = where_minus_inf_zero(block_top[r]), total[r] = set1(0.f);
    for (int64_t g = 0; g * 4 < keys; ++g)
      for (int r = 0; r < R; ++r)
        put(g, r0 + r, weigh(s + g * 4 * kTileRows + (r0 + r) * W, base[r], &total[r]));
    for (int r = 0; r < R; ++r) sum[r] = kSumUnit == 1.f ? total[r] : total[r] / set1(kSumUnit);
#endif
  }
#ifdef TAMIS_WORDS
  template <class Weights, class Put>
  vf weigh_rows(Weights words, int r, const float* s, Put put) const {
    const float* at = s + r * W;
    for (int64_t g = 0; g * 4 < keys; ++g, at += 4 * kTileRows) put(g, r, words.bytes(at, kTileRows));
    return words.sum();
  }
#endif
  template <int R>
  void exponentials(int r0, float* s, const vf* block_top, const vf*, vf* sum) {
    weigh_block<R>(r0, s, block_top, sum,
                   [this](int64_t g, int r, vi bytes) { storei(p + (g * kTileRows + r * W) * 4, bytes); });
  }
  static vf share(vf block_top, vf top) { return exp_of(block_top - where_minus_inf_zero(top)); }

  template <int R>
  void accumulate(int r0, const float*, const vf* share, const vf* alpha, float* o) const {
    const int8_t* v = a.packed.value + kv_block * kKeys * a.value_dim;
    const float* scale = a.packed.value_scale + kv_block * a.value_dim;
    const uint8_t* rows = p + r0 * W * 4;
    o += r0 * W;
    if (keys == kKeys)
      pv_part<kKeys / 4, R>(rows, v, kKeys / 4, a.value_dim, value_start, scale, share, alpha, o);
    else
      pv_part<0, R>(rows, v, (keys + 3) / 4, a.value_dim, value_start, scale, share, alpha, o);
  }
  // A softcap must see the scores of the unsmoothed key.
  void unsmooth(int64_t tile, int vecs, float* s) const {
    for (int64_t j = 0; j < keys; ++j)
      for (int r = 0; r < vecs; ++r) {
        float* at = s + j * kTileRows + r * W;
        store(at, load(at) + load(shift + tile * kTileRows + r * W));
      }
  }
  bool needs_care(uint32_t) { return false; }
  void accumulate_carefully(const uint32_t*, const float*, const float*, float*, uint32_t) {}
  float lse_shift(const Item&, int64_t row) const { return a.softcap > 0 ? 0.f : shift[row]; }
};
