// Which rows see which keys: by block for choosing work, by pair for masking a tile.
//
// A row sees a key iff their segments are equal and not negative, q_pos >= kv_pos under causal, and
// |q_pos - kv_pos| < window. Without explicit positions key j is at j and row i at i + kv_len - q_len.
#pragma once
#include "attend.h"

enum class Sight { none, some, all };

struct Span {
  int64_t pos_min, pos_max, seg_min, seg_max;
};

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t blocks_of(int64_t n, int64_t block) { return (n + block - 1) / block; }
static inline bool is_explicit(const tamis_geometry& g) { return g.q_bounds != nullptr; }

static inline Span span_at(const int64_t* bounds, int64_t batch_stride, int64_t b, int64_t block) {
  const int64_t* p = bounds + b * batch_stride + block * 4;
  return Span{p[0], p[1], p[2], p[3]};
}

// a - b >= distance (which is positive), without overflow whatever the positions.
static inline bool ahead_by(int64_t a, int64_t b, int64_t distance) {
  return a > b && (uint64_t)a - (uint64_t)b >= (uint64_t)distance;
}

static inline Sight sight_of(const tamis_geometry& g, const Span& q, const Span& k) {
  if (q.pos_min > q.pos_max || k.pos_min > k.pos_max) return Sight::none;  // nothing but padding
  if (q.seg_max < k.seg_min || k.seg_max < q.seg_min) return Sight::none;
  bool all = q.seg_min == q.seg_max && k.seg_min == k.seg_max;
  if (g.causal) {
    if (q.pos_max < k.pos_min) return Sight::none;
    all = all && q.pos_min >= k.pos_max;
  }
  if (g.window) {
    if (ahead_by(q.pos_min, k.pos_max, g.window) || ahead_by(k.pos_min, q.pos_max, g.window)) return Sight::none;
    all = all && !ahead_by(q.pos_max, k.pos_min, g.window) && !ahead_by(k.pos_max, q.pos_min, g.window);
  }
  return all ? Sight::all : Sight::some;
}

static inline bool holds_padding(const int64_t* segments, int64_t offset, int64_t first, int64_t end) {
  int64_t lowest = 0;
  for (int64_t i = first; segments && i < end; ++i) lowest = least(lowest, segments[offset + i]);
  return lowest < 0;
}

// Rows [i0, i1) of query block qb against keys [j0, j1) of key block kb.
static inline Sight sight(const tamis_geometry& g, int64_t b, int64_t qb, int64_t kb, int64_t i0, int64_t i1,
                          int64_t j0, int64_t j1) {
  if (is_explicit(g)) {
    Sight s = sight_of(g, span_at(g.q_bounds, g.q_bounds_stride, b, qb),
                       span_at(g.kv_bounds, g.kv_bounds_stride, b, kb));
    // The bounds leave padding out, so "all" still needs a look at who is padding.
    return s == Sight::all && (holds_padding(g.q_seg, b * g.q_batch_stride, i0, i1) ||
                               holds_padding(g.kv_seg, b * g.kv_batch_stride, j0, j1))
               ? Sight::some
               : s;
  }
  int64_t shift = g.kv_len - g.q_len;
  return sight_of(g, Span{i0 + shift, i1 - 1 + shift, 0, 0}, Span{j0, j1 - 1, 0, 0});
}

static inline bool block_visible(const tamis_geometry& g, int64_t b, int64_t h, int64_t qb, int64_t kb) {
  const int64_t *s = g.visible_stride;
  if (g.visible && !g.visible[b * s[0] + h * s[1] + qb * s[2] + kb * s[3]]) return false;
  int64_t i0 = qb * g.block_q, j0 = kb * g.block_kv;
  return sight(g, b, qb, kb, i0, least(i0 + g.block_q, g.q_len), j0, least(j0 + g.block_kv, g.kv_len)) !=
         Sight::none;
}

// How many key blocks query block qb sees any of. Consecutive positions see one range of them, which needs no look at
// every key block: that would cost more than the work where few of very many are kept.
static inline int64_t visible_blocks(const tamis_geometry& g, int64_t b, int64_t h, int64_t qb) {
  const int64_t kv_blocks = blocks_of(g.kv_len, g.block_kv);
  if (g.visible || is_explicit(g)) {
    int64_t number = 0;
    for (int64_t kb = 0; kb < kv_blocks; ++kb) number += block_visible(g, b, h, qb, kb);
    return number;
  }
  const int64_t i0 = qb * g.block_q, shift = g.kv_len - g.q_len;
  int64_t first = 0, last = g.kv_len - 1;  // positions
  if (g.window) {
    const int64_t reach = least(g.window, g.q_len + g.kv_len) - 1;
    first = greatest(first, i0 + shift - reach);
    last = least(last, least(i0 + g.block_q, g.q_len) - 1 + shift + reach);
  }
  if (g.causal) last = least(last, least(i0 + g.block_q, g.q_len) - 1 + shift);
  return first > last ? 0 : last / g.block_kv - first / g.block_kv + 1;
}

// Bit i of the result: row i0 + i sees key j. At most 32 rows.
static inline uint32_t rows_seeing(const tamis_geometry& g, int64_t b, int64_t i0, int64_t rows, int64_t j) {
  uint32_t live = rows >= 32 ? ~0u : (1u << rows) - 1;
  if (!is_explicit(g)) {
    // Rows lo..hi-1 see key j: one interval, since positions are consecutive.
    int64_t first = i0 + g.kv_len - g.q_len, lo = 0, hi = rows;
    if (g.causal) lo = j - first;
    if (g.window) {
      lo = greatest(lo, j - g.window + 1 - first);
      hi = least(hi, j + g.window - first);
    }
    lo = greatest(lo, 0);
    if (lo >= hi) return 0;
    return live & (~0u << lo) & (hi >= 32 ? ~0u : (1u << hi) - 1);
  }
  int64_t shift = g.kv_len - g.q_len, qs = b * g.q_batch_stride, ks = b * g.kv_batch_stride;
  int64_t k_pos = g.kv_pos ? g.kv_pos[ks + j] : j;
  int64_t k_seg = g.kv_seg ? g.kv_seg[ks + j] : 0;
  if (k_seg < 0) return 0;
  uint32_t bits = 0;
  for (int64_t i = 0; i < rows; ++i) {
    int64_t q_pos = g.q_pos ? g.q_pos[qs + i0 + i] : i0 + i + shift;
    int64_t q_seg = g.q_seg ? g.q_seg[qs + i0 + i] : 0;
    bool sees = q_seg == k_seg && (!g.causal || q_pos >= k_pos) &&
                (!g.window || !(ahead_by(q_pos, k_pos, g.window) || ahead_by(k_pos, q_pos, g.window)));
    bits |= (uint32_t)sees << i;
  }
  return bits;
}
