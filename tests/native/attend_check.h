// One call of attend, from a problem to memory and back, and what its result is held against.
#pragma once
#include <algorithm>
#include <string>
#include <vector>

#include "data.h"
#include "judge.h"
#include "oracle.h"

// A number within fp32 rounding of the middle of two steps may be rounded to either: see FLIPS in tests/test_int8.py,
// which derives this bound on the relative L1 of an output, and on what may separate two targets.
constexpr double kFlips = 1e-3;
constexpr double kFlipsOfARow = 3e-3;  // of one row alone: a weight that flips moves it by up to 2.2e-3
constexpr int64_t kGuard = 16;  // entries behind each result that must stay as they are

struct Case {
  std::string name;
  oracle::Problem problem;
  int dtype = TAMIS_FP32, layout = dense;
  int mask_dtype = -1;  // of the problem's bias; TAMIS_BOOL: only who is hidden
  bool skip = false;    // a pv_threshold, chosen far from every decision
  double known_error = 0;  // a bound on the relative L1 of int8 that does not come from running the formulas
};

// The inputs as the library reads them. Rounds the problem's numbers to what is stored.
struct Inputs {
  Stored query, key, value, mask;
  std::vector<float> sink;
  std::vector<int32_t> numbers, indices;  // of the block mask; the tails hold garbage

  explicit Inputs(Case& c) {
    oracle::Problem& p = c.problem;
    query = Stored(p.q, {p.batch, p.heads, p.q_len, p.dim}, c.dtype, c.layout);
    key = Stored(p.k, {p.batch, p.kv_heads, p.kv_len, p.dim}, c.dtype, c.layout);
    value = Stored(p.v, {p.batch, p.kv_heads, p.kv_len, p.value_dim}, c.dtype, c.layout);
    if (!p.bias.empty()) {
      std::vector<double> stored = p.bias;
      if (c.mask_dtype == TAMIS_BOOL)
        for (double& x : stored) x = x != -INFINITY;
      mask = Stored(stored, {p.batch, p.heads, p.q_len, p.kv_len}, c.mask_dtype, c.layout);
      if (c.mask_dtype != TAMIS_BOOL) p.bias = stored;
    }
    sink = floats(p.sink);
    p.sink = doubles(sink);
    p.scale = (float)p.scale, p.softcap = (float)p.softcap;
    if (p.keep.empty()) return;
    const int64_t rows = p.batch * p.heads * p.q_blocks(), width = p.kv_blocks();
    numbers.assign(rows, 0);
    indices.assign(rows * width, -77);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t kb = 0; kb < width; ++kb)
        if (p.keep[r * width + kb]) indices[r * width + numbers[r]++] = (int32_t)kb;
  }
};

inline tamis_geometry geometry_of(const oracle::Problem& p) {
  tamis_geometry g;
  memset(&g, 0, sizeof g);
  g.q_len = p.q_len, g.kv_len = p.kv_len, g.block_q = p.block_q, g.block_kv = p.block_kv;
  g.causal = p.causal, g.window = p.window;
  return g;
}

inline tamis_attend_args arguments(const Case& c, const Inputs& in, int threads) {
  const oracle::Problem& p = c.problem;
  tamis_attend_args a;
  memset(&a, 0, sizeof a);
  a.batch = p.batch, a.heads = p.heads, a.kv_heads = p.kv_heads, a.head_dim = p.dim, a.value_dim = p.value_dim;
  a.query = in.query.view, a.key = in.key.view, a.value = in.value.view;
  a.geometry = geometry_of(p);
  if (!p.keep.empty()) {
    a.kv_num_blocks = in.numbers.data(), a.kv_indices = in.indices.data();
    a.num_stride[0] = p.heads * p.q_blocks(), a.num_stride[1] = p.q_blocks(), a.num_stride[2] = 1;
    for (int i = 0; i < 3; ++i) a.idx_stride[i] = a.num_stride[i] * p.kv_blocks();
    a.max_blocks = p.kv_blocks();
  }
  a.scale = (float)p.scale, a.softcap = (float)p.softcap;
  a.attn_mask = in.mask.view;
  a.sink_logits = in.sink.empty() ? nullptr : in.sink.data();
  a.threads = threads;
  return a;
}

