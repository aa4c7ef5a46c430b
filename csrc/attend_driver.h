// Online softmax over the kept key blocks of one block of query rows, and the loop over all of them.
#pragma once
#include <omp.h>
#include <stdlib.h>

#include "engine_full.h"
#include "engine_int8.h"
#include "prepare.h"
#include "schedule.h"
#include "state.h"
#ifdef TAMIS_AMX
#include "engine_tiles.h"
#endif
#ifdef TAMIS_PAIRS
#include "engine_pairs.h"
typedef PairEngine EightBitEngine;
#else
typedef Int8Engine EightBitEngine;
#endif

static inline bool group_moves(const vf& block_top, const vf& top, const float* real, float threshold) {
  // `real` is -inf on rows beyond the last one. No row with block_top - top > -threshold: skip.
  return any_above(block_top - where_minus_inf_zero(top) + load(real), set1(-threshold));
}

// Of the running output: whole vectors and tiles.
static inline int64_t channels(const tamis_attend_args& a) { return round_up(a.value_dim, 16); }

template <class Engine, int R>
static void accumulate_rows(Engine& e, int64_t tile, int r0, const State& st, const vf* share, const vf* alpha) {
  e.template accumulate<R>(r0, st.s, share + r0, alpha + r0, st.o + tile * channels(e.a) * kTileRows);
}

// One tile of 32 rows against the engine's current block. Returns the rows whose PV product was done.
template <class Engine>
static int64_t visit_tile(Engine& e, const Item& it, State& st, int64_t tile, int64_t rows, Sight sight, int64_t j0,
                          float threshold, const float* real) {
  constexpr int kVecs = kTileRows / W;
  const tamis_attend_args& a = e.a;
  const int vecs = (int)((rows + W - 1) / W);
  const bool plain = sight == Sight::all && !a.attn_mask.data && !(a.softcap > 0);
  const bool kept = keeps_scores(a);  // and not `plain`: a row's bits would depend on what its neighbours see
  float *m = st.m + tile * kTileRows, *l = st.l + tile * kTileRows;
  vf block_top[kVecs], top[kVecs], alpha[kVecs], share[kVecs];
  for (int r = 0; r < vecs; ++r) block_top[r] = set1(-INFINITY);
  for (int r = 0; r < vecs;) {
    if (Engine::kMostVecs >= 4 && r + 3 < vecs) {
      e.template scores<Engine::kMostVecs>(tile, r, kept, st.s, block_top + r);
      r += 4;
    } else if (r + 1 < vecs) {
      e.template scores<2>(tile, r, kept, st.s, block_top + r);
      r += 2;
    } else {
      e.template scores<1>(tile, r, kept, st.s, block_top + r);
      r += 1;
    }
  }
  uint32_t seen[kKeys];
  if (!plain) {
    if (a.softcap > 0) e.unsmooth(tile, vecs, st.s);
    finish_scores(a, it, sight, it.i0 + tile * kTileRows, rows, j0, e.keys, st.s, seen);
    for (int r = 0; r < vecs; ++r) block_top[r] = e.top_score(r, column_max(st.s, e.keys, r));
  }
  bool active[kVecs], blind[kVecs];  // blind: sees no key of this block, so nothing was skipped
  for (int r = 0; r < vecs; ++r) {
    vf old = load(m + r * W);
    top[r] = vmax(block_top[r], old);
    alpha[r] = exp_of(old - where_minus_inf_zero(top[r]));
    share[r] = Engine::share(block_top[r], top[r]);
    active[r] = threshold == 0 || group_moves(block_top[r], top[r], real + r * W, threshold);
    blind[r] = threshold > 0 && !any_above(block_top[r] + load(real + r * W), set1(-INFINITY));
  }
  if (W < kGroupRows && threshold > 0)
    for (int r = 0; r < vecs; ++r)
      for (int i = r / (kGroupRows / W) * (kGroupRows / W), end = i + kGroupRows / W; i < end && i < vecs; ++i)
        active[r] |= active[i], blind[r] &= blind[i];
  for (int r = 0; r < vecs; r += 2) {
    vf sum[2];
    if (r + 1 < vecs)
      e.template exponentials<2>(r, st.s, block_top + r, top + r, sum);
    else
      e.template exponentials<1>(r, st.s, block_top + r, top + r, sum);
    for (int i = r; i < vecs && i < r + 2; ++i) {
      store(m + i * W, top[i]);
      store(l + i * W, fma(load(l + i * W), alpha[i], sum[i - r] * share[i]));
    }
  }
  int64_t done = 0;
  uint32_t active_rows = 0;
  for (int r = 0; r < vecs; ++r) {
    if (active[r] || blind[r]) done += least(W, rows - r * W);
    if (active[r]) {
      active_rows |= ((1u << W) - 1) << (r * W);
    }
  }
  if (!plain && e.needs_care(active_rows)) {
    float factor[kTileRows];
    for (int r = 0; r < vecs; ++r) store(factor + r * W, alpha[r]);
    e.accumulate_carefully(seen, st.s, factor, st.o + tile * channels(a) * kTileRows, active_rows);
    return done;
  }
  for (int r = 0; r < vecs;) {
    if (Engine::kMostVecs >= 4 && r + 3 < vecs && active[r] && active[r + 1] && active[r + 2] && active[r + 3]) {
      accumulate_rows<Engine, Engine::kMostVecs>(e, tile, r, st, share, alpha);
      r += 4;
    } else if (r + 1 < vecs && active[r] && active[r + 1]) {
      accumulate_rows<Engine, 2>(e, tile, r, st, share, alpha);
      r += 2;
    } else {
      if (active[r]) accumulate_rows<Engine, 1>(e, tile, r, st, share, alpha);
      r += 1;
    }
  }
  return done;
}

