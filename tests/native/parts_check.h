// Everything of the library but attend: means, packing, choosing blocks, and calls that must be refused.
#pragma once
#include <algorithm>
#include <numeric>

#include "attend_check.h"

inline tamis_summarize_args summarize_args(const Stored& x, const int64_t (&shape)[4], int64_t block, int threads) {
  tamis_summarize_args s;
  memset(&s, 0, sizeof s);
  s.batch = shape[0], s.heads = shape[1], s.seq = shape[2], s.dim = shape[3], s.block = block;
  s.x = x.view, s.threads = threads;
  return s;
}

// Mean and mean cosine of each block's rows, of the entries less `shift`.
template <class Real>
void summary(const std::vector<double>& x, const int64_t (&shape)[4], int64_t block, const std::vector<float>& shift,
             std::vector<double>* means, std::vector<double>* similarity) {
  const int64_t seq = shape[2], dim = shape[3];
  for (int64_t bh = 0; bh < shape[0] * shape[1]; ++bh)
    for (int64_t first = 0; first < seq; first += block) {
      const int64_t end = std::min(seq, first + block);
      std::vector<Real> sum(dim, 0), unit(dim, 0);
      for (int64_t i = first; i < end; ++i) {
        std::vector<Real> row(dim);
        Real square = 0, alike = 0;
        for (int64_t c = 0; c < dim; ++c)
          row[c] = (Real)x[(bh * seq + i) * dim + c] - (shift.empty() ? 0 : (Real)shift[bh * dim + c]);
        for (int64_t c = 0; c < dim; ++c) square += row[c] * row[c];
        alike = square > 0 ? 1 / std::sqrt(square) : 0;
        for (int64_t c = 0; c < dim; ++c) sum[c] += row[c], unit[c] += row[c] * alike;
      }
      Real square = 0;
      for (int64_t c = 0; c < dim; ++c) {
        means->push_back((double)(sum[c] / (Real)(end - first)));
        square += unit[c] * unit[c];
      }
      similarity->push_back((double)(square / (Real)((end - first) * (end - first))));
    }
}

inline void check_summarize(Judge& judge, const int64_t (&shape)[4], int64_t block, int dtype, int layout) {
  Random random(shape[2] * 31 + shape[3]);
  std::vector<double> x = normals(random, shape[0] * shape[1] * shape[2] * shape[3]);
  const std::vector<float> shift = floats(normals(random, shape[0] * shape[1] * shape[3]));
  const Stored stored(x, shape, dtype, layout);
  const int64_t blocks = (shape[2] + block - 1) / block, heads = shape[0] * shape[1];
  for (const bool shifted : {false, true}) {
    judge.at = "summarize " + std::to_string(shape[2]) + " x " + std::to_string(shape[3]);
    std::vector<double> means, similarity, plain_means, plain_similarity;
    const std::vector<float> less = shifted ? shift : std::vector<float>();
    summary<double>(x, shape, block, less, &means, &similarity);
    summary<float>(x, shape, block, less, &plain_means, &plain_similarity);
    std::vector<float> before;
    for (const int threads : {1, 3}) {
      std::vector<float> out(heads * blocks * shape[3], NAN), alike(heads * blocks, NAN);
      tamis_summarize_args s = summarize_args(stored, shape, block, threads);
      s.mean = shifted ? shift.data() : nullptr, s.means = out.data(), s.similarity = alike.data();
      judge.equal(tamis_summarize(judge.target.c_str(), &s), TAMIS_OK, "status");
      judge.within(doubles(out), means, {&plain_means}, epsilon(TAMIS_FP32), "means");
      judge.within(doubles(alike), similarity, {&plain_similarity}, epsilon(TAMIS_FP32), "similarity");
      judge.equal(before.empty() || before == out, true, "the same bits with other threads");
      before = out;
    }
  }
}

