// Key and value in 8 bits, 64 keys a block: one scale per key block, one per value channel of a block.
// Keys have their head's mean subtracted, and their channels mixed. Layout: tamis_packed in attend.h.
#pragma once
#include "ahead.h"
#include "mix.h"
#include "summarize.h"

struct PackScratch {
  float* rows;    // [64][padded], key or value block in fp32
  float* mean;    // [padded], of the head at hand
  int8_t* bytes;  // [padded]

  static int64_t bytes_for(int64_t padded) { return round_up(65 * padded * 4 + padded + 64, 64); }
  PackScratch(char* memory, int64_t padded) {
    rows = (float*)memory, mean = rows + 64 * padded, bytes = (int8_t*)(mean + padded);
    if (memory) memset(mean, 0, padded * 4);
  }
};

// Loads a block; rows that do not count become zero. Of a key, less its mean and mixed, returns the largest absolute
// entry, NaN where one is NaN or infinite. `ahead`: what is loaded after it.
static float load_block(const tamis_pack_args& a, const tamis_tensor& t, int64_t b, int64_t h, int64_t j0, int64_t n,
                        int64_t dim, const float* mean, float* rows, Ahead ahead) {
  const int64_t padded = round_up(dim, 16);
  vf top = set1(0.f), broken = set1(0.f);
  for (int64_t j = 0; j < n; ++j) {
    float* row = rows + j * padded;
    ahead.some((int)(padded / 16));
    memset(row + dim, 0, (padded - dim) * 4);
    if (!counts_row(a.segments, a.segment_stride, b, j0 + j)) {
      memset(row, 0, dim * 4);
      continue;
    }
    load_row(t, b, h, j0 + j, dim, row);
    if (!mean) continue;
    for (int64_t c = 0; c < padded; c += W) {
      const vf x = load(row + c) - load(mean + c);
      store(row + c, x);
      broken = fma(x, set1(0.f), broken);
    }
  }
  if (!mean) return 0.f;
  for (int64_t j = 0; j < n; ++j) top = vmax(mix_row(rows + j * padded, padded, a.packed.mixed), top);
  return sum_lanes(broken) == 0.f ? max_lanes(top) : NAN;
}

static void pack_key_block(const tamis_pack_args& a, int64_t b, int64_t h, int64_t block, PackScratch s) {
  const tamis_packed& p = a.packed;
  const int64_t head = b * a.kv_heads + h, at = head * p.capacity + a.first_block + block, dim = a.head_dim;
  const int64_t padded = round_up(dim, 16), j0 = block * 64, n = a.seq - j0 < 64 ? a.seq - j0 : 64;
  const float top = load_block(a, a.key, b, h, j0, n, dim, s.mean, s.rows,
                               rows_ahead(a.value, b, h, j0, j0 + n, a.value_dim));
  const bool finite = top == top;
  const float inverse = finite ? inverse_scale(top * enlarge_if_tiny(s.rows, n * padded, top)) : 0.f;
  int8_t* to = p.key + at * 64 * p.dim4;
  for (int64_t j = 0; j < 64; ++j) {
    if (j < n) {
      p.key_sum[at * 64 + j] = quantise_row(s.rows + j * padded, padded, inverse, s.bytes);
      const int64_t made = p.dim4 < padded ? p.dim4 : padded;
      memcpy(to + j * p.dim4, s.bytes, made);
      memset(to + j * p.dim4 + made, 0, p.dim4 - made);
    } else {
      p.key_sum[at * 64 + j] = 0;
      memset(to + j * p.dim4, 0, p.dim4);
    }
  }
  p.key_scale[at] = finite ? top / 127.f * root_of_mixed(p) : NAN;
}

static void pack_value_block(const tamis_pack_args& a, int64_t b, int64_t h, int64_t block, PackScratch s) {
  const tamis_packed& p = a.packed;
  const int64_t head = b * a.kv_heads + h, at = head * p.capacity + a.first_block + block, dim = a.value_dim;
  const int64_t padded = round_up(dim, 16), j0 = block * 64, n = a.seq - j0 < 64 ? a.seq - j0 : 64;
  load_block(a, a.value, b, h, j0, n, dim, nullptr, s.rows,
             rows_ahead(a.key, b, h, j0 + 64, j0 + 128 < a.seq ? j0 + 128 : a.seq, a.head_dim));
  memset(s.rows + n * padded, 0, (64 - n) * padded * 4);
  int8_t* to = p.value + at * 64 * dim;
  for (int64_t c = 0; c < dim; c += W) {
    vf top = set1(0.f), broken = set1(0.f);
    for (int64_t j = 0; j < 64; ++j) {
      vf x = load(s.rows + j * padded + c);
      top = vmax(vabs(x), top);
      broken = fma(x, set1(0.f), broken);
    }
    float tops[W], bad[W], inverse[W];
    store(tops, top);
    store(bad, broken);
    for (int i = 0; i < W; ++i) inverse[i] = bad[i] == 0.f ? inverse_scale(tops[i]) : 0.f;
    const vf inv = load(inverse), lo = set1(-127.f), hi = set1(127.f);
    vi sum = set1i(0);
    float words[16 * W], channels[W * 16];  // four bytes each: of four keys and one channel
    for (int64_t g = 0; g < 16; ++g) {
      vi word = set1i(0);
      for (int t = 0; t < 4; ++t) {
        vi q = round_to_int(vmax(vmin(load(s.rows + (g * 4 + t) * padded + c) * inv, hi), lo));
        sum = addi(sum, q);
        word = either(word, shift_left(q & set1i(255), 8 * t));
      }
      storei(words + g * W, word);
    }
    transpose(words, W, 16, W, channels, 16);
    memcpy(to + c * 64, channels, 64 * (dim - c < W ? dim - c : W));
    int32_t sums[W];
    storei(sums, sum);
    for (int i = 0; i < W && c + i < dim; ++i) {
      p.value_scale[at * dim + c + i] = bad[i] == 0.f ? tops[i] / 127.f : NAN;
      p.value_sum[at * dim + c + i] = sums[i];
    }
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
