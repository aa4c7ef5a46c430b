// precision="int8" where the only product of bytes is unsigned x signed, added up in pairs to 16 bits (vpmaddubsw).
//
// Two products of any signs can leave 16 bits: 2 * 255 * 127. Two of opposite signs cannot. So where both bytes of a
// pair of a key (or of a value channel) have the same sign, the second is negated, and so is its query byte (or
// probability): u -> 255 - u, which is a flip of all its bits.
//
//   u0 k0 + u1 k1 = u0 k0 + (255 - u1) (-k1) + 255 k1        |u0 k0 + (255 - u1) (-k1)| <= 255 * 127 < 2^15
//
// Rows of a tile are kept in four forms, one for each choice among the two pairs of four bytes; every four bytes of a
// key have a form that they multiply, and the sum of 255 k1 is where the accumulators start. Three instructions for 32
// products and no work for signs. Lanes, scales and formulas are those of engine_int8.h.
#pragma once
#include "engine_int8.h"

constexpr int kForms = 4;
constexpr int64_t kFormBytes = kTileRows * 4;         // four bytes of each row
constexpr int64_t kGroupBytes = kForms * kFormBytes;  // the same in all forms
static_assert(kFormBytes == kFirstPairForm && 2 * kFormBytes == kSecondPairForm, "oppose_pairs gives offsets of forms");

// One block of keys or values, ready to be multiplied.
struct Opposed {
  int8_t* bytes;   // [lines][ld], no pair of one sign
  uint16_t* form;  // [lines][ld / 4]: offset of the form
  int32_t* start;  // [lines]
  int64_t ld;

  static int64_t size(int64_t lines, int64_t ld) { return round_up(lines * (ld + ld / 2 + 4), 64); }
  char* place(char* at, int64_t lines, int64_t line_bytes) {
    ld = line_bytes;
    start = (int32_t*)at;
    bytes = (int8_t*)(start + lines);
    form = (uint16_t*)(bytes + lines * ld);
    return at + size(lines, ld);
  }
  // `starts` would be those of the lines as they come. lines * ld is a multiple of 64.
  void fill(const int8_t* from, int64_t lines, const int32_t* starts) const {
    int8_t* const to = bytes;
    uint16_t* const forms = form;
    for (int64_t i = 0; i < lines; ++i) start[i] = starts[i];
    if (ld % 64 == 0) {
      for (int64_t n = 0, i = 0; n < lines; ++n) {
        vi flipped = set1i(0);
        for (const int64_t end = i + ld; i < end; i += 64) flipped = addi(flipped, oppose_pairs(from + i, to + i, forms + i / 4));
        start[n] += 255 * sum_lanes_of(flipped);
      }
      return;
    }
    for (int64_t i = 0; i < lines * ld; i += 64) {
      oppose_pairs(from + i, to + i, forms + i / 4);
      for (int64_t c = i + 1; c < i + 64; c += 2)
        if (to[c] != from[c]) start[c / ld] += 255 * from[c];
    }
  }
};

// Sums of N lines over their first `fours` groups, for R vectors of rows.
template <int R, int N>
static inline void dot_lines(const uint8_t* rows, const Opposed& b, int64_t line, int64_t fours, vi (&acc)[N][R]) {
  const int8_t* bytes = b.bytes + line * b.ld;
  const uint16_t* form = b.form + line * (b.ld / 4);
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) {
    const vi start = set1i(b.start[line + n]);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) acc[n][r] = start;
  }
  for (int64_t g = 0; g < fours; ++g, rows += kGroupBytes)
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      const vi other = broadcast4(bytes + n * b.ld + g * 4);
      const uint8_t* row = rows + form[n * (b.ld / 4) + g];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[n][r] = dot4(acc[n][r], loadi(row + r * W * 4), other);
    }
}

// R vectors of rows in all forms.
static inline void store_forms(uint8_t* to, vi rows) {
  storei(to, rows);
  storei(to + kFormBytes, rows ^ set1i(0x0000ff00));
  storei(to + 2 * kFormBytes, rows ^ set1i((int32_t)0xff000000));
  storei(to + 3 * kFormBytes, rows ^ set1i((int32_t)0xff00ff00));
}

struct PairEngine : Int8Engine {
  static constexpr int64_t kPartsAtOnce = 1;  // the opposed bytes of more would not stay in the first cache
  static constexpr int kMostVecs = kTileRows / W >= 4 ? 4 : 2;
  template <int R>
  static constexpr int kLines = R == kMostVecs ? kQkTile : 4;  // of a register tile
  uint8_t *q_forms, *p_forms;  // [tiles][dim4 / 4] and [16] of [4 forms][32][4]
  Opposed key, value;