// Bytes are the nearest steps, scales the largest entry / 127, sums those of the bytes; blocks that are not used stay.
inline void check_pack(Judge& judge, int64_t dim, int64_t value_dim, int dtype, int layout) {
  Case c;
  oracle::Problem& p = c.problem;
  p.batch = 2, p.heads = p.kv_heads = 2, p.kv_len = 200, p.dim = dim, p.value_dim = value_dim;
  c.dtype = dtype, c.layout = layout;
  Random random(dim);
  p.q = normals(random, p.batch * p.heads * p.q_len * dim);
  p.k = normals(random, p.batch * p.heads * p.kv_len * dim);
  p.v = normals(random, p.batch * p.heads * p.kv_len * value_dim);
  const Inputs in(c);
  judge.at = "pack " + std::to_string(dim) + ", " + std::to_string(value_dim);
  std::vector<uint8_t> used(p.batch * p.kv_heads * p.parts(), 1);
  used[1] = used[7] = 0;
  const std::vector<double> mean = oracle::key_mean(p, used);
  for (const int threads : {1, 3}) {
    Packed packed(p);
    judge.equal(pack(judge.target.c_str(), p, arguments(c, in, threads), used, &packed), TAMIS_OK, "status");
    double worst_mean = 0, worst_key = 0, worst_value = 0, worst_scale = 0;
    int64_t wrong = 0;
    for (size_t i = 0; i < mean.size(); ++i) worst_mean = fmax(worst_mean, fabs(packed.mean[i] - mean[i]));
    for (int64_t n = 0; n < (int64_t)used.size(); ++n) {
      if (!used[n]) {
        wrong += packed.key[n * 64 * packed.view.dim4] != 99 || packed.value[n * 64 * value_dim] != 99;
        continue;
      }
      const int64_t head = n / p.parts(), j0 = n % p.parts() * 64, keys = std::min<int64_t>(64, p.kv_len - j0);
      double top = 0;
      for (int64_t j = 0; j < 64; ++j) {
        int64_t sum = 0;
        std::vector<double> x(dim);
        for (int64_t i = 0; i < dim && j < keys; ++i)
          x[i] = p.k[(head * p.kv_len + j0 + j) * dim + i] - (double)packed.mean[head * dim + i];
        oracle::mix(x.data(), dim);
        for (int64_t i = 0; i < packed.view.dim4; ++i) {
          const int byte = packed.key[(n * 64 + j) * packed.view.dim4 + i];
          sum += byte;
          if (j >= keys || i >= dim) {
            wrong += byte != 0;
            continue;
          }
          top = fmax(top, fabs(x[i]));
          worst_key = fmax(worst_key, fabs(x[i] / packed.key_scale[n] - byte));
        }
        wrong += packed.key_sum[n * 64 + j] != sum;
      }
      worst_scale = fmax(worst_scale, fabs(packed.key_scale[n] * 127 / top - 1));
      for (int64_t i = 0; i < value_dim; ++i) {
        int64_t sum = 0;
        top = 0;
        for (int64_t j = 0; j < 64; ++j) {
          const int byte = packed.value[(n * value_dim + i) * 64 + j];
          sum += byte;
          const double x = j < keys ? p.v[(head * p.kv_len + j0 + j) * value_dim + i] : 0;
          top = fmax(top, fabs(x));
          worst_value = fmax(worst_value, fabs(x / packed.value_scale[n * value_dim + i] - byte));
        }
        worst_scale = fmax(worst_scale, fabs(packed.value_scale[n * value_dim + i] * 127 / top - 1));
        wrong += packed.value_sum[n * value_dim + i] != sum;
      }
    }
    judge.equal(wrong, 0, "number of wrong sums, paddings and unused blocks");
    judge.at_most(worst_mean, 1e-6, "mean");                   // of 200 normals: a few units of fp32
    judge.at_most(worst_key - .5, 127 * 4e-7, "key rounding");  // beyond half a step: fp32 on the way there
    judge.at_most(worst_value - .5, 127 * 4e-7, "value rounding");
    judge.at_most(worst_scale, 4e-7, "scales");
  }
}

