// What the library must compute, term by term in fp64 and with nothing of its code: attention, its int8 formulas, and
// when a product is skipped. `Real` is double for the truth, and float for the yardstick of what fp32 can do.
#pragma once
#include <math.h>
#include <stdint.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace oracle {

constexpr double kInf = INFINITY;
constexpr int64_t kPart = 64;   // keys that share scales and are skipped together
constexpr int64_t kGroup = 16;  // rows that are skipped together

struct Problem {
  int64_t batch = 1, heads = 2, kv_heads = 2, q_len = 1, kv_len = 1, dim = 64, value_dim = 64;
  std::vector<double> q, k, v;  // dense [batch, heads, seq, dim]
  double scale = 1, softcap = 0;
  bool causal = false;
  int64_t window = 0, block_q = 128, block_kv = 64;
  std::vector<uint8_t> keep;      // [batch, heads, q_blocks, kv_blocks] or empty: all
  std::vector<double> bias;       // [batch, heads, q_len, kv_len] or empty; -inf hides
  std::vector<double> sink;       // [heads] or empty
  std::vector<double> threshold;  // [heads] or empty

  int64_t q_blocks() const { return (q_len + block_q - 1) / block_q; }
  int64_t kv_blocks() const { return (kv_len + block_kv - 1) / block_kv; }
  int64_t parts() const { return (kv_len + kPart - 1) / kPart; }
  int64_t kv_head(int64_t h) const { return h / (heads / kv_heads); }
  bool possible(int64_t i, int64_t j) const {
    const int64_t distance = i + kv_len - q_len - j;
    return (!causal || distance >= 0) && (!window || (distance < window && -distance < window));
  }
  bool block_possible(int64_t qb, int64_t kb) const {
    for (int64_t i = qb * block_q; i < q_len && i < (qb + 1) * block_q; ++i)
      for (int64_t j = kb * block_kv; j < kv_len && j < (kb + 1) * block_kv; ++j)
        if (possible(i, j)) return true;
    return false;
  }
  bool kept(int64_t b, int64_t h, int64_t qb, int64_t kb) const {
    return keep.empty() || keep[((b * heads + h) * q_blocks() + qb) * kv_blocks() + kb];
  }
  double added(int64_t b, int64_t h, int64_t i, int64_t j) const {
    return bias.empty() ? 0 : bias[((b * heads + h) * q_len + i) * kv_len + j];
  }
  bool sees(int64_t b, int64_t h, int64_t i, int64_t j) const {
    return possible(i, j) && kept(b, h, i / block_q, j / block_kv) && added(b, h, i, j) != -kInf;
  }
};

struct Result {
  std::vector<double> output, lse, counts;     // as the library's
  std::vector<std::vector<double>> distances;  // [heads]: how far below its maximum the nearest row of a group is
};

// Rows [first, end) of one head: scores, and which groups of rows skip which 64 keys.
template <class Real>
struct Rows {
  int64_t first, end;
  std::vector<Real> score;  // [rows][kv_len], -inf where hidden
  std::vector<uint8_t> skip;  // [rows][parts]
};

template <class Real>
void decide(const Problem& p, int64_t b, int64_t h, Rows<Real>& rows, Result* result) {
  const int64_t n = rows.end - rows.first, parts = p.parts(), qb = rows.first / p.block_q;
  rows.skip.assign(n * parts, 0);
  std::vector<double> below(n * parts, kInf);
  for (int64_t i = 0; i < n; ++i) {
    double running = -kInf;
    for (int64_t part = 0; part < parts; ++part) {
      double local = -kInf;
      for (int64_t j = part * kPart; j < p.kv_len && j < (part + 1) * kPart; ++j)
        local = fmax(local, (double)rows.score[i * p.kv_len + j]);
      running = fmax(running, local);
      if (local > -kInf) below[i * parts + part] = running - local;
    }
  }
  double* counts = &result->counts[((b * p.heads + h) * p.q_blocks() + qb) * 3];
  for (int64_t kb = 0; kb < p.kv_blocks(); ++kb) {
    if (!p.block_possible(qb, kb)) continue;
    counts[0] += 1;
    if (!p.kept(b, h, qb, kb)) continue;
    counts[1] += 1;
    const int64_t begin = kb * p.block_kv / kPart, stop = std::min(begin + p.block_kv / kPart, parts);
    for (int64_t part = begin; part < stop; ++part)
      for (int64_t i = 0; i < n; i += kGroup) {
        const int64_t last = std::min(i + kGroup, n);
        double nearest = kInf;
        for (int64_t r = i; r < last; ++r) nearest = fmin(nearest, below[r * parts + part]);
        if (nearest < kInf && nearest > 0) result->distances[h].push_back(nearest);
        const bool skip = !p.threshold.empty() && p.threshold[h] > 0 && nearest < kInf && nearest >= p.threshold[h];
        for (int64_t r = i; r < last; ++r) rows.skip[r * parts + part] = skip;
        if (!skip) counts[2] += (double)(last - i) / (double)(n * (stop - begin));
      }
  }
}

