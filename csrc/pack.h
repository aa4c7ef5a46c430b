// Key and value in 8 bits, 64 keys a block: one scale per key block, one per value channel of a block.
// Keys have their head's mean subtracted, and their channels mixed. Layout: tamis_packed in attend.h.
#pragma once
#include "ahead.h"
#include "mix.h"
#include "summarize.h"

struct PackScratch {
  float* rows;    // [64][padded], key or value block in fp32
  float* mean;    // [padded], of the head at hand
  int8_t* bytes;  // [padded], a row where the pack has no room behind it

  static int64_t bytes_for(int64_t padded) { return round_up(65 * padded * 4 + padded + 64, 64); }
  PackScratch(char* memory, int64_t padded) {
    rows = (float*)memory, mean = rows + 64 * padded, bytes = (int8_t*)(mean + padded);
    if (memory) memset(mean, 0, padded * 4);
  }
};

// Loads a block of keys less their mean, and mixed; rows that do not count become zero. Returns the largest absolute
// entry: NaN or infinity where one is. `ahead`: what is loaded after it.
static float load_keys(const tamis_pack_args& a, int64_t b, int64_t h, int64_t j0, int64_t n, int64_t padded,
                       PackScratch s, Ahead ahead) {
  vi top = set1i(0);
  for (int64_t j = 0; j < n; ++j) {
    float* row = s.rows + j * padded;
    ahead.a_row();
    if (!counts_row(a.segments, a.segment_stride, b, j0 + j)) {
      memset(row, 0, padded * 4);
      continue;
    }
    const float* from = row_in(a.key, b, h, j0 + j, a.head_dim, padded, row);
    top = maxi(mix_row(from, s.mean, row, padded, a.packed.mixed), top);
  }
  return largest_of(top);
}

static void pack_key_block(const tamis_pack_args& a, int64_t b, int64_t h, int64_t block, PackScratch s) {
  const tamis_packed& p = a.packed;
  const int64_t head = b * a.kv_heads + h, at = head * p.capacity + a.first_block + block, dim = a.head_dim;
  const int64_t padded = round_up(dim, 16), j0 = block * 64, n = a.seq - j0 < 64 ? a.seq - j0 : 64;
  const float top = load_keys(a, b, h, j0, n, padded, s, rows_ahead(a.value, b, h, j0, j0 + n, a.value_dim));
  const bool finite = top < INFINITY;
  const int64_t counted = finite ? n : 0;
  const float inverse = inverse_scale(top * enlarge_if_tiny(s.rows, counted * padded, top));
  int8_t* to = p.key + at * 64 * p.dim4;
  int32_t* sums = p.key_sum + at * 64;
  for (int64_t j = 0; j < counted; ++j) {
    int8_t* row = to + j * p.dim4;
    if (p.dim4 < padded) {
      sums[j] = quantise_row(s.rows + j * padded, padded, inverse, s.bytes);
      memcpy(row, s.bytes, p.dim4);
    } else {
      sums[j] = quantise_row(s.rows + j * padded, padded, inverse, row);
      if (p.dim4 > padded) memset(row + padded, 0, p.dim4 - padded);
    }
  }
  memset(to + counted * p.dim4, 0, (64 - counted) * p.dim4);
  memset(sums + counted, 0, (64 - counted) * 4);
  p.key_scale[at] = finite ? top / 127.f * root_of_mixed(p) : NAN;
}

static void pack_value_block(const tamis_pack_args& a, int64_t b, int64_t h, int64_t block, PackScratch s) {
  const tamis_packed& p = a.packed;
  const int64_t head = b * a.kv_heads + h, at = head * p.capacity + a.first_block + block, dim = a.value_dim;
  const int64_t padded = round_up(dim, 16), j0 = block * 64, n = a.seq - j0 < 64 ? a.seq - j0 : 64;
  Ahead ahead = rows_ahead(a.key, b, h, j0 + 64, j0 + 128 < a.seq ? j0 + 128 : a.seq, a.head_dim);
  for (int64_t j = 0; j < n; ++j) {
    float* row = s.rows + j * padded;
    ahead.a_row();
    if (counts_row(a.segments, a.segment_stride, b, j0 + j))
      load_row(a.value, b, h, j0 + j, dim, row);
    else
      memset(row, 0, dim * 4);
    for (int64_t c = dim; c < padded; ++c) row[c] = 0.f;
  }
  memset(s.rows + n * padded, 0, (64 - n) * padded * 4);
  int8_t* to = p.value + at * 64 * dim;
  for (int64_t c = 0; c < dim; c += W) {
    vi top = set1i(0);
    for (int64_t j = 0; j < 64; ++j) top = larger_bits(top, load(s.rows + j * padded + c));
    const vf tops = float_of_bits(top);
    const uint32_t finite = above_bits(set1(INFINITY), tops);
    const vf inverse = choose_bits(set1(127.f) / tops, set1(0.f), finite & above_bits(tops, set1(kLeastTop)));
    const vi whole = bits_of(choose_bits(float_of_bits(set1i(-1)), set1(0.f), finite));
    vi sum = set1i(0);
    float words[16 * W], channels[W * 16];  // four bytes each: of four keys and one channel
    for (int64_t g = 0; g < 16; ++g) {
      vi q[4];
      for (int t = 0; t < 4; ++t) q[t] = round_to_int(load(s.rows + (g * 4 + t) * padded + c) * inverse);
      const vi word = bytes_in_lanes(q[0], q[1], q[2], q[3]) & whole;
      sum = add_bytes(sum, word);
      storei(words + g * W, word);
    }
    transpose(words, W, 16, W, channels, 16);
    const int64_t made = dim - c < W ? dim - c : W;
    memcpy(to + c * 64, channels, 64 * made);
    int32_t sums[W];
    float scales[W];
    storei(sums, sum);
    store(scales, choose_bits(tops / set1(127.f), set1(NAN), finite));
    memcpy(p.value_sum + at * dim + c, sums, made * 4);
    memcpy(p.value_scale + at * dim + c, scales, made * 4);
  }
}

static int pack_kv(const tamis_pack_args* args) {
  const tamis_pack_args& a = *args;
  const int64_t blocks = (a.seq + 63) / 64, padded = round_up(a.head_dim > a.value_dim ? a.head_dim : a.value_dim, 16);
  Team team;
#pragma omp parallel num_threads(a.threads)
  {
    char* memory = (char*)aligned_alloc(64, PackScratch::bytes_for(padded));
    if (!memory) fail(team, TAMIS_NO_MEMORY);
    PackScratch s(memory, padded);
    HeadMean mean{nullptr, nullptr};
#pragma omp for schedule(static) nowait
    for (int64_t n = 0; n < a.batch * a.kv_heads * blocks; ++n) {
      if (!memory || failed(team) || (a.used && !a.used[n])) continue;
      const int64_t bh = n / blocks;
      mean.at(bh, false, a.packed.key_mean, a.head_dim, s.mean);
      pack_key_block(a, bh / a.kv_heads, bh % a.kv_heads, n % blocks, s);
      pack_value_block(a, bh / a.kv_heads, bh % a.kv_heads, n % blocks, s);
    }
    free(memory);
  }
  return team.error;
}
