// What a call makes for itself before any query is looked at: key and value in 8 bits where the caller brought
// none, value in bf16 and transposed for tiles. Only of the blocks that some query visits.
#pragma once
#include "geometry.h"
#include "pack.h"

struct Prepared {
  char* memory = nullptr;
  uint8_t* used = nullptr;    // [batch, kv_heads, parts]: a part is 64 keys
  uint16_t* value = nullptr;  // tiles: bf16 [batch, kv_heads, parts, wide channels, 64]
  uint8_t* finite = nullptr;  // tiles: whether a part's values all are
  float* key_top = nullptr;   // tiles, bf16 key: a part's largest absolute entry, NaN where one is not finite
  char* key = nullptr;        // tiles: [batch, kv_heads, parts, 64, key_bytes], where rows of key are not whole tiles
  int64_t parts = 0, wide = 0, key_bytes = 0;
  bool pack = false, smooth = false;  // whether the call quantises for itself, and subtracts a mean key
  KeySums sums;

  Prepared() = default;
  Prepared(const Prepared&) = delete;
  Prepared& operator=(const Prepared&) = delete;
  ~Prepared() { free(memory); }
};

// Whether the call runs on tiles: only where the caller allows for bf16.
static inline bool takes_tiles(const tamis_attend_args& a) {
#ifdef TAMIS_AMX
  const bool all_bf16 = a.query.dtype == TAMIS_BF16 && a.key.dtype == TAMIS_BF16 && a.value.dtype == TAMIS_BF16;
  return a.bf16_products && (a.int8 || all_bf16);
#else
  (void)a;
  return false;
#endif
}

// Hands out pieces of one allocation; the first round, without memory, finds its size.
struct Pieces {
  char* base;
  int64_t at = 0;
  template <class T>
  void take(T*& piece, int64_t count) {
    if (base) piece = (T*)(base + at);
    at += round_up(count * (int64_t)sizeof(T), 64);
  }
};

static void lay_out(Pieces& pieces, const tamis_attend_args& a, bool pack, bool tiles, Prepared& p, tamis_packed& k) {
  const int64_t heads = a.batch * a.kv_heads, n = heads * p.parts;
  pieces.take(p.used, n);
  if (pack) {
    pieces.take(k.key, n * 64 * k.dim4);
    pieces.take(k.key_scale, n);
    pieces.take(k.key_sum, n * 64);
    pieces.take(k.key_mean, heads * a.head_dim);
  }
  if (pack && !tiles) {
    pieces.take(k.value, n * a.value_dim * 64);
    pieces.take(k.value_scale, n * a.value_dim);
    pieces.take(k.value_sum, n * a.value_dim);
  }
  if (tiles) {
    pieces.take(p.value, n * p.wide * 64);
    pieces.take(p.finite, n);
    if (!a.int8) pieces.take(p.key_top, n);
    const bool whole = a.int8 ? k.dim4 == p.key_bytes : a.head_dim * 2 == p.key_bytes && a.key.stride[3] == 1;
    if (!whole) pieces.take(p.key, n * 64 * p.key_bytes);
  }
}

#ifdef TAMIS_AMX
#include "tile_values.h"
#endif

static tamis_summarize_args mean_for_call(const tamis_attend_args& a, const Prepared& p) {
  tamis_summarize_args mean{};
  mean.batch = a.batch, mean.heads = a.kv_heads, mean.seq = a.geometry.kv_len, mean.dim = a.head_dim;
  mean.x = a.key, mean.segments = a.pack_segments, mean.segment_stride = a.pack_segment_stride;
  mean.used = p.used, mean.means = a.packed.key_mean;
  return mean;
}

static tamis_pack_args pack_for_call(const tamis_attend_args& a, const Prepared& p) {
  tamis_pack_args pack{};
  pack.batch = a.batch, pack.kv_heads = a.kv_heads, pack.seq = a.geometry.kv_len;
  pack.head_dim = a.head_dim, pack.value_dim = a.value_dim;
  pack.key = a.key, pack.value = a.value;
  pack.segments = a.pack_segments, pack.segment_stride = a.pack_segment_stride;
  pack.used = p.used, pack.packed = a.packed;
  return pack;
}