// All row tiles against some parts, tile by tile: its output stays in the first cache, while keys and values come from the
// second. Returns the rows whose PV product is done, each part by its weight.
template <class Engine>
static double visit_parts(Engine& e, const Item& it, State& st, const Part* parts, int64_t count) {
  const float threshold = e.a.pv_threshold ? e.a.pv_threshold[it.h] : 0.f;
  float real[kTileRows];
  double done = 0;
  for (int64_t n = 0; n < count; ++n) e.set_part(n, it, parts[n].j0, parts[n].keys);
  for (int64_t tile = 0; tile * kTileRows < it.rows; ++tile) {
    const int64_t rows = least(kTileRows, it.rows - tile * kTileRows);
    for (int64_t i = 0; i < kTileRows; ++i) real[i] = i < rows ? 0.f : -INFINITY;
    for (int64_t n = 0; n < count; ++n) {
      const Part& part = parts[n];
      int64_t now = rows;
      if (part.sights[tile] != Sight::none) {
        e.use_part(n);
        st.bring_in();
        now = visit_tile(e, it, st, tile, rows, part.sights[tile], part.j0, threshold, real);
      }
      done += (double)now * part.weight;
    }
  }
  return done;
}
template <class Engine>
static void finish_parts(Engine&, const Item&, State&) {}
#ifdef TAMIS_AMX
template <bool kInt8>
static double visit_parts(TileEngine<kInt8>& e, const Item& it, State& st, const Part* parts, int64_t count) {
  return e.visit_parts(it, st, parts, count);
}
template <bool kInt8>
static void finish_parts(TileEngine<kInt8>& e, const Item& it, State& st) {
  e.finish(it, st);
}
#endif

// Divides by the denominator, adds the sink to it, writes output and log-sum-exp.
template <class Engine>
static void finish_item(Engine& e, const Item& it, State& st) {
  const tamis_attend_args& a = e.a;
  const int64_t dim = a.value_dim, head = it.b * a.heads + it.h;
  for (int64_t tile = 0; tile * kTileRows < it.rows; ++tile) {
    const int64_t rows = least(kTileRows, it.rows - tile * kTileRows);
    float* o = st.o + tile * channels(a) * kTileRows;
    float inverse[kTileRows];
    for (int64_t i = 0; i < kTileRows; ++i) {
      const int64_t at = tile * kTileRows + i;
      float m = st.m[at], l = st.l[at];
      // Scores of a smoothed key are lower by the query's product with the mean: put it back first.
      // In fp64, since l is near 1 where one key has all the weight.
      float lse = l == 0 ? -INFINITY
                         : (float)((double)m + log((double)l) + (i < rows ? (double)e.lse_shift(it, at) : 0.0));
      float share = 1.f;
      if (a.sink_logits && i < rows) {
        const float sink = a.sink_logits[it.h], high = lse > sink ? lse : sink;
        const float with = l == 0 ? sink : high + log1pf(expf((lse > sink ? sink : lse) - high));
        share = l == 0 ? 0.f : expf(lse - with);
        lse = with;
      }
      inverse[i] = l == 0 ? 0.f : share / l;
      if (i < rows) a.lse[head * a.geometry.q_len + it.i0 + at] = lse;
    }
    const int64_t ld = round_up(dim, 16);
    transpose(o, kTileRows, (int)dim, kTileRows, st.rows, ld);
    for (int64_t i = 0; i < rows; ++i)
      store_row(a.output, (head * a.geometry.q_len + it.i0 + tile * kTileRows + i) * dim, a.query.dtype,
                st.rows + i * ld, inverse[i], dim);
  }
}