// Memory of a tamis_packed, filled with what must not be used.
struct Packed {
  std::vector<int8_t> key, value;
  std::vector<float> key_scale, value_scale, mean;
  std::vector<int32_t> key_sum, value_sum;
  tamis_packed view;

  explicit Packed(const oracle::Problem& p) {
    const int64_t n = p.batch * p.kv_heads * p.parts();
    view.capacity = p.parts(), view.dim4 = (p.dim + 3) / 4 * 4, view.mixed = oracle::mixed(p.dim);
    key.assign(n * 64 * view.dim4 + 1, 99), key_scale.assign(n + 1, NAN), key_sum.assign(n * 64 + 1, 1 << 20);
    value.assign(n * 64 * p.value_dim + 1, 99), value_scale.assign(n * p.value_dim + 1, NAN);
    value_sum.assign(n * p.value_dim + 1, 1 << 20), mean.assign(p.batch * p.kv_heads * p.dim, 0.f);
    view.key = key.data(), view.key_scale = key_scale.data(), view.key_sum = key_sum.data();
    view.value = value.data(), view.value_scale = value_scale.data(), view.value_sum = value_sum.data();
    view.key_mean = mean.data();
  }
};

// key_mean and pack_kv of the blocks that attend may visit, as the Python side calls them.
inline int pack(const char* target, const oracle::Problem& p, const tamis_attend_args& a,
                const std::vector<uint8_t>& used, Packed* to) {
  if (!(p.softcap > 0)) {
    tamis_summarize_args s;
    memset(&s, 0, sizeof s);
    s.batch = p.batch, s.heads = p.kv_heads, s.seq = p.kv_len, s.dim = p.dim, s.block = 64;
    s.x = a.key, s.used = used.data(), s.means = to->mean.data(), s.threads = a.threads;
    if (const int status = tamis_key_mean(target, &s)) return status;
  }
  tamis_pack_args k;
  memset(&k, 0, sizeof k);
  k.batch = p.batch, k.kv_heads = p.kv_heads, k.seq = p.kv_len, k.head_dim = p.dim, k.value_dim = p.value_dim;
  k.key = a.key, k.value = a.value, k.used = used.data(), k.packed = to->view, k.threads = a.threads;
  return tamis_pack_kv(target, &k);
}

struct Answer {
  std::vector<uint8_t> bytes;  // output, lse and counts as they came
  std::vector<double> output, lse, counts;
};

// On the judge's target; `packer` is the one that packs for it, or empty: int8 makes its own bytes.
inline Answer attend(Judge& judge, const Case& c, const Inputs& in, const std::string& packer, bool int8, int threads,
                     const std::vector<float>& threshold, bool bf16_products = false) {
  const oracle::Problem& p = c.problem;
  tamis_attend_args a = arguments(c, in, threads);
  const int64_t rows = p.batch * p.heads * p.q_len, out = rows * p.value_dim, width = size_of(c.dtype);
  const int64_t counts = p.batch * p.heads * p.q_blocks() * 3;
  Answer r;
  r.bytes.resize((out + kGuard) * width + (rows + kGuard) * 4 + 8);
  std::vector<float> lse(rows + kGuard, NAN);
  std::vector<double> count(counts + kGuard, NAN);
  std::vector<uint8_t> output((out + kGuard) * width);
  for (int64_t i = 0; i < out + kGuard; ++i) write(output.data(), i, c.dtype, NAN);
  a.output = output.data(), a.lse = lse.data(), a.counts = count.data();
  a.pv_threshold = threshold.empty() ? nullptr : threshold.data();
  a.int8 = int8, a.bf16_products = bf16_products;
  Packed packed(p);
  if (int8 && !packer.empty()) {
    std::vector<uint8_t> used(p.batch * p.kv_heads * p.parts() + 1, 7);
    judge.equal(tamis_used_blocks(&a, used.data()), TAMIS_OK, "status of used_blocks");
    const std::vector<uint8_t> expected = oracle::used_parts(p);
    judge.equal(std::equal(expected.begin(), expected.end(), used.begin()), true, "used_blocks as expected");
    judge.equal(pack(packer.c_str(), p, a, used, &packed), TAMIS_OK, "status of packing");
    a.packed = packed.view;
    memset(&a.key, 0, sizeof a.key), memset(&a.value, 0, sizeof a.value);
  }
  judge.equal(tamis_attend(judge.target.c_str(), &a), TAMIS_OK, "status of attend");
  for (int64_t i = 0; i < kGuard; ++i)
    judge.equal(std::isnan(read(output.data(), out + i, c.dtype)) && std::isnan(lse[rows + i]) &&
                    std::isnan(count[counts + i]),
                true, "memory behind the results untouched");
  for (int64_t i = 0; i < out; ++i) r.output.push_back(read(output.data(), i, c.dtype));
  r.lse.assign(lse.begin(), lse.begin() + rows);
  r.counts.assign(count.begin(), count.begin() + counts);
  r.bytes = output;
  r.bytes.insert(r.bytes.end(), (uint8_t*)lse.data(), (uint8_t*)(lse.data() + rows));
  r.bytes.insert(r.bytes.end(), (uint8_t*)count.data(), (uint8_t*)(count.data() + counts));
  return r;
}