// Kept blocks of one row in fp64. False where a decision is too close to a tie for fp32 to be held to it.
inline bool choose(std::vector<double> score, const std::vector<uint8_t>& candidate, double topk, double cdf,
                   int64_t visible, std::vector<uint8_t>* keep) {
  std::vector<int64_t> order;
  for (size_t j = 0; j < score.size(); ++j)
    if (candidate[j]) order.push_back((int64_t)j);
  if (order.empty()) return true;
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return score[a] > score[b]; });
  const auto apart = [&](size_t n) { return n >= order.size() || score[order[n - 1]] - score[order[n]] > 1e-5; };
  size_t n = 0;
  bool clear = true;
  if (topk > 0) {
    n = std::min<size_t>(order.size(), std::max<int64_t>(1, (int64_t)ceil((topk - 1e-6) * (double)visible)));
  } else {
    double total = 0, mass = 0;
    for (int64_t j : order) total += exp(score[j] - score[order[0]]);
    while (n < order.size() && (n == 0 || mass < cdf)) {
      mass += exp(score[order[n++]] - score[order[0]]) / total;
      clear = clear && fabs(mass - cdf) > 1e-5;
    }
  }
  for (size_t i = 0; i < n; ++i) (*keep)[order[i]] = 1;
  return clear && apart(n);
}

inline void check_select(Judge& judge, int64_t q_len, int64_t kv_len, bool causal, double topk, double cdf) {
  oracle::Problem p;
  p.batch = 2, p.heads = 4, p.kv_heads = 2, p.q_len = q_len, p.kv_len = kv_len, p.dim = 40, p.causal = causal;
  Random random(q_len + (int64_t)(100 * (topk + cdf)));
  const int64_t rows = p.batch * p.heads * p.q_blocks(), width = p.kv_blocks(), words = (width + 63) / 64;
  const std::vector<float> q = floats(normals(random, rows * p.dim));
  const std::vector<float> k = floats(normals(random, p.batch * p.kv_heads * width * p.dim));
  std::vector<float> q_alike(rows), k_alike(p.batch * p.kv_heads * width);
  for (float& x : q_alike) x = (float)random.uniform();
  for (float& x : k_alike) x = (float)random.uniform();
  std::vector<uint8_t> must(p.q_blocks() * width);
  for (uint8_t& x : must) x = random.chance(.05);
  const std::vector<float> theta(p.heads, .2f), topks(p.heads, (float)topk), cdfs(p.heads, (float)cdf);

  tamis_select_args a;
  memset(&a, 0, sizeof a);
  a.batch = p.batch, a.heads = p.heads, a.kv_heads = p.kv_heads, a.head_dim = p.dim, a.scale = .4f, a.sink = 1;
  a.q_means = q.data(), a.k_means = k.data(), a.q_similarity = q_alike.data(), a.k_similarity = k_alike.data();
  a.similarity = theta.data(), a.topk = topk > 0 ? topks.data() : nullptr, a.cdf = cdf > 0 ? cdfs.data() : nullptr;
  a.geometry = geometry_of(p);
  a.must = must.data(), a.must_stride[2] = width, a.must_stride[3] = 1;
  judge.at = "select " + std::to_string(q_len) + " x " + std::to_string(kv_len);
  for (const int threads : {1, 3}) {
    std::vector<uint64_t> bits(rows * words, ~0ull);
    std::vector<int32_t> numbers(rows, -1), indices(rows * width, -7);
    a.bits = bits.data(), a.kv_num_blocks = numbers.data(), a.threads = threads;
    judge.equal(tamis_select(judge.target.c_str(), &a), TAMIS_OK, "status");
    judge.equal(tamis_expand(bits.data(), rows, width, width, indices.data(), threads), TAMIS_OK, "status of expand");
    int64_t judged = 0;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t qb = row % p.q_blocks(), h = row / p.q_blocks() % p.heads, b = row / p.q_blocks() / p.heads;
      const int64_t kv = b * p.kv_heads + p.kv_head(h);
      const bool judges = q_alike[row] >= theta[h];
      std::vector<uint8_t> keep(width, 0), candidate(width, 0);
      std::vector<double> score(width, 0);
      int64_t visible = 0;
      for (int64_t j = 0; j < width; ++j) {
        if (!p.block_possible(qb, j)) continue;
        ++visible;
        for (int64_t c = 0; c < p.dim; ++c)
          score[j] += (double)q[row * p.dim + c] * (double)k[(kv * width + j) * p.dim + c];
        score[j] *= (double)a.scale;
        // The diagonal: some row of the block stands at some key of the other.
        const int64_t i0 = qb * p.block_q + kv_len - q_len, i1 = std::min(q_len, (qb + 1) * p.block_q) + kv_len - q_len;
        const bool diagonal = causal && j * 64 < i1 && i0 < std::min(kv_len, (j + 1) * 64);
        candidate[j] = judges && k_alike[kv * width + j] >= theta[h];
        keep[j] = !candidate[j] || diagonal || j == 0 || must[qb * width + j];
      }
      const bool clear = !judges || choose(score, candidate, topk, cdf, visible, &keep);
      judged += clear;
      int32_t count = 0;
      for (int64_t j = 0; j < width; ++j) {
        const bool kept = bits[row * words + j / 64] >> (j % 64) & 1;
        if (clear) judge.equal(kept, keep[j], "a kept block");
        if (kept) judge.equal(indices[row * width + count++], j, "an index");
      }
      judge.equal(numbers[row], count, "kv_num_blocks");
      for (int64_t j = count; j < width; ++j) judge.equal(indices[row * width + j], -1, "the tail of the indices");
    }
    judge.equal(judged >= rows * 9 / 10, true, "most rows far from ties");
  }
}

