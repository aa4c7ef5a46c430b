// One pass over query or key: the mean of each block's rows and how alike the rows are.
//
//   mean       = mean over rows of x - key_mean
//   similarity = | mean over rows of x / |x| |^2, the mean cosine over all pairs of rows
//
// Rows of a negative segment do not count. A zero row counts and is similar to nothing. A block with a NaN
// or infinite row gets NaN for both: it can be judged by nobody and is kept.
#pragma once
#include <omp.h>
#include <stdlib.h>

#include "ahead.h"
#include "together.h"

static inline bool counts_row(const int64_t* segments, int64_t stride, int64_t b, int64_t i) {
  return !segments || segments[b * stride + i] >= 0;
}

// 1 / |x| of one row that is `padded` long, whose squares sum to `norm2`. Where that left the range of fp32 on either
// side, divide by the largest entry first, if that is a number: `factor` is what the rest of the inverse is to be
// multiplied with. False if an entry is not finite.
static bool rescue_norm(const float* row, int64_t padded, int64_t dim, float& norm2, float& factor) {
  const float top = max_abs(row, dim);
  factor = top > 0 ? 1.f / top : 0.f;
  vf square = set1(0.f);
  for (int64_t c = 0; c < padded; c += W) {
    const vf x = load(row + c) * set1(factor);
    square = fma(x, x, square);
  }
  norm2 = sum_lanes(square);
  return all_finite(row, dim);
}

// Sums of so many rows, of even and of odd ones, are added up: rounding grows with the longer chain. In `rows` they lie
// less their mean.
constexpr int64_t kSummed = 16;

// `mean`, which may be zero, and `rows` are zero from dim on, in whole vectors; behind the rows lie the two sums.
static void summarize_block(const tamis_summarize_args& a, int64_t b, int64_t h, int64_t block, const float* mean,
                            float* rows) {
  const int64_t padded = round_up(a.dim, 16), blocks = (a.seq + a.block - 1) / a.block;
  const int64_t end = (block + 1) * a.block < a.seq ? (block + 1) * a.block : a.seq;
  const int64_t at = (b * a.heads + h) * blocks + block;
  float *sum = rows + kSummed * padded, *unit = sum + padded;
  memset(sum, 0, 2 * padded * 4);
  Ahead ahead = rows_ahead(a.x, b, h, block * a.block + kRowsAhead, a.seq, a.dim);
  int64_t n = 0;
  bool finite = true;
  for (int64_t i = block * a.block; i < end;) {
    float norm2[kSummed], inverse[kSummed];
    for (int64_t m = 0; m < kSummed; ++m) norm2[m] = inverse[m] = 1.f;
    int64_t count = 0;
    for (; i < end && count < kSummed; ++i) {
      ahead.a_row();
      if (!counts_row(a.segments, a.segment_stride, b, i)) continue;
      float* row = rows + count * padded;
      const float* from = row_in(a.x, b, h, i, a.dim, padded, row);
      vf square = set1(0.f);
      for (int64_t c = 0; c < padded; c += W) {
        const vf x = load(from + c) - load(mean + c);
        store(row + c, x);
        square = fma(x, x, square);
      }
      norm2[count] = sum_lanes(square);
      if (!(norm2[count] > 1e-30f && norm2[count] < 1e30f))
        finite = rescue_norm(row, padded, a.dim, norm2[count], inverse[count]) && finite;
      ++count;
    }
    for (int64_t m = 0; m < kSummed; ++m) inverse[m] = norm2[m] > 0 ? inverse[m] / sqrtf(norm2[m]) : 0.f;
    for (int64_t c = 0; c < padded; c += W) {
      vf s[2] = {set1(0.f), set1(0.f)}, u[2] = {set1(0.f), set1(0.f)};
      for (int64_t m = 0; m < count; ++m) {
        const vf x = load(rows + m * padded + c);
        s[m % 2] = s[m % 2] + x;
        u[m % 2] = fma(x, set1(inverse[m]), u[m % 2]);
      }
      store(sum + c, load(sum + c) + (s[0] + s[1]));
      store(unit + c, load(unit + c) + (u[0] + u[1]));
    }
    n += count;
  }
  const float share = n ? 1.f / (float)n : 0.f;
  float square = 0.f;
  for (int64_t c = 0; c < a.dim; ++c) {
    a.means[at * a.dim + c] = finite ? sum[c] * share : NAN;
    square += unit[c] * share * unit[c] * share;
  }
  a.similarity[at] = !finite ? NAN : n ? square : 1.f;
}

// The sums a mean key is made of: for each 64 tokens of a head a row, and how many count.
struct KeySums {
  float* rows = nullptr;
  int64_t* numbers = nullptr;

  KeySums() = default;
  KeySums(const KeySums&) = delete;
  KeySums& operator=(const KeySums&) = delete;
  ~KeySums() { free(rows), free(numbers); }

  bool make_room(const tamis_summarize_args& a) {
    const int64_t parts = a.batch * a.heads * ((a.seq + 63) / 64);
    rows = (float*)malloc((parts * a.dim + 1) * 4), numbers = (int64_t*)malloc((parts + 1) * 8);
    return rows && numbers;
  }
};