inline Result empty_result(const Problem& p) {
  Result r;
  r.output.assign(p.batch * p.heads * p.q_len * p.value_dim, 0);
  r.lse.assign(p.batch * p.heads * p.q_len, -kInf);
  r.counts.assign(p.batch * p.heads * p.q_blocks() * 3, 0);
  r.distances.resize(p.heads);
  return r;
}

template <class Real>
Real finish_score(const Problem& p, int64_t b, int64_t h, int64_t i, int64_t j, Real product) {
  if (!p.sees(b, h, i, j)) return (Real)-kInf;
  Real s = product * (Real)p.scale;
  if (p.softcap > 0) s = (Real)p.softcap * std::tanh(s / (Real)p.softcap);
  return s + (Real)p.added(b, h, i, j);
}

template <class Real>
Result attention(const Problem& p) {
  Result result = empty_result(p);
  for (int64_t bh = 0; bh < p.batch * p.heads; ++bh) {
    const int64_t b = bh / p.heads, h = bh % p.heads, kv = b * p.kv_heads + p.kv_head(h);
    std::vector<Real> q(p.q.begin() + bh * p.q_len * p.dim, p.q.begin() + (bh + 1) * p.q_len * p.dim);
    std::vector<Real> k(p.k.begin() + kv * p.kv_len * p.dim, p.k.begin() + (kv + 1) * p.kv_len * p.dim);
    for (int64_t qb = 0; qb < p.q_blocks(); ++qb) {
      Rows<Real> rows{qb * p.block_q, std::min(p.q_len, (qb + 1) * p.block_q), {}, {}};
      rows.score.resize((rows.end - rows.first) * p.kv_len);
      for (int64_t i = rows.first; i < rows.end; ++i)
        for (int64_t j = 0; j < p.kv_len; ++j) {
          Real s = 0;
          for (int64_t c = 0; c < p.dim; ++c) s += q[i * p.dim + c] * k[j * p.dim + c];
          rows.score[(i - rows.first) * p.kv_len + j] = finish_score<Real>(p, b, h, i, j, s);
        }
      decide(p, b, h, rows, &result);
      for (int64_t i = rows.first; i < rows.end; ++i) {
        const Real* score = &rows.score[(i - rows.first) * p.kv_len];
        Real top = p.sink.empty() ? (Real)-kInf : (Real)p.sink[h], total = 0;
        for (int64_t j = 0; j < p.kv_len; ++j) top = std::max(top, score[j]);
        if (top == (Real)-kInf) continue;
        if (!p.sink.empty()) total = std::exp((Real)p.sink[h] - top);
        for (int64_t j = 0; j < p.kv_len; ++j) total += std::exp(score[j] - top);
        result.lse[bh * p.q_len + i] = (double)(top + std::log(total));
        std::vector<Real> out(p.value_dim, 0);
        for (int64_t j = 0; j < p.kv_len; ++j) {
          if (score[j] == (Real)-kInf || rows.skip[(i - rows.first) * p.parts() + j / kPart]) continue;
          const Real weight = std::exp(score[j] - top) / total;
          const double* v = &p.v[(kv * p.kv_len + j) * p.value_dim];
          for (int64_t c = 0; c < p.value_dim; ++c) out[c] += weight * (Real)v[c];
        }
        for (int64_t c = 0; c < p.value_dim; ++c) result.output[(bh * p.q_len + i) * p.value_dim + c] = (double)out[c];
      }
    }
  }
  return result;
}