// A prediction is its parts, each called for itself, bit by bit; by any number of threads.
inline void check_predict(Judge& judge, int64_t q_len, int64_t kv_len, int64_t dim, int dtype) {
  oracle::Problem p;
  p.batch = 2, p.heads = 4, p.kv_heads = 2, p.q_len = q_len, p.kv_len = kv_len, p.dim = dim, p.causal = true;
  const int64_t q_shape[] = {p.batch, p.heads, q_len, dim}, k_shape[] = {p.batch, p.kv_heads, kv_len, dim};
  const int64_t rows = p.batch * p.heads * p.q_blocks(), width = p.kv_blocks(), words = (width + 63) / 64;
  const int64_t kv_heads = p.batch * p.kv_heads;
  Random random(q_len + dim);
  std::vector<double> q_drawn = normals(random, p.batch * p.heads * q_len * dim);
  std::vector<double> k_drawn = normals(random, kv_heads * kv_len * dim);
  const Stored q(q_drawn, q_shape, dtype, dense), k(k_drawn, k_shape, dtype, dense);
  const std::vector<float> theta(p.heads, -1.f), cdf(p.heads, .6f);
  const char* target = judge.target.c_str();
  judge.at = "predict " + std::to_string(q_len) + " x " + std::to_string(kv_len) + " x " + std::to_string(dim);
  std::vector<uint64_t> expected;
  for (const int threads : {0, 1, 3}) {  // 0: the parts
    std::vector<float> mean(kv_heads * dim, NAN), q_means(rows * dim, NAN), q_alike(rows, NAN);
    std::vector<float> k_means(kv_heads * width * dim, NAN), k_alike(kv_heads * width, NAN);
    std::vector<uint64_t> bits(rows * words, ~0ull);
    std::vector<int32_t> numbers(rows, -1);
    tamis_predict_args a;
    memset(&a, 0, sizeof a);
    const int own = threads ? 0 : 1;  // threads of the parts, which a prediction does not ask
    a.key_mean = summarize_args(k, k_shape, 64, own), a.key_mean.means = mean.data();
    a.query = summarize_args(q, q_shape, p.block_q, own);
    a.query.means = q_means.data(), a.query.similarity = q_alike.data();
    a.key = summarize_args(k, k_shape, p.block_kv, own);
    a.key.mean = mean.data(), a.key.means = k_means.data(), a.key.similarity = k_alike.data();
    tamis_select_args& s = a.select;
    s.batch = p.batch, s.heads = p.heads, s.kv_heads = p.kv_heads, s.head_dim = dim, s.scale = .4f, s.sink = 1;
    s.q_means = q_means.data(), s.k_means = k_means.data();
    s.q_similarity = q_alike.data(), s.k_similarity = k_alike.data();
    s.similarity = theta.data(), s.cdf = cdf.data(), s.geometry = geometry_of(p);
    s.bits = bits.data(), s.kv_num_blocks = numbers.data(), s.threads = own, a.threads = threads;
    if (threads) {
      judge.equal(tamis_predict(target, &a), TAMIS_OK, "status");
      judge.equal(bits == expected, true, "the bits of the parts");
      judge.equal(a.max_blocks, *std::max_element(numbers.begin(), numbers.end()), "max_blocks");
    } else {
      judge.equal(tamis_key_mean(target, &a.key_mean), TAMIS_OK, "status of key_mean");
      judge.equal(tamis_summarize(target, &a.query), TAMIS_OK, "status of summarize");
      judge.equal(tamis_summarize(target, &a.key), TAMIS_OK, "status of summarize");
      judge.equal(tamis_select(target, &s), TAMIS_OK, "status of select");
      expected = bits;
    }
  }
}

