// Attention with AMX tiles: precision="int8" with 8-bit query and key, "full" of bf16 inputs; values are bf16 in both.
//
// A tile product is C[16][16] += A[16][64 bytes] . B[16][16][4 bytes]. Keys (or value channels) are the rows of A and
// query rows the columns of B, so scores and output come out transposed as everywhere else:
//   S[key][row] = K . Q, in int32 or fp32;   P[key / 2][row][2] = e^(S factor - reference), bf16
//   O[channel][row] += V^T . P, summed by the tiles in fp32, where it stays
//
// bf16 has the exponents of fp32, so P keeps its 8 bits at any size. `reference` therefore need not be the running
// maximum: it is set by a row's first block, to a whole power of two, and moves only when a score is kHeadroom powers
// above it. O is seldom rescaled (and exactly then), and no maximum has to be known before the exponentials.
//
// The exponential is integer arithmetic on 32 lanes of 16 bits. With y = 128 x + 127 * 128 rounded, x to the base of 2,
// the word y read as a bf16 is 2^floor(x) (1 + frac(x)), since its low 7 bits are the fraction; a table of 128 bytes
// turns that into 2^floor(x) 2^frac(x). Rounding y costs 2^(1/256), .27%, at most, the mantissa half a unit of 2^-7, .39%.
//
// That takes scores of a moderate size. Rows beyond ("wild", which each row is on its own, whatever its neighbours are)
// have it done in steps that cost more, and so have blocks with masks or a softcap.
// Tiles take denormal numbers for 0: products of values and weights below 1e-38 are lost.
#pragma once
#include "engine_int8.h"
#include "prepare.h"
#include "state.h"
#include "tile_products.h"

constexpr int kHeadroom = 8;  // powers of two that P may exceed 1 by; values keep as many fewer below infinity
constexpr float kMostPower = 3e4f;  // beyond, 128 times it leaves the integers that fp32 has beside kMagic
// Scores of more, natural logarithm, might lie so far below a reference that y's bits less those of kMagic wrap around:
// at -2 kMagic, 98,304 powers. References take up to kMostPower of that.
constexpr float kMostScore = 4e4f;
constexpr float kMostWords = 80.f;  // a score so far below its reference, natural logarithm, still has a word above 0
constexpr float kMostFactor = 1e30f;  // what a score is multiplied with must stay finite
constexpr float kMagic = 12582912.f;  // 1.5 * 2^23: a float of it plus n has n in its low bits
constexpr int kOne = 127 * 128;       // the bits of 1.0 in bf16

// 128 (2^(i / 128) - 1) for i < 128, rounded. Made by the compiler: code that runs when the library is loaded
// would run on any processor.
struct MantissaTable {
  alignas(64) uint8_t entry[128];
  constexpr MantissaTable() : entry() {
    double power = 1;
    for (int i = 0; i < 128; ++i, power *= 1.0054299011128028) entry[i] = (uint8_t)(128 * (power - 1) + .5);
  }
};
static constexpr MantissaTable kMantissa;

template <bool kInt8>
struct TileEngine {
  // Key blocks that all row tiles visit before the next: key and value then come from the second-level cache, and
  // a tile's O stays in the first.
  static constexpr int64_t kPartsAtOnce = 16;
  static constexpr int kVecs = kTileRows / W;
  static_assert(kVecs == 2, "the tile code names both");

  // How a score becomes the argument of the exponential: raw scores in one step; so but for the rows that are wild; or
  // finished ones, floats.
  enum class Scores { plain, wild, floats };

  struct Rows {  // what a row tile remembers
    alignas(64) float reference[kTileRows];  // natural logarithm, as all scores are
    alignas(64) float power[kTileRows];      // of two, a whole number: the same, where the plain path can take it
    alignas(64) float factor[kTileRows];     // of a score, softmax scale included
    alignas(64) float shift[kTileRows];      // scale * q . key_mean
    alignas(64) float size[kTileRows];       // |score| is at most this times the key's largest entry
    uint32_t fresh;                          // bit r: no score of the row was seen yet
  };