  static int64_t scratch_bytes(const tamis_attend_args& a) {
    return round_up(Int8Engine::scratch_bytes(a), 64) + a.geometry.block_q * kForms * a.packed.dim4 +
           kKeys / 4 * kGroupBytes + Opposed::size(kKeys, a.packed.dim4) + Opposed::size(a.value_dim, kKeys) +
           64;
  }
  PairEngine(const tamis_attend_args& args, const Prepared& made, char* scratch) : Int8Engine(args, made, scratch) {
    q_forms = (uint8_t*)scratch + round_up(Int8Engine::scratch_bytes(a), 64);
    p_forms = q_forms + a.geometry.block_q * kForms * a.packed.dim4;
    char* rest = (char*)p_forms + kKeys / 4 * kGroupBytes;
    rest = key.place(rest, kKeys, a.packed.dim4);
    value.place(rest, a.value_dim, kKeys);
  }

  void set_queries(const Item& it, int64_t tile, const float* rows, int64_t ld, int64_t count) {
    Int8Engine::set_queries(it, tile, rows, ld, count);
    const int64_t dim = a.packed.dim4;
    const uint8_t* from = q + tile * kTileRows * dim;
    uint8_t* to = q_forms + tile * kTileRows * dim * kForms;
    for (int64_t g = 0; g < dim / 4; ++g)
      for (int64_t i = 0; i < kFormBytes; i += 4 * W) store_forms(to + g * kGroupBytes + i, loadi(from + g * kFormBytes + i));
  }

  void set_part(int64_t, const Item& it, int64_t j0, int64_t n) {
    Int8Engine::set_part(0, it, j0, n);
    Int8Engine::use_part(0);
    key.fill(a.packed.key + kv_block * kKeys * a.packed.dim4, kKeys, key_start);
    value.fill(a.packed.value + kv_block * kKeys * a.value_dim, a.value_dim, value_start);
  }
  void use_part(int64_t) {}

  template <bool kWide, int R, int N>
  void qk(const uint8_t* rows, int64_t j, const vf* factor, float* s, vf* top) const {
    vi acc[N][R];
    dot_lines<R, N>(rows, key, j, key.ld / 4, acc);
    put_scores<kWide, R, N>(acc, factor, s + j * kTileRows, top);
  }
  template <int R>
  void scores(int64_t tile, int r0, bool kept, float* s, vf* top) {
    const uint8_t* rows = q_forms + tile * kTileRows * kForms * key.ld + r0 * W * 4;
    const vf* factor = set_factors<R>(tile, r0);
    s += r0 * W;
    is_wide() ? qk_all<true, R>(rows, factor, s, top) : qk_all<false, R>(rows, factor, s, top);
    settle<R>(r0, kept, s, top);
  }
  template <bool kWide, int R>
  void qk_all(const uint8_t* rows, const vf* factor, float* s, vf* top) const {
    int64_t j = 0;
    for (; j + kLines<R> <= keys; j += kLines<R>) qk<kWide, R, kLines<R>>(rows, j, factor, s, top);
    for (; j < keys; ++j) qk<kWide, R, 1>(rows, j, factor, s, top);
  }

  template <int R>
  void exponentials(int r0, float* s, const vf* block_top, const vf*, vf* sum) {
    weigh_block<R>(r0, s, block_top, sum,
                   [this](int64_t g, int r, vi bytes) { store_forms(p_forms + g * kGroupBytes + r * W * 4, bytes); });
  }

  template <int R, int N>
  void pv(const uint8_t* rows, int64_t c, int64_t fours, const vf* share, const vf* alpha, float* o) const {
    vi acc[N][R];
    dot_lines<R, N>(rows, value, c, fours, acc);
    put_values<R, N>(acc, a.packed.value_scale + kv_block * a.value_dim + c, share, alpha, o + c * kTileRows);
  }
  template <int R>
  void accumulate(int r0, const float*, const vf* shares, const vf* alpha, float* o) const {
    const uint8_t* rows = p_forms + r0 * W * 4;
    const int64_t fours = (keys + 3) / 4;
    vf share[R];
    for (int r = 0; r < R; ++r) share[r] = shares[r] * set1(1.f / kProbLevels);
    int64_t c = 0;
    o += r0 * W;
    for (; c + kLines<R> <= a.value_dim; c += kLines<R>) pv<R, kLines<R>>(rows, c, fours, share, alpha, o);
    for (; c < a.value_dim; ++c) pv<R, 1>(rows, c, fours, share, alpha, o);
  }
};