// For each head a threshold in the middle of the widest gap between decisions. False where a gap is below `room`.
inline bool choose_thresholds(const oracle::Result& r, double room, std::vector<float>* to) {
  to->clear();
  for (std::vector<double> all : r.distances) {
    std::sort(all.begin(), all.end());
    double widest = 0, middle = 0;
    for (size_t i = all.size() / 4; i + 1 < all.size(); ++i)
      if (all[i + 1] - all[i] > widest) widest = all[i + 1] - all[i], middle = (all[i + 1] + all[i]) / 2;
    if (widest / 2 < room) return false;
    to->push_back((float)middle);
  }
  return true;
}

// With leave to round values and weights to bf16, which amx takes: within a unit of bf16 of what int8 errs. The other
// targets do as before.
inline void check_bf16_products(Judge& judge, const Case& c, const Inputs& in, const Answer& without, bool int8,
                                const std::vector<int>& threads, const std::vector<float>& threshold,
                                const oracle::Result& truth, const std::vector<const std::vector<double>*>& plains,
                                bool strict) {
  if (judge.target != "amx") {
    const bool same = attend(judge, c, in, "", int8, threads[0], threshold, true).bytes == without.bytes;
    return judge.equal(same, true, "the same bits with leave for bf16 products, packed in the call");
  }
  Answer answer;
  for (const int n : threads) {
    const Answer now = attend(judge, c, in, "", int8, n, threshold, true);
    if (n != threads[0])
      judge.equal(now.bytes == answer.bytes, true, "the same bits with other threads, bf16 products");
    answer = now;
  }
  judge.within(answer.counts, truth.counts, {}, 1e-9, "counts, bf16 products");
  if (int8 && !threshold.empty()) return;  // the truth is that of other bytes
  if (strict)
    return judge.within(answer.output, truth.output, plains, fmax(epsilon(c.dtype), epsilon(TAMIS_BF16)),
                        "output, bf16 products");
  const size_t n = answer.output.size();
  judge.at_most(relative_l1(answer.output, truth.output, 0, n),
                (int8 ? relative_l1(*plains[0], truth.output, 0, n) : 0) + 2e-2 + epsilon(c.dtype),
                "relative L1, bf16 products");
}

// Whether a target makes weights of 8 bits from integers of 16.
inline bool in_words(const std::string& target) { return target.find("avx512") == 0 || target == "amx"; }

