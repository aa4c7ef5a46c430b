// precision="full": fp32 products of fp32, bf16 or fp16 inputs.
//
// Lanes are query rows. Scores are kept transposed, S[key][row], and so is the output, O[channel][row]:
//   S[j][rows] = sum over c of Q[c][rows] * K[j][c]        K read row by row, one broadcast per entry
//   O[c][rows] = O[c][rows] * alpha + sum over j of P[j][rows] * V[j][c]
// so key and value need neither packing nor transposing, any head_dim works without padding, and the row
// maximum, the sum and the rescale are vertical operations.
#pragma once
#include "prepare.h"
#include "softmax.h"

template <int R, int N>
static inline void qk_full(const float* q, const float* k, int64_t ld, int64_t dim, vf factor, float* s, vf* top) {
  vf acc[N][R];
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) acc[n][r] = set1(0.f);
  for (int64_t c = 0; c < dim; ++c) {
    vf row[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) row[r] = load(q + c * kTileRows + r * W);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      vf key = set1(k[n * ld + c]);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[n][r] = fma(row[r], key, acc[n][r]);
    }
  }
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      vf x = acc[n][r] * factor;
      store(s + n * kTileRows + r * W, x);
      top[r] = vmax(x, top[r]);
    }
}

template <int R, int N>
static inline void pv_full(const float* p, const float* v, int64_t ld, int64_t keys, const vf* alpha, float* o) {
  vf acc[N][R];
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) acc[n][r] = load(o + n * kTileRows + r * W) * alpha[r];
  for (int64_t j = 0; j < keys; ++j) {
    vf row[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) row[r] = load(p + j * kTileRows + r * W);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      vf value = set1(v[j * ld + n]);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[n][r] = fma(row[r], value, acc[n][r]);
    }
  }
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) store(o + n * kTileRows + r * W, acc[n][r]);
}

struct FullEngine {
  static constexpr int64_t kPartsAtOnce = 1;
  static constexpr int kMostVecs = 2;  // of rows in one register tile: 2 or 4
  const tamis_attend_args& a;
  float *q, *kbuf, *vbuf;    // Q^T of the item's tiles; fp32 copies of a key and a value block
  const float *k, *v;        // the current block
  int64_t k_ld, v_ld, keys;
  int value_finite;          // -1: not looked at yet

  static int64_t scratch_bytes(const tamis_attend_args& a) {
    int64_t qdim = round_up(a.head_dim, 16), vdim = round_up(a.value_dim, 16);
    return 4 * (a.geometry.block_q * qdim + kKeys * (qdim + vdim)) + 256;
  }
  FullEngine(const tamis_attend_args& args, const Prepared&, char* scratch) : a(args) {
    int64_t qdim = round_up(a.head_dim, 16), vdim = round_up(a.value_dim, 16);
    q = (float*)scratch;
    kbuf = q + a.geometry.block_q * qdim;
    vbuf = kbuf + kKeys * qdim;
    (void)vdim;
  }

  // `rows` holds the tile's queries as fp32, [32][ld], zero beyond the last row.
  void set_queries(const Item&, int64_t tile, const float* rows, int64_t ld, int64_t) {
    transpose(rows, ld, kTileRows, (int)a.head_dim, q + tile * kTileRows * a.head_dim, kTileRows);
  }

  static const float* block_rows(const tamis_tensor& t, const Item& it, int64_t j0, int64_t n, int64_t dim,
                                 float* buffer, int64_t* ld) {
    if (is_plain(t)) {
      *ld = t.stride[2];
      return (const float*)row_of(t, it.b, it.kv_head, j0);
    }
    *ld = dim;
    for (int64_t j = 0; j < n; ++j) load_row(t, it.b, it.kv_head, j0 + j, dim, buffer + j * dim);
    return buffer;
  }
  // Makes a part ready, and makes it the one at hand.
  void set_part(int64_t, const Item& it, int64_t j0, int64_t n) {
    keys = n;
    k = block_rows(a.key, it, j0, n, a.head_dim, kbuf, &k_ld);
    v = block_rows(a.value, it, j0, n, a.value_dim, vbuf, &v_ld);
    value_finite = -1;
  }
  void use_part(int64_t) {}

  template <int R>
  void scores(int64_t tile, int r0, bool, float* s, vf* top) {
    const float* rows = q + tile * kTileRows * a.head_dim + r0 * W;
    const vf factor = set1(a.scale);
    int64_t j = 0;
    s += r0 * W;
    for (; j + kFullTile <= keys; j += kFullTile)
      qk_full<R, kFullTile>(rows, k + j * k_ld, k_ld, a.head_dim, factor, s + j * kTileRows, top);
    for (; j < keys; ++j) qk_full<R, 1>(rows, k + j * k_ld, k_ld, a.head_dim, factor, s + j * kTileRows, top);
  }

  // P = e^(S - max) in place; `sum` gets its column sums. The maximum is the running one.
  template <int R>
  void exponentials(int r0, float* s, const vf*, const vf* top, vf* sum) {
    vf base[R];
    for (int r = 0; r < R; ++r) base[r] = where_minus_inf_zero(top[r]), sum[r] = set1(0.f);
    for (int64_t j = 0; j < keys; ++j)
      for (int r = 0; r < R; ++r) {
        float* at = s + j * kTileRows + (r0 + r) * W;
        vf p = exp_of(load(at) - base[r]);
        sum[r] = sum[r] + p;
        store(at, p);
      }
  }
  static vf top_score(int, vf top) { return top; }
  // What the block's weights must be multiplied with to be relative to the running maximum.
  static vf share(vf, vf) { return set1(1.f); }

  template <int R>
  void accumulate(int r0, const float* s, const vf*, const vf* alpha, float* o) {
    int64_t c = 0;
    s += r0 * W, o += r0 * W;
    for (; c + kFullTile <= a.value_dim; c += kFullTile)
      pv_full<R, kFullTile>(s, v + c, v_ld, keys, alpha, o + c * kTileRows);
    for (; c < a.value_dim; ++c) pv_full<R, 1>(s, v + c, v_ld, keys, alpha, o + c * kTileRows);
  }

  // A hidden value that is NaN or infinite would leak through 0 * NaN: then only seen keys are added.
  bool needs_care(uint32_t) {
    if (value_finite < 0) {
      value_finite = 1;
      for (int64_t j = 0; j < keys && value_finite; ++j) value_finite = all_finite(v + j * v_ld, a.value_dim);
    }
    return !value_finite;
  }
  void accumulate_carefully(const uint32_t* seen, const float* p, const float* alpha, float* o, uint32_t active) {
    for (int64_t c = 0; c < a.value_dim; ++c)
      for (int r = 0; r < kTileRows; r += W) {
        float* at = o + c * kTileRows + r;
        const vf before = load(at);
        vf sum = before * load(alpha + r);
        for (int64_t j = 0; j < keys; ++j) {
          vf with = fma(load(p + j * kTileRows + r), set1(v[j * v_ld + c]), sum);
          sum = choose_bits(with, sum, seen[j] >> r);
        }
        store(at, choose_bits(sum, before, active >> r));
      }
  }
  void unsmooth(int64_t, int, float*) const {}
  float lse_shift(const Item&, int64_t) const { return 0.f; }
};