// 64ths of tokens, which cannot overflow, of one part. `row` is zero from dim on, in whole vectors; sums lie behind it.
static void sum_part(const tamis_summarize_args& a, KeySums& sums, int64_t n, float* row) {
  const int64_t parts = (a.seq + 63) / 64, padded = round_up(a.dim, 16), bh = n / parts, first = n % parts * 64;
  const int64_t end = first + 64 < a.seq ? first + 64 : a.seq;
  float* sum = row + padded;
  int64_t count = 0;
  Ahead ahead = rows_ahead(a.x, bh / a.heads, bh % a.heads, first + kRowsAhead, a.seq, a.dim);
  // A sum is finite exactly if all of its terms are: only where it is not are rows looked at one by one.
  for (int careful = 0; careful < 2; ++careful) {
    count = 0;
    memset(sum, 0, padded * 4);
    for (int64_t i = first; i < end && (!a.used || a.used[n]); ++i) {
      ahead.a_row();
      if (!counts_row(a.segments, a.segment_stride, bh / a.heads, i)) continue;
      const float* from = row_in(a.x, bh / a.heads, bh % a.heads, i, a.dim, padded, row);
      if (careful && !all_finite(from, a.dim)) continue;
      ++count;
      for (int64_t c = 0; c < padded; c += W) store(sum + c, fma(load(from + c), set1(1.f / 64), load(sum + c)));
    }
    if (all_finite(sum, padded)) break;
  }
  memcpy(sums.rows + n * a.dim, sum, a.dim * 4);
  sums.numbers[n] = count;
}

// The mean key of one head: sums of 64 in fp32, their sum in fp64, exact enough at any length and independent of the
// threads.
static void mean_of(const tamis_summarize_args& a, const KeySums& sums, int64_t bh, float* mean) {
  const int64_t parts = (a.seq + 63) / 64;
  int64_t count = 0;
  for (int64_t part = 0; part < parts; ++part) count += sums.numbers[bh * parts + part];
  for (int64_t c = 0; c < a.dim; ++c) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += sums.rows[(bh * parts + part) * a.dim + c];
    mean[c] = count ? (float)(sum * 64 / (double)count) : 0.f;
  }
}

static void key_sums_together(const tamis_summarize_args& a, KeySums& sums, Team& team) {
  const int64_t parts = a.batch * a.heads * ((a.seq + 63) / 64), padded = round_up(a.dim, 16);
  float* row = (float*)aligned_alloc(64, round_up(padded * 8, 64));
  if (row)
    memset(row, 0, padded * 8);
  else
    fail(team, TAMIS_NO_MEMORY);
  const Range own = own_share(parts);
  for (int64_t n = own.first; n < own.end && row && !failed(team); ++n) sum_part(a, sums, n, row);
  free(row);
  meet(team);
}

static int key_mean(const tamis_summarize_args* args) {
  KeySums sums;
  if (!sums.make_room(*args)) return TAMIS_NO_MEMORY;
  Team team;
#pragma omp parallel num_threads(args->threads)
  {
    key_sums_together(*args, sums, team);
#pragma omp for schedule(static) nowait
    for (int64_t bh = 0; bh < args->batch * args->heads; ++bh)
      if (!failed(team)) mean_of(*args, sums, bh, args->means + bh * args->dim);
  }
  return team.error;
}

// The mean of the head at hand, as each thread keeps it: making it once more is cheaper than meeting the others. The
// thread with a head's first block writes it out.
struct HeadMean {
  const tamis_summarize_args* of;  // null: there is no mean, or it is given
  const KeySums* sums;
  int64_t head = -1;

  void at(int64_t bh, bool first, const float* given, int64_t dim, float* mean) {
    if (bh != head && of) mean_of(*of, *sums, bh, mean);
    if (bh != head && !of && given) memcpy(mean, given + bh * dim, dim * 4);
    if (of && first) memcpy(of->means + bh * dim, mean, dim * 4);
    head = bh;
  }
};

// `mean`: whose mean is subtracted, or none if that of the arguments.
static void summarize_together(const tamis_summarize_args& a, HeadMean mean, Team& team) {
  const int64_t blocks = (a.seq + a.block - 1) / a.block, padded = round_up(a.dim, 16);
  const int64_t bytes = (1 + kSummed + 2) * padded * 4;
  float* scratch = (float*)aligned_alloc(64, round_up(bytes, 64));
  if (scratch)
    memset(scratch, 0, bytes);
  else
    fail(team, TAMIS_NO_MEMORY);
#pragma omp for schedule(static) nowait
  for (int64_t n = 0; n < a.batch * a.heads * blocks; ++n) {
    if (!scratch || failed(team)) continue;
    const int64_t bh = n / blocks;
    mean.at(bh, n % blocks == 0, a.mean, a.dim, scratch);
    summarize_block(a, bh / a.heads, bh % a.heads, n % blocks, scratch, scratch + padded);
  }
  free(scratch);
}

static int summarize(const tamis_summarize_args* args) {
  Team team;
#pragma omp parallel num_threads(args->threads)
  summarize_together(*args, {nullptr, nullptr}, team);
  return team.error;
}