// Full precision and int8 on every target, `targets` with the one first that the others are compared with.
inline void check_attend(std::vector<Judge>& judges, Case c, const std::vector<int>& threads, bool strict) {
  const Inputs in(c);
  oracle::Problem p = c.problem;
  const oracle::Result exact = oracle::attention<double>(p), single = oracle::attention<float>(p);
  for (const bool int8 : {false, true}) {
    oracle::Result either[2] = {exact, exact};  // the formulas, with weights from exponentials and from words
    for (const bool words : {false, true})
      if (int8) either[words] = oracle::attention_int8(p, words);
    std::vector<float> threshold;
    // A flipped step moves a score by about .01.
    if (c.skip && !choose_thresholds(either[0], int8 ? 0.02 : 1e-4, &threshold)) {
      if (strict) judges[0].at = c.name, judges[0].fail("no threshold lies far enough from every decision");
      threshold.clear();
    }
    oracle::Problem q = p;
    q.threshold = doubles(threshold);
    for (const bool words : {false, true})
      if (int8 && !threshold.empty()) either[words] = oracle::attention_int8(q, words);
    // Without a threshold q is p.
    const oracle::Result truth = threshold.empty() ? exact : int8 ? either[0] : oracle::attention<double>(q);
    const oracle::Result plain = threshold.empty() ? single : oracle::attention<float>(q);
    const double eps = epsilon(c.dtype);
    Answer firsts[2];
    for (Judge& judge : judges) {
      const std::string& target = judge.target;
      const bool words = in_words(target);
      const oracle::Result& formulas = either[words];
      Answer& first = firsts[words];
      judge.at = c.name + (int8 ? ", int8" : ", full");
      const Answer answer = attend(judge, c, in, target, int8, threads[0], threshold);
      for (size_t i = 1; i < threads.size(); ++i)
        judge.equal(attend(judge, c, in, target, int8, threads[i], threshold).bytes == answer.bytes, true,
                    "the same bits with other threads");
      if (int8 && target == "amx")
        judge.equal(attend(judge, c, in, "", int8, threads[0], threshold).bytes == answer.bytes, true,
                    "the same bits where the call packs for itself");
      check_bf16_products(judge, c, in, answer, int8, threads, threshold, truth, {&formulas.output, &plain.output},
                          strict);
      judge.within(answer.counts, truth.counts, {}, 1e-9, "counts");
      if (!strict) {
        // As tests/fuzz.py: one flip moves a score by a 127th of the largest entry, and few keys do not average it out.
        judge.at_most(relative_l1(answer.output, int8 ? formulas.output : truth.output, 0, answer.output.size()),
                      (int8 ? 2e-2 : 1e-4) + eps, "relative L1");
      } else if (!int8) {
        judge.within(answer.output, truth.output, {&plain.output}, eps, "output");
        judge.within(answer.lse, truth.lse, {&plain.lse}, epsilon(TAMIS_FP32), "lse");
      } else {
        // With a threshold the formulas stand for the truth: other scores, other products that are skipped.
        if (threshold.empty()) {
          judge.within(answer.output, truth.output, {&formulas.output, &plain.output}, eps, "output");
          judge.within(answer.lse, truth.lse, {&formulas.lse, &plain.lse}, epsilon(TAMIS_FP32), "lse");
        }
        const size_t head = p.q_len * p.value_dim;
        for (size_t at = 0; at < answer.output.size(); at += head) {
          const double flips = p.q_len == 1 ? kFlipsOfARow : kFlips;
          judge.at_most(relative_l1(answer.output, formulas.output, at, head), flips + eps,
                        "relative L1 to the formulas");
          if (c.known_error > 0)
            judge.at_most(relative_l1(answer.output, truth.output, at, head), c.known_error, "relative L1 to truth");
        }
      }
      if (first.output.empty()) first = answer;
      if (int8 && strict && target != judges[0].target) {
        const double allowed = kFlips + eps;
        judge.at_most(relative_l1(answer.output, first.output, 0, first.output.size()), allowed, "targets apart");
        // What one target packs all others read.
        const Answer other = attend(judge, c, in, judges[0].target, int8, threads[0], threshold);
        judge.at_most(relative_l1(other.output, first.output, 0, first.output.size()), allowed, "packed elsewhere");
        double apart = 0;
        for (size_t i = 0; i < first.lse.size(); ++i)
          if (answer.lse[i] != first.lse[i]) apart = fmax(apart, fabs(answer.lse[i] - first.lse[i]));
        judge.at_most(apart, 1e-4, "lse of targets apart");
      }
    }
  }
}
