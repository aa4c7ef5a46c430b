// From block means to kept blocks, one row of query blocks at a time and in fp32.
//
//   score  = scale * q_mean . k_mean, -inf where block j is not self-similar; P = softmax of the visible ones
//   cdf    keeps the fewest largest P whose sum reaches it; topk the largest ceil(topk * visible)
//   always kept: blocks that are not self-similar, sink, diagonal, must-keep
//
// Neither mode sorts. Floats order like their bit patterns, so the smallest entry that is kept is found by
// bisection on the bits: 32 passes over the row at most, all of them vector code.
#pragma once
#include <omp.h>
#include <stdlib.h>

#include "geometry.h"
#include "rows.h"
#include "summarize.h"

static inline float float_of(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}

// Sum of the entries that are at least `floor`.
static void mass_from(const float* p, int64_t padded, float floor, float* mass) {
  vf sum = set1(0.f);
  for (int64_t j = 0; j < padded; j += W) {
    vf x = load(p + j);
    sum = fma(x, one_where_reaches(x, set1(floor)), sum);
  }
  *mass = sum_lanes(sum);
}

static inline void set_bit(uint64_t* bits, int64_t j) { bits[j >> 6] |= 1ull << (j & 63); }

// Keeps the fewest largest entries whose sum reaches `want`: everything above a floor, then ties at the floor
// from the left. Sums are always taken in the same order, so that search and choice agree on what is missing.
static void keep_mass(const float* p, int64_t n, int64_t padded, uint32_t top, float want, uint64_t* bits) {
  float mass;
  mass_from(p, padded, float_of(1), &mass);
  want = want < mass ? want : mass;
  uint32_t lo = 1, hi = top;  // the floor lies between the smallest positive float and the largest entry
  while (lo < hi) {
    const uint32_t mid = lo + (hi - lo + 1) / 2;
    mass_from(p, padded, float_of(mid), &mass);
    if (mass >= want)
      lo = mid;
    else
      hi = mid - 1;
  }
  const float floor = float_of(lo);
  mass_from(p, padded, float_of(lo + 1), &mass);
  int64_t ties = 0;
  for (int64_t j = 0; j < n; ++j)
    if (p[j] > floor) set_bit(bits, j);
  for (int64_t j = 0; j < n && (mass + (float)ties * floor < want || (mass == 0 && ties == 0)); ++j)
    if (p[j] == floor) set_bit(bits, j), ++ties;
}

// Keeps the `want` candidates of the largest scores, ties from the left. By scores and not by their softmax,
// in which small ones are all 0. Floats become words of the same order: `ranks` is scratch for them.
static void keep_largest(const float* score, const uint8_t* candidate, int64_t n, int64_t want, uint32_t* ranks,
                         uint64_t* bits) {
  int64_t candidates = 0;
  for (int64_t j = 0; j < n; ++j) {
    const float s = score[j] + 0.f;  // -0 becomes 0: they are equal
    uint32_t u;
    memcpy(&u, &s, 4);
    ranks[j] = !candidate[j] ? 0 : u & 0x80000000u ? ~u : u | 0x80000000u;
    candidates += candidate[j] != 0;
  }
  want = want < candidates ? want : candidates;
  if (!want) return;
  uint32_t lo = 1, hi = ~0u;  // a finite float never becomes 0
  while (lo < hi) {
    const uint32_t mid = lo + (hi - lo) / 2 + 1;
    int32_t number = 0;
    for (int64_t j = 0; j < n; ++j) number += ranks[j] >= mid;
    if (number >= want)
      lo = mid;
    else
      hi = mid - 1;
  }
  for (int64_t j = 0; j < n; ++j)
    if (ranks[j] > lo) set_bit(bits, j), --want;
  for (int64_t j = 0; j < n && want > 0; ++j)
    if (ranks[j] == lo) set_bit(bits, j), --want;
}

static void score_row(const tamis_select_args& a, const float* q, const float* k, int64_t kv_blocks, float* p) {
  for (int64_t j = 0; j < kv_blocks; ++j) p[j] = dot(q, k + j * a.head_dim, a.head_dim) * a.scale;
}

// Softmax of p over the entries marked as candidates; the others become 0. False if there is none.
static bool softmax_row(float* p, const uint8_t* candidate, int64_t n, int64_t padded) {
  float top = -INFINITY;
  for (int64_t j = 0; j < n; ++j)
    if (candidate[j] && p[j] > top) top = p[j];
  if (top == -INFINITY) return false;
  for (int64_t j = 0; j < n; ++j) p[j] = candidate[j] ? (p[j] - top) * 1.44269504088896f : -INFINITY;
  for (int64_t j = n; j < padded; ++j) p[j] = -INFINITY;
  vf sum = set1(0.f);
  for (int64_t j = 0; j < padded; j += W) {
    vf e = exp2_full(load(p + j));
    store(p + j, e);
    sum = sum + e;
  }
  const vf share = set1(1.f / sum_lanes(sum));
  for (int64_t j = 0; j < padded; j += W) store(p + j, load(p + j) * share);
  return true;
}