  const tamis_attend_args& a;
  const Prepared& prepared;
  const int64_t key_bytes;  // of a key row, in whole tiles
  char* s;                  // [64][32] scores: int32, or floats
  uint16_t* p;              // [32][32][2]
  char* q;                  // [tiles][key_bytes / 4][32][4]
  char* key_copy;           // the last key block where it is not a whole one
  uint16_t* value_copy;     // a block without what is not finite
  char* row_bytes;          // bf16 rows of one tile; in int8 the columns of quantise_tile
  Rows* state;
  uint32_t seen[kKeys];     // bit i: row i sees the key; where sight is not `all`
  TileScope scope;

  static int64_t bytes_of_key(const tamis_attend_args& a) { return round_up(a.head_dim * (kInt8 ? 1 : 2), 64); }
  static int64_t scratch_bytes(const tamis_attend_args& a) {
    const int64_t bytes = bytes_of_key(a), wide = round_up(a.value_dim, 16);
    return kKeys * kTileRows * 6 + kMostRows * bytes + kKeys * (bytes + 2 * wide) + (kInt8 ? W * 4 : kTileRows) * bytes +
           kMostRows / kTileRows * (int64_t)sizeof(Rows) + 64;
  }
  TileEngine(const tamis_attend_args& args, const Prepared& made, char* scratch)
      : a(args), prepared(made), key_bytes(bytes_of_key(args)) {
    s = scratch;
    p = (uint16_t*)(s + kKeys * kTileRows * 4);
    state = (Rows*)(p + kKeys * kTileRows);
    q = (char*)(state + kMostRows / kTileRows);
    key_copy = q + kMostRows * key_bytes;
    value_copy = (uint16_t*)(key_copy + kKeys * key_bytes);
    row_bytes = (char*)(value_copy + kKeys * round_up(a.value_dim, 16));
  }

  void set_queries(const Item& it, int64_t tile, const float* rows, int64_t ld, int64_t n) {
    Rows& t = state[tile];
    char* to = q + tile * kTileRows * key_bytes;
    t.fresh = n > W ? ~0u : 0xffffu;
    for (int i = 0; i < kTileRows; ++i) t.reference[i] = t.power[i] = 0.f;
    if (kInt8) {
      quantise_tile(a, it, rows, ld, key_bytes, (float*)row_bytes, (uint8_t*)to, t.factor, t.shift);
      // A key's largest entry is 127 of its steps.
      for (int i = 0; i < kTileRows; ++i) t.size[i] = fabsf(t.factor[i]) * 127.f * (float)a.head_dim;
      return;
    }
    memset(row_bytes, 0, kTileRows * key_bytes);
    for (int64_t i = 0; i < kTileRows; ++i) {
      vf sum = set1(0.f);
      for (int64_t c = 0; c < ld; c += W) {
        const vf x = load(rows + i * ld + c);
        sum = sum + vabs(x);
        _mm256_storeu_si256((__m256i*)(row_bytes + i * key_bytes + 2 * c), to_bf16(x));
      }
      t.factor[i] = a.scale, t.shift[i] = 0.f, t.size[i] = sum_lanes(sum) * fabsf(a.scale);
    }
    transpose((const float*)row_bytes, key_bytes / 4, kTileRows, (int)(key_bytes / 4), (float*)to, kTileRows);
  }

  // All row tiles against some parts. Returns the rows whose PV product is done, each part by its weight.
  double visit_parts(const Item& it, State& st, const Part* parts, int64_t count) {
    double done = 0;
    for (int64_t tile = 0; tile * kTileRows < it.rows; ++tile) {
      Item mine = it;
      mine.i0 += tile * kTileRows, mine.rows = least(kTileRows, it.rows - tile * kTileRows);
      for (int64_t n = 0; n < count; ++n) {
        st.bring_in();
        done += (double)visit(mine, st, tile, parts[n]) * parts[n].weight;
      }
    }
    return done;
  }

