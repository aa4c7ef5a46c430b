// In which order threads take the items of a call.
//
// Heads in order, so that threads share a head's key and value in cache; the long rows of a causal head first, so that
// the short ones fill the end. Before all of them come the items so large that a thread which took one last would
// work on alone: more than a 32nd of what each thread has to do, the largest first.
#pragma once
#include <stdlib.h>

#include "softmax.h"

static inline Item item_at(const tamis_attend_args& a, int64_t n, int64_t q_blocks) {
  const tamis_geometry& g = a.geometry;
  const int64_t bh = n / q_blocks;
  Item it;
  it.b = bh / a.heads, it.h = bh % a.heads, it.kv_head = it.h / (a.heads / a.kv_heads);
  it.qb = q_blocks - 1 - n % q_blocks, it.i0 = it.qb * g.block_q;
  it.rows = least(g.block_q, g.q_len - it.i0);
  return it;
}

// Key blocks to visit, and one for loading queries and writing rows; where telling them takes a look at every block,
// all items count as equal. The mask may be corrupt, and is not trusted.
static inline int64_t work_of(const tamis_attend_args& a, const Item& it) {
  const tamis_geometry& g = a.geometry;
  if (!a.kv_num_blocks) return g.visible || is_explicit(g) ? 1 : visible_blocks(g, it.b, it.h, it.qb) + 1;
  const int64_t* s = a.num_stride;
  return least(greatest(a.kv_num_blocks[it.b * s[0] + it.h * s[1] + it.qb * s[2]], 0), a.max_blocks) + 1;
}

// The items in order, to be freed; null without memory. Sorted by counting, so equally large ones stay in order.
static int64_t* items_in_order(const tamis_attend_args& a, int64_t items, int64_t q_blocks) {
  const int64_t classes = 32 * a.threads;
  int64_t* order = (int64_t*)malloc((2 * items + classes + 1) * 8);
  if (!order) return nullptr;
  int64_t *size = order + items, *start = size + items, total = 0;
  for (int64_t n = 0; n < items; ++n) total += size[n] = work_of(a, item_at(a, n, q_blocks));
  for (int64_t c = 0; c <= classes; ++c) start[c] = 0;
  for (int64_t n = 0; n < items; ++n) ++start[size[n] = size[n] * classes / total];
  for (int64_t c = classes, before = 0; c >= 0; --c) {
    const int64_t number = start[c];
    start[c] = before, before += number;
  }
  for (int64_t n = 0; n < items; ++n) order[start[size[n]]++] = n;
  return order;
}