// `p`, `ranks`: a row of floats and one of words; `candidate`: a row of bytes.
static void select_row(const tamis_select_args& a, int64_t b, int64_t h, int64_t qb, float* p, uint32_t* ranks,
                       uint8_t* candidate) {
  const tamis_geometry& g = a.geometry;
  const int64_t q_blocks = blocks_of(g.q_len, g.block_q), n = blocks_of(g.kv_len, g.block_kv);
  const int64_t padded = round_up(n, 16), row = (b * a.heads + h) * q_blocks + qb, words = (n + 63) / 64;
  const int64_t kv_head = b * a.kv_heads + h / (a.heads / a.kv_heads);
  const float theta = a.similarity[h], *k_similarity = a.k_similarity + kv_head * n;
  uint64_t* bits = a.bits + row * words;
  if (words) memset(bits, 0, words * 8);
  // Without self-similarity nobody can judge the block; NaN compares false and lands here too.
  const bool judge = a.q_similarity[row] >= theta;
  const int64_t i0 = qb * g.block_q, i1 = least(i0 + g.block_q, g.q_len), shift = g.kv_len - g.q_len;
  int64_t visible = 0;
  for (int64_t j = 0; j < n; ++j) {
    candidate[j] = 0;
    if (!block_visible(g, b, h, qb, j)) continue;
    ++visible;
    const int64_t j0 = j * g.block_kv, j1 = least(j0 + g.block_kv, g.kv_len), *s = a.must_stride;
    const bool diagonal = g.causal && !is_explicit(g) && j0 <= i1 - 1 + shift && i0 + shift <= j1 - 1;
    candidate[j] = k_similarity[j] >= theta;
    if (!judge || !candidate[j] || diagonal || (a.sink && j == 0) ||
        (a.must && a.must[b * s[0] + h * s[1] + qb * s[2] + j * s[3]]))
      set_bit(bits, j);
  }
  if (judge && a.cdf && a.cdf[h] >= 1.f) {
    for (int64_t j = 0; j < n; ++j)
      if (block_visible(g, b, h, qb, j)) set_bit(bits, j);
  } else if (judge && visible) {
    score_row(a, a.q_means + row * a.head_dim, a.k_means + kv_head * n * a.head_dim, n, p);
    for (int64_t j = 0; j < n; ++j)
      if (candidate[j] && !(fabsf(p[j]) < INFINITY)) candidate[j] = 0, set_bit(bits, j);
    if (a.topk) {
      // The setting is fp32: less one part in a million, so that 0.1 of 30 is 3.
      const int64_t want = (int64_t)ceil(((double)a.topk[h] - 1e-6) * (double)visible);
      keep_largest(p, candidate, n, want < 1 ? 1 : want, ranks, bits);
    }
    if (a.cdf && softmax_row(p, candidate, n, padded)) {
      uint32_t top;
      const float largest = max_abs(p, padded);
      memcpy(&top, &largest, 4);
      if (a.cdf) keep_mass(p, n, padded, top, a.cdf[h], bits);
    }
  }
  int32_t kept = 0;
  for (int64_t w = 0; w < words; ++w) kept += __builtin_popcountll(bits[w]);
  a.kv_num_blocks[row] = kept;
}

static void select_together(const tamis_select_args& a, Team& team) {
  const int64_t q_blocks = blocks_of(a.geometry.q_len, a.geometry.block_q);
  const int64_t padded = round_up(blocks_of(a.geometry.kv_len, a.geometry.block_kv), 16) + 16;
  float* p = (float*)aligned_alloc(64, round_up(padded * 9, 64));
  if (!p) fail(team, TAMIS_NO_MEMORY);
#pragma omp for schedule(dynamic, 4) nowait
  for (int64_t n = 0; n < a.batch * a.heads * q_blocks; ++n)
    if (p && !failed(team))
      select_row(a, n / q_blocks / a.heads, n / q_blocks % a.heads, n % q_blocks, p, (uint32_t*)(p + padded),
                 (uint8_t*)(p + 2 * padded));
  free(p);
}

static int select(const tamis_select_args* args) {
  Team team;
#pragma omp parallel num_threads(args->threads)
  select_together(*args, team);
  return team.error;
}

static int predict(const tamis_predict_args* args) {
  KeySums sums;
  if (!sums.make_room(args->key_mean)) return TAMIS_NO_MEMORY;
  Team team;
#pragma omp parallel num_threads(args->threads)
  {
    summarize_together(args->query, {nullptr, nullptr}, team);
    key_sums_together(args->key_mean, sums, team);
    summarize_together(args->key, {&args->key_mean, &sums}, team);
    meet(team);
    select_together(args->select, team);
  }
  return team.error;
}