  const char* key_rows(const Item& it, const Part& part, int64_t at, int64_t* ld) const {
    *ld = key_bytes;
    if (prepared.key) return prepared.key + at * kKeys * key_bytes;
    if (kInt8) return (const char*)a.packed.key + packed_block(it, part) * kKeys * key_bytes;
    const char* from = row_of(a.key, it.b, it.kv_head, part.j0);
    const int64_t stride = a.key.stride[2] * 2;
    if (part.keys == kKeys) {
      *ld = stride;
      return from;
    }
    for (int64_t j = 0; j < part.keys; ++j) memcpy(key_copy + j * key_bytes, from + j * stride, key_bytes);
    memset(key_copy + part.keys * key_bytes, 0, (kKeys - part.keys) * key_bytes);
    return key_copy;
  }
  int64_t packed_block(const Item& it, const Part& part) const {
    return (it.b * a.kv_heads + it.kv_head) * a.packed.capacity + part.j0 / kKeys;
  }
  // Bit r: row r's scores against keys of this size are beyond the plain path, or are no numbers.
  uint32_t wild_rows(const Rows& t, const vf* factor, float key_size) const {
    uint32_t tame = 0;
    for (int r = 0; r < kVecs; ++r) {
      const uint32_t small = above_bits(set1(kMostScore), load(t.size + r * W) * set1(key_size)) &
                             above_bits(set1(kMostFactor), vabs(factor[r])) &
                             above_bits(set1(kMostPower), vabs(load(t.power + r * W)));
      tame |= small << (r * W);
    }
    return ~tame;
  }

  // One row tile against one part, on its way from scores to weights.
  struct Meeting {
    int64_t tile, at;  // at: the part among the prepared ones
    float* o;
    int vecs;          // vectors of rows that hold any
    bool all_seen, careful;
    float key_size;
    vf factor[kVecs];
    vf top[kVecs];     // highest scores, where they are needed
    vi most[kVecs];    // largest words of P, for each pair of keys
    vf sum[kVecs];     // of P
  };

  // Returns the rows whose PV product is done.
  int64_t visit(const Item& it, State& st, int64_t tile, const Part& part) {
    const Sight sight = part.sights[tile];
    if (sight == Sight::none) return it.rows;
    Rows& t = state[tile];
    Meeting b;
    b.tile = tile, b.at = (it.b * a.kv_heads + it.kv_head) * prepared.parts + part.j0 / kKeys;
    b.o = st.o + tile * prepared.wide * kTileRows;
    b.vecs = it.rows > W ? 2 : 1;
    b.all_seen = sight == Sight::all && !a.attn_mask.data && part.keys == kKeys;
    b.careful = !b.all_seen || a.softcap > 0;
    const float key_scale = kInt8 ? a.packed.key_scale[packed_block(it, part)] : 1.f;
    b.key_size = kInt8 ? 127.f * key_scale : prepared.key_top[b.at];
    for (int r = 0; r < kVecs; ++r) b.factor[r] = load(t.factor + r * W) * set1(key_scale);

    int64_t ld;
    const char* key = key_rows(it, part, b.at, &ld);
    tile_scores<kInt8>(key, ld, q + tile * kTileRows * key_bytes, key_bytes, s);
    if (b.careful) {
      careful_scores(it, t, sight, part, b.factor, b.top);
      for (int r = 0; r < b.vecs; ++r) {
        const vf limit = load(t.reference + r * W) + set1(kHeadroom * kLn2);
        rebase(t, r, b.top[r], above_bits(b.top[r], limit), st, b);
      }
      weights<Scores::floats>(t, 0, b);
    } else {
      raw_weights(t, st, b);
    }
    int64_t done = 0;
    const uint32_t moving = moving_rows(it, t, st, b, &done);
    if (!moving) return done;
    const uint16_t* value = prepared.value + b.at * prepared.wide * kKeys;
    if (prepared.finite[b.at] || b.all_seen) {
      tile_values(value, p, prepared.wide, b.o, moving);
    } else {
      tile_values(finite_values(value, prepared.wide, value_copy), p, prepared.wide, b.o, moving);
      add_broken_values(value, a.value_dim, part.keys, seen, p, moving, b.o);
    }
    return done;
  }

  // P from raw scores, which every row sees all of.
  void raw_weights(Rows& t, State& st, Meeting& b) {
    if (t.fresh)
      for (int r = 0; r < b.vecs; ++r) rebase(t, r, highest(r, b.factor[r]), 0, st, b);
    for (bool again = false;; again = true) {
      if (const uint32_t wild = wild_rows(t, b.factor, b.key_size))
        weights<Scores::wild>(t, wild, b);
      else
        weights<Scores::plain>(t, 0, b);
      bool left = false;
      for (int r = 0; r < b.vecs && !again; ++r) {
        // A row is left behind by its own words alone: what its neighbours do must not show in its bits.
        const __mmask32 words = _mm512_cmpgt_epu16_mask(b.most[r], _mm512_set1_epi16(kOne + 128 * kHeadroom));
        if (!words) continue;
        const uint32_t rows = _mm512_test_epi32_mask(_mm512_movm_epi16(words), set1i(-1));
        rebase(t, r, highest(r, b.factor[r]), rows, st, b);
        left = true;
      }
      if (!left) return;
    }
  }