// The key blocks that a block of query rows visits; `list` null: all.
struct Blocks {
  const int32_t* list;
  int64_t count;
};

// A block of query rows against all its key blocks. Returns how many PV products were done, counting one row
// against one key block as 1.
template <class Engine>
static double attend_rows(Engine& e, const Item& it, State& st, const Blocks& blocks) {
  const tamis_attend_args& a = e.a;
  const tamis_geometry& g = a.geometry;
  const int64_t tiles = blocks_of(it.rows, kTileRows), ld = round_up(a.head_dim, 16);
  Part parts[Engine::kPartsAtOnce];
  int64_t waiting = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t rows = least(kTileRows, it.rows - tile * kTileRows);
    const int64_t first = it.i0 + tile * kTileRows;
    if (is_plain(a.query) && rows == kTileRows && a.head_dim == ld) {
      e.set_queries(it, tile, (const float*)row_of(a.query, it.b, it.h, first), a.query.stride[2], rows);
      continue;
    }
    memset(st.rows + rows * ld, 0, (kTileRows - rows) * ld * 4);
    for (int64_t i = 0; i < rows; ++i) {
      float* row = st.rows + i * ld;
      load_row(a.query, it.b, it.h, first + i, a.head_dim, row);
      for (int64_t c = a.head_dim; c < ld; ++c) row[c] = 0.f;
    }
    e.set_queries(it, tile, st.rows, ld, rows);
  }
  for (int64_t i = 0; i < tiles * kTileRows; ++i) st.m[i] = -INFINITY, st.l[i] = 0.f;
  memset(st.o, 0, tiles * kTileRows * channels(a) * 4);

  st.pv = 0;
  for (int64_t n = 0; n < blocks.count; ++n) {
    const int64_t kb = blocks.list ? blocks.list[n] : n;
    if (!block_visible(g, it.b, it.h, it.qb, kb)) continue;
    const int64_t j_end = least((kb + 1) * g.block_kv, g.kv_len);
    const double weight = 1. / (double)blocks_of(j_end - kb * g.block_kv, kKeys);
    for (int64_t j0 = kb * g.block_kv; j0 < j_end; j0 += kKeys) {
      Part& part = parts[waiting++];
      part.j0 = j0, part.keys = least(kKeys, j_end - j0), part.weight = weight;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t i0 = it.i0 + tile * kTileRows, i1 = least(i0 + kTileRows, it.i0 + it.rows);
        part.sights[tile] = sight(g, it.b, it.qb, kb, i0, i1, j0, j0 + part.keys);
      }
      if (waiting < Engine::kPartsAtOnce) continue;
      st.pv += visit_parts(e, it, st, parts, waiting);
      waiting = 0;
    }
  }
  st.pv += visit_parts(e, it, st, parts, waiting);
  finish_parts(e, it, st);
  finish_item(e, it, st);
  return st.pv;
}

static Ahead queries_of(const tamis_attend_args& a, const Item& it) {
  return rows_ahead(a.query, it.b, it.h, it.i0, it.i0 + it.rows, a.head_dim);
}
static Ahead output_of(const tamis_attend_args& a, const Item& it) {
  const int64_t bytes = a.value_dim * dtype_size(a.query.dtype);
  const int64_t row = (it.b * a.heads + it.h) * a.geometry.q_len + it.i0;
  return {(const char*)a.output + row * bytes, 1, 0, it.rows * bytes, 0};
}