// Whether every key is seen by some query for certain, so that nobody has to look.
static inline bool all_used(const tamis_attend_args& a) {
  const tamis_geometry& g = a.geometry;
  return !a.kv_num_blocks && !g.visible && !is_explicit(g) && !g.window && g.q_len > 0 && a.heads > 0;
}

// Room for what the call prepares, and a.packed pointing there where it quantises for itself.
static int make_room(tamis_attend_args& a, Prepared& p) {
  const bool tiles = takes_tiles(a);
  p.pack = a.int8 && !a.packed.key;
  if (!p.pack && !tiles) return TAMIS_OK;
  p.parts = blocks_of(a.geometry.kv_len, 64), p.wide = round_up(a.value_dim, 16);
  p.key_bytes = round_up(a.head_dim * (a.int8 ? 1 : 2), 64);
  if (p.pack) {
    a.packed.capacity = p.parts, a.packed.dim4 = tiles ? p.key_bytes : round_up(a.head_dim, 4);
    a.packed.mixed = mixed_of(a.head_dim);
  }
  Pieces measure{nullptr};
  lay_out(measure, a, p.pack, tiles, p, a.packed);
  p.memory = (char*)aligned_alloc(64, measure.at + 64);
  if (!p.memory) return TAMIS_NO_MEMORY;
  tamis_large_pages(p.memory, measure.at);
  Pieces pieces{p.memory};
  lay_out(pieces, a, p.pack, tiles, p, a.packed);
  if (all_used(a)) memset(p.used, 1, a.batch * a.kv_heads * p.parts);
  if (p.pack) memset(a.packed.key_mean, 0, a.batch * a.kv_heads * a.head_dim * 4);
  // A softcap is not indifferent to a shift of the scores: the key is not smoothed then.
  p.smooth = p.pack && !(a.softcap > 0);
  return p.smooth && !p.sums.make_room(mean_for_call(a, p)) ? TAMIS_NO_MEMORY : TAMIS_OK;
}

static void prepare_together(const tamis_attend_args& a, Prepared& p, Team& team) {
  if (!p.memory) return;
  const int64_t count = a.batch * a.kv_heads * p.parts, padded = round_up(greatest(a.value_dim, a.head_dim), 16);
  const bool tiles = takes_tiles(a);
  const tamis_summarize_args mean = mean_for_call(a, p);
  const tamis_pack_args pack = pack_for_call(a, p);
  if (!all_used(a)) tamis_used_blocks_together(&a, p.used, team);
  if (p.smooth) key_sums_together(mean, p.sums, team);
  const int64_t for_pack = PackScratch::bytes_for(padded), for_tiles = round_up((64 * padded + 64 * W) * 4, 64);
  char* memory = (char*)aligned_alloc(64, for_pack + for_tiles);
  if (!memory) fail(team, TAMIS_NO_MEMORY);
  PackScratch s(memory, padded);
  HeadMean head{p.smooth ? &mean : nullptr, &p.sums};
  const Range own = own_share(count);
  for (int64_t n = own.first; n < own.end; ++n) {
    if (!memory || failed(team)) break;
    const int64_t bh = n / p.parts, b = bh / a.kv_heads, h = bh % a.kv_heads;
    if (p.pack) head.at(bh, n % p.parts == 0, nullptr, a.head_dim, s.mean);
    if (!p.used[n]) continue;
    if (p.pack) pack_key_block(pack, b, h, n % p.parts, s);
    if (p.pack && !tiles) pack_value_block(pack, b, h, n % p.parts, s);
#ifdef TAMIS_AMX
    if (tiles) prepare_tiles(a, p, n, padded, (float*)(memory + for_pack));
#endif
  }
  free(memory);
  meet(team);
}