// [batch, kv_heads, parts]: 64-key blocks that some query block of the key head's group keeps and may see.
inline std::vector<uint8_t> used_parts(const Problem& p) {
  std::vector<uint8_t> used(p.batch * p.kv_heads * p.parts(), 0);
  for (int64_t qb = 0; qb < p.q_blocks(); ++qb)
    for (int64_t kb = 0; kb < p.kv_blocks(); ++kb) {
      if (!p.block_possible(qb, kb)) continue;
      for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t h = 0; h < p.heads; ++h)
          for (int64_t part = kb * p.block_kv / kPart;
               part < std::min((kb + 1) * p.block_kv / kPart, p.parts()) && p.kept(b, h, qb, kb); ++part)
            used[(b * p.kv_heads + p.kv_head(h)) * p.parts() + part] = 1;
    }
  return used;
}

// [batch, kv_heads, dim] over the keys of used blocks.
inline std::vector<double> key_mean(const Problem& p, const std::vector<uint8_t>& used) {
  std::vector<double> mean(p.batch * p.kv_heads * p.dim, 0);
  for (int64_t n = 0; n < p.batch * p.kv_heads; ++n) {
    double count = 0;
    for (int64_t j = 0; j < p.kv_len; ++j) {
      if (!used[n * p.parts() + j / kPart]) continue;
      ++count;
      for (int64_t c = 0; c < p.dim; ++c) mean[n * p.dim + c] += p.k[(n * p.kv_len + j) * p.dim + c];
    }
    for (int64_t c = 0; c < p.dim; ++c) mean[n * p.dim + c] /= count ? count : 1;
  }
  return mean;
}

// Replaces every `stride`-th of `n` numbers from x by whole steps of their largest / 127; returns the step.
inline double quantise(double* x, int64_t n, int64_t stride = 1) {
  double top = 0;
  for (int64_t i = 0; i < n; ++i) top = fmax(top, fabs(x[i * stride]));
  const double step = top / 127;
  for (int64_t i = 0; i < n; ++i) x[i * stride] = step == 0 ? 0 : nearbyint(x[i * stride] / step) * step;
  return step;
}

// e^x for x <= 0 in steps of 1/32512, by integers: of -x to the base of 2, rounded to 64ths, the whole part shifts the
// power of the rest.
inline double in_words(double x) {
  const int64_t below = (int64_t)fmin(nearbyint(-x * 64 / log(2.)), 65535), whole = below / 64;
  return whole > 15 ? 0 : (double)((int64_t)nearbyint(32512 * exp2((double)-(below % 64) / 64)) >> whole) / 32512;
}

// Every n neighbours times D H / sqrt(n), H the Walsh-Hadamard matrix, D the signs of Rudin and Shapiro.
inline int64_t mixed(int64_t dim) {
  int64_t n = 1;
  for (const int64_t other : {2, 4, 8, 16, 64, 256})
    if (dim % other == 0) n = other;
  return n;
}
inline void mix(double* x, int64_t dim) {
  const int64_t n = mixed(dim);
  for (int64_t i = 0; i < dim && n > 1; ++i)
    if (__builtin_popcountll(i % 256 & (i % 256) >> 1) % 2) x[i] = -x[i];
  for (int64_t from = 0; from < dim; from += n) {
    std::vector<double> y(n, 0);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j)
        y[i] += (__builtin_popcountll(i & j) % 2 ? -1 : 1) * x[from + j] / sqrt((double)n);
    std::copy(y.begin(), y.end(), x + from);
  }
}