  // Denominators, and stage 2: bit r is set where the product of vector r's weights is wanted. `done` counts its rows,
  // and those that see nothing and so skip nothing.
  uint32_t moving_rows(const Item& it, const Rows& t, State& st, Meeting& b, int64_t* done) const {
    const float threshold = a.pv_threshold ? a.pv_threshold[it.h] : 0.f;
    uint32_t moving = 0;
    for (int r = 0; r < b.vecs; ++r) {
      const int64_t rows = least(W, it.rows - r * W);
      const uint32_t real = (1u << rows) - 1;
      float *l = st.l + b.tile * kTileRows + r * W, *m = st.m + b.tile * kTileRows + r * W;
      store(l, load(l) + b.sum[r]);
      const bool sees = !b.careful || (above_bits(b.top[r], set1(-INFINITY)) & real);
      bool moves = true;
      if (threshold > 0) {
        if (!b.careful) b.top[r] = threshold > kMostWords ? highest(r, b.factor[r]) : top_of_words(t, r, b.most[r]);
        const vf yet = vmax(b.top[r], load(m));
        store(m, yet);
        moves = above_bits(b.top[r] - where_minus_inf_zero(yet), set1(-threshold)) & real;
      }
      if (moves && sees) moving |= 1u << r;
      if (moves || !sees) *done += rows;
    }
    return moving;
  }
  static vf top_of_words(const Rows& t, int r, vi most) {
    const vi high = _mm512_max_epi32(_mm512_srli_epi32(most, 16), _mm512_and_si512(most, set1i(0xffff)));
    return fma(to_float(high) - set1(kOne), set1(kLn2 / 128), load(t.reference + r * W));
  }

  // The highest score of each row of a vector, as the plain path sees them.
  vf highest(int r, vf factor) const {
    vf top = set1(-INFINITY);
    for (int64_t j = 0; j < kKeys; ++j) {
      const char* at = s + (j * kTileRows + r * W) * 4;
      top = vmax((kInt8 ? to_float(loadi(at)) : load((const float*)at)) * factor, top);
    }
    return top;
  }