inline void check_refusals(Judge& judge) {
  Case c;
  oracle::Problem& p = c.problem;
  p.q_len = 130, p.kv_len = 200, p.dim = p.value_dim = 16;
  Random random(1);
  p.q = normals(random, 2 * p.q_len * 16), p.k = normals(random, 2 * p.kv_len * 16), p.v = p.k;
  p.keep.assign(2 * 2 * 4, 1);
  const Inputs good(c);
  const struct {
    const char* what;
    int at, index, number;
  } kBad[] = {{"past the last block", 3, 4, 4}, {"negative", 0, -1, 4},  {"not ascending", 2, 1, 4},
              {"twice the same", 1, 0, 4},      {"too many", 0, 0, 5},   {"a negative number", 0, 0, -1},
              {"far outside", 2, INT32_MAX, 4}, {"far outside", 3, INT32_MIN, 4}};
  std::vector<float> output(2 * p.q_len * 16), lse(2 * p.q_len);
  std::vector<double> counts(2 * 2 * 3);
  for (const bool int8 : {false, true}) {
    const std::vector<uint8_t> used(2 * p.parts(), 1);
    Packed packed(p);
    judge.at = "refusals";
    judge.equal(pack(judge.target.c_str(), p, arguments(c, good, 1), used, &packed), TAMIS_OK, "status of packing");
    for (const auto& bad : kBad) {
      Inputs in(c);
      for (const int row : {1, 2, 3})  // several, which different threads come upon
        in.indices[row * 4 + bad.at] = bad.index, in.numbers[row] = bad.number;
      judge.at = std::string("corrupt mask: ") + bad.what + (int8 ? ", int8" : "");
      for (const int threads : {1, 3}) {
        tamis_attend_args a = arguments(c, in, threads);
        a.output = output.data(), a.lse = lse.data(), a.counts = counts.data(), a.int8 = int8, a.packed = packed.view;
        judge.equal(tamis_attend(judge.target.c_str(), &a), TAMIS_CORRUPT_MASK, "status");
      }
    }
  }
  judge.at = "an unknown target";
  const tamis_attend_args a = arguments(c, good, 1);
  judge.equal(tamis_attend("pentium", &a), TAMIS_UNKNOWN_TARGET, "status");
  judge.equal(tamis_attend(nullptr, &a), TAMIS_UNKNOWN_TARGET, "status without a name");
}