// The int8 algorithm in fp64: query rounded by row, key less its mean by 64 keys, both of mixed channels, value by
// channel of 64 keys, weights to 1/254 of the row's largest among 64 keys; the denominator keeps the unrounded weights.
// `words`: before that they are as above.
inline Result attention_int8(const Problem& p, bool words) {
  Result result = empty_result(p);
  std::vector<double> q = p.q, k = p.k, v = p.v, mean(p.batch * p.kv_heads * p.dim, 0);
  if (!(p.softcap > 0)) mean = key_mean(p, used_parts(p));
  for (int64_t i = 0; i < p.batch * p.heads * p.q_len; ++i) mix(&q[i * p.dim], p.dim), quantise(&q[i * p.dim], p.dim);
  for (int64_t n = 0; n < p.batch * p.kv_heads; ++n)
    for (int64_t j0 = 0; j0 < p.kv_len; j0 += kPart) {
      const int64_t keys = std::min(kPart, p.kv_len - j0);
      double* block = &k[(n * p.kv_len + j0) * p.dim];
      for (int64_t i = 0; i < keys * p.dim; ++i) block[i] -= mean[n * p.dim + i % p.dim];
      for (int64_t j = 0; j < keys; ++j) mix(block + j * p.dim, p.dim);
      quantise(block, keys * p.dim);
      for (int64_t c = 0; c < p.value_dim; ++c)
        quantise(&v[(n * p.kv_len + j0) * p.value_dim + c], keys, p.value_dim);
    }
  for (int64_t bh = 0; bh < p.batch * p.heads; ++bh) {
    const int64_t b = bh / p.heads, h = bh % p.heads, kv = b * p.kv_heads + p.kv_head(h);
    for (int64_t qb = 0; qb < p.q_blocks(); ++qb) {
      Rows<double> rows{qb * p.block_q, std::min(p.q_len, (qb + 1) * p.block_q), {}, {}};
      rows.score.resize((rows.end - rows.first) * p.kv_len);
      for (int64_t i = rows.first; i < rows.end; ++i)
        for (int64_t j = 0; j < p.kv_len; ++j) {
          double s = 0;
          for (int64_t c = 0; c < p.dim; ++c)
            s += q[(bh * p.q_len + i) * p.dim + c] * k[(kv * p.kv_len + j) * p.dim + c];
          rows.score[(i - rows.first) * p.kv_len + j] = finish_score(p, b, h, i, j, s);
        }
      decide(p, b, h, rows, &result);
      for (int64_t i = rows.first; i < rows.end; ++i) {
        const double* score = &rows.score[(i - rows.first) * p.kv_len];
        double shift = 0, top = -kInf, total = 0;
        for (int64_t c = 0; c < p.dim; ++c) shift += mean[kv * p.dim + c] * p.q[(bh * p.q_len + i) * p.dim + c];
        shift *= p.scale;
        const double sink = p.sink.empty() ? -kInf : p.sink[h] - shift;
        for (int64_t j = 0; j < p.kv_len; ++j) top = fmax(top, score[j]);
        const double high = fmax(top, sink);
        if (high == -kInf) continue;
        const auto weigh = [&](double x) { return words ? in_words(x) : exp(x); };
        std::vector<double> locals(p.parts(), -kInf);
        for (int64_t j = 0; j < p.kv_len; ++j) locals[j / kPart] = fmax(locals[j / kPart], score[j]);
        for (int64_t j = 0; j < p.kv_len; ++j)
          if (const double local = locals[j / kPart]; local > -kInf)
            total += weigh(score[j] - local) * exp(local - high);
        total += exp(sink - high);
        const double lse = high + log(total);
        result.lse[bh * p.q_len + i] = lse + shift;
        double* out = &result.output[(bh * p.q_len + i) * p.value_dim];
        for (int64_t part = 0; part < p.parts(); ++part) {
          const int64_t j0 = part * kPart, j1 = std::min(p.kv_len, j0 + kPart);
          const double local = locals[part];
          if (local == -kInf || rows.skip[(i - rows.first) * p.parts() + part]) continue;
          for (int64_t j = j0; j < j1; ++j) {
            // A word half-way between two bytes becomes the larger.
            const double weight = floor(254 * weigh(score[j] - local) + .5) / 254 * exp(local - lse);
            for (int64_t c = 0; c < p.value_dim; ++c) out[c] += weight * v[(kv * p.kv_len + j) * p.value_dim + c];
          }
        }
      }
    }
  }
  return result;
}

}  // namespace oracle