  // References of rows that have none yet, and of those in `left`; O and the denominator follow.
  void rebase(Rows& t, int r, vf top, uint32_t left, State& st, const Meeting& b) {
    const vf old = load(t.reference + r * W);
    const uint32_t fresh = t.fresh >> (r * W) & 0xffff;
    const uint32_t first = fresh & above_bits(top, set1(-INFINITY));
    left &= ~fresh & above_bits(top, old);
    if (!(first | left)) return;
    const vf power = _mm512_roundscale_ps(top * set1(kLog2e), _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
    const uint32_t small = above_bits(set1(kMostPower), vabs(power));  // NaN is not
    const vf now = choose_bits(choose_bits(power * set1(kLn2), top, small), old, first | left);
    store(t.power + r * W, choose_bits(power, load(t.power + r * W), first | left));
    store(t.reference + r * W, now);
    t.fresh &= ~(first << (r * W));
    if (!left) return;
    const vf by = choose_bits(exp_of(old - now), set1(1.f), left);
    float *l = st.l + b.tile * kTileRows + r * W, *o = b.o + r * W;
    store(l, load(l) * by);
    for (int64_t c = 0; c < prepared.wide; ++c, o += kTileRows) store(o, load(o) * by);
  }

  // P of 64 keys for one or both vectors of rows, its sums and its largest words.
  template <Scores kScores>
  void weights(const Rows& t, uint32_t wild, Meeting& b) const {
    if (b.vecs == 2)
      weights<kScores, 2>(t, b.factor, wild, b.most, b.sum);
    else
      weights<kScores, 1>(t, b.factor, wild, b.most, b.sum);
  }
  template <Scores kScores, int R>
  void weights(const Rows& t, const vf* factor, uint32_t wild, vi* most, vf* sum) const {
    const vi magic = bits_of(set1(kMagic)), low7 = _mm512_set1_epi16(0x7f);
    const vi table0 = loadi(kMantissa.entry), table1 = loadi(kMantissa.entry + 64);
    // Packing takes four rows of one key and then of the other from each 128 bits: back to pairs of keys.
    const vi pairs = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    const vf unit = set1(128 * kLog2e);
    vf reference[R], by[R], start[R], total[R];
    vi largest[R];
    for (int r = 0; r < R; ++r) {
      reference[r] = load(t.reference + r * W);
      by[r] = factor[r] * unit, start[r] = set1(kMagic + kOne) - load(t.power + r * W) * set1(128.f);
      total[r] = set1(0.f), largest[r] = set1i(0);
    }
    const char* from = s;
    uint16_t* to = p;
    for (int64_t j = 0; j < kKeys; j += 2, from += 2 * kTileRows * 4, to += kTileRows * 2)
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
        vi y[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const char* at = from + (i * kTileRows + r * W) * 4;
          const vf score = kInt8 && kScores != Scores::floats ? to_float(loadi(at)) : load((const float*)at);
          vi plain, slow;
          if (kScores != Scores::floats) y[i] = plain = bits_of(fma(score, by[r], start[r]));
          if (kScores != Scores::plain) {
            const vf finished = kScores == Scores::floats ? score : score * factor[r];
            const vf x = fma(finished - reference[r], unit, set1(kMagic + kOne));
            // A NaN may be negative, which would saturate to nothing; what is too low would wrap around.
            const __mmask16 broken = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
            y[i] = slow = _mm512_mask_mov_epi32(bits_of(vmax(x, set1(kMagic))), broken, set1i(0x7fffffff));
          }
          if (kScores == Scores::wild) y[i] = _mm512_mask_mov_epi32(plain, (__mmask16)(wild >> (r * W)), slow);
          y[i] = _mm512_sub_epi32(y[i], magic);
        }
        const vi word = _mm512_shuffle_epi8(_mm512_packus_epi32(y[0], y[1]), pairs);
        largest[r] = _mm512_max_epu16(largest[r], word);
        constexpr int kChoose = 0xca;  // bits of the second where the first is 1, else of the third
        const vi mantissa = _mm512_permutex2var_epi8(table0, word, table1);
        const vi weight = _mm512_ternarylogic_epi32(low7, mantissa, word, kChoose);
        total[r] = _mm512_dpbf16_ps(total[r], (__m512bh)weight, ones);
        storei(to + r * W * 2, weight);
      }
    for (int r = 0; r < R; ++r) most[r] = largest[r], sum[r] = total[r];
  }

  // The scores as floats with every option and mask applied; -inf beyond the last key.
  void careful_scores(const Item& it, const Rows& t, Sight sight, const Part& part, const vf* factor, vf* top) {
    float* x = (float*)s;
    for (int64_t j = 0; j < part.keys; ++j)
      for (int r = 0; r < kVecs; ++r) {
        float* at = x + j * kTileRows + r * W;
        vf y = (kInt8 ? to_float(loadi(at)) : load(at)) * factor[r];
        if (kInt8 && a.softcap > 0) y = y + load(t.shift + r * W);  // it must see the scores of the unsmoothed key
        store(at, y);
      }
    for (int64_t i = part.keys * kTileRows; i < kKeys * kTileRows; i += W) store(x + i, set1(-INFINITY));
    finish_scores(a, it, sight, it.i0, it.rows, part.j0, part.keys, x, seen);
    for (int r = 0; r < kVecs; ++r) top[r] = column_max(x, part.keys, r);
  }

  void finish(const Item& it, State& st) {
    for (int64_t tile = 0; tile * kTileRows < it.rows; ++tile)
      for (int r = 0; r < kVecs; ++r)
        store(st.m + tile * kTileRows + r * W,
              choose_bits(set1(-INFINITY), load(state[tile].reference + r * W), state[tile].fresh >> (r * W)));
  }
  float lse_shift(const Item&, int64_t row) const {
    return a.softcap > 0 ? 0.f : state[row / kTileRows].shift[row % kTileRows];
  }
};