// Returns false where the row of the mask is corrupt: nothing out of range is ever read.
template <class Engine>
static bool attend_item(Engine& e, const Item& it, State& st) {
  const tamis_attend_args& a = e.a;
  const tamis_geometry& g = a.geometry;
  const int64_t kv_blocks = blocks_of(g.kv_len, g.block_kv);
  Blocks blocks{nullptr, kv_blocks};
  if (a.kv_num_blocks) {
    blocks.count = a.kv_num_blocks[it.b * a.num_stride[0] + it.h * a.num_stride[1] + it.qb * a.num_stride[2]];
    blocks.list = a.kv_indices + it.b * a.idx_stride[0] + it.h * a.idx_stride[1] + it.qb * a.idx_stride[2];
    if (blocks.count < 0 || blocks.count > a.max_blocks) return false;
    for (int64_t n = 0; n < blocks.count; ++n)
      if (blocks.list[n] < 0 || blocks.list[n] >= kv_blocks || (n && blocks.list[n] <= blocks.list[n - 1])) return false;
  }
  const double visible = (double)visible_blocks(g, it.b, it.h, it.qb);
  double qk = 0;
  for (int64_t n = 0; n < blocks.count; ++n)
    qk += block_visible(g, it.b, it.h, it.qb, blocks.list ? blocks.list[n] : n);
  st.spread_lines((int64_t)qk * blocks_of(g.block_kv, kKeys) * blocks_of(it.rows, kTileRows));
  const double pv = attend_rows(e, it, st, blocks);
  double* counts = a.counts + ((it.b * a.heads + it.h) * blocks_of(g.q_len, g.block_q) + it.qb) * 3;
  counts[0] = visible, counts[1] = qk, counts[2] = pv / (double)it.rows;
  return true;
}

template <class Engine>
static void attend_together(const tamis_attend_args& a, const Prepared& prepared, const int64_t* order, Team& team) {
  const tamis_geometry& g = a.geometry;
  const int64_t q_blocks = blocks_of(g.q_len, g.block_q), items = a.batch * a.heads * q_blocks;
  const int64_t rows = g.block_q, vdim = a.value_dim, wide = round_up(greatest(a.head_dim, vdim), 16);
  const int64_t floats = 2 * rows + rows * channels(a) + kKeys * kTileRows + kTileRows * wide;
  const int64_t own = round_up(floats * 4, 64);
  char* scratch = (char*)aligned_alloc(64, round_up(own + Engine::scratch_bytes(a), 64));
  if (!scratch) fail(team, TAMIS_NO_MEMORY);
  State st;
  st.o = (float*)scratch;
  st.s = st.o + rows * channels(a);
  st.rows = st.s + kKeys * kTileRows;
  st.m = st.rows + kTileRows * wide;
  st.l = st.m + rows;
  {
    Engine e(a, prepared, scratch ? scratch + own : nullptr);
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t n = 0; n < items; ++n) {
      if (!scratch || failed(team)) continue;
      const Item it = item_at(a, order[n], q_blocks);
      const int64_t next = n + a.threads;
      st.next = next < items ? queries_of(a, item_at(a, order[next], q_blocks)) : Ahead{};
      st.out = output_of(a, it);
      if (!attend_item(e, it, st)) fail(team, TAMIS_CORRUPT_MASK);
    }
  }
  free(scratch);
}

template <class Engine>
static int attend_all(const tamis_attend_args& a, Prepared& prepared) {
  const int64_t q_blocks = blocks_of(a.geometry.q_len, a.geometry.block_q), items = a.batch * a.heads * q_blocks;
  Team team;
  if (items == 0) return TAMIS_OK;
  int64_t* order = items_in_order(a, items, q_blocks);
  if (!order) return TAMIS_NO_MEMORY;
#pragma omp parallel num_threads(a.threads)
  {
    prepare_together(a, prepared, team);
    attend_together<Engine>(a, prepared, order, team);
  }
  free(order);
  return team.error;
}

static int attend(const tamis_attend_args* args) {
  tamis_attend_args a = *args;
  Prepared prepared;
  if (int error = make_room(a, prepared)) return error;
#ifdef TAMIS_AMX
  if (takes_tiles(a))
    return a.int8 ? attend_all<TileEngine<true>>(a, prepared) : attend_all<TileEngine<false>>(a, prepared);
#endif
  return a.int8 ? attend_all<EightBitEngine>(a, prepared) : attend_all<FullEngine>(a, prepared);
}
