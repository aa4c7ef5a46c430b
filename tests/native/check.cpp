// The C ABI on every target of this processor against an oracle in fp64.
//
//   tamis_check [--expect "NAMES"] [--seconds N] [--seed N]
//
// The fixed cases run first. `--expect` fails unless these are the targets, best first; `--seconds` goes on with random
// calls for so long; `--seed` runs only the random call that printed it.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "attend_check.h"
#include "parts_check.h"

namespace {

using oracle::Problem;

void fill(Problem& p, Random& random, double size = 1) {
  p.q = normals(random, p.batch * p.heads * p.q_len * p.dim, size);
  p.k = normals(random, p.batch * p.kv_heads * p.kv_len * p.dim, size);
  p.v = normals(random, p.batch * p.kv_heads * p.kv_len * p.value_dim);
  p.scale = 1 / std::sqrt((double)p.dim);
}

Case make(const char* name, int64_t q_len, int64_t kv_len, int64_t dim, int64_t value_dim, int64_t heads = 2,
          int64_t kv_heads = 2) {
  Case c;
  c.name = name;
  Problem& p = c.problem;
  p.q_len = q_len, p.kv_len = kv_len, p.dim = dim, p.value_dim = value_dim, p.heads = heads, p.kv_heads = kv_heads;
  Random random(q_len * 7 + kv_len * 3 + dim);
  fill(p, random);
  return c;
}

void keep_some(Problem& p, Random& random, double density) {
  p.keep.resize(p.batch * p.heads * p.q_blocks() * p.kv_blocks());
  for (uint8_t& x : p.keep) x = random.chance(density);
}

void bias_some(Case& c, Random& random, double hidden, int dtype) {
  Problem& p = c.problem;
  p.bias = normals(random, p.batch * p.heads * p.q_len * p.kv_len);
  for (double& x : p.bias) x = random.chance(hidden) ? -INFINITY : dtype == TAMIS_BOOL ? 0 : x;
  c.mask_dtype = dtype;
}

std::vector<Case> fixed_cases() {
  std::vector<Case> all;
  const auto add = [&](Case c) -> Problem& { return all.push_back(c), all.back().problem; };
  Random random(5);
  add(make("one by one", 1, 1, 40, 24));
  add(make("63 x 65", 63, 65, 64, 64));
  add(make("65 x 63", 65, 63, 80, 33));
  add(make("200 x 200", 200, 200, 128, 40));
  add(make("1 x 200", 1, 200, 64, 128, 4, 2));
  add(make("head size 3", 65, 130, 3, 1));

  add(make("causal", 130, 130, 64, 64)).causal = true;
  add(make("causal, fewer queries", 63, 200, 40, 48, 4, 2)).causal = true;
  add(make("causal, empty rows", 200, 65, 80, 64)).causal = true;
  add(make("window", 130, 200, 64, 80)).window = 40;
  Problem& both = add(make("causal window", 200, 200, 40, 64, 4, 1));
  both.causal = true, both.window = 65;

  for (const int dtype : {TAMIS_BF16, TAMIS_FP16})
    for (int layout = 0; layout < kLayouts; ++layout) {
      Case c = make(dtype == TAMIS_BF16 ? "bf16" : "fp16", 65, 200, layout == gaps ? 40 : 64, 24, 4, 2);
      c.name += ", layout " + std::to_string(layout);
      c.dtype = dtype, c.layout = layout, c.problem.causal = layout % 2;
      add(c);
    }
  for (int layout = 1; layout < kLayouts; ++layout) {
    Case c = make("fp32, layout", 65, 130, 80, 64, 4, 2);
    c.name += " " + std::to_string(layout);
    c.layout = layout, c.problem.batch = 2;
    fill(c.problem, random);
    add(c);
  }

  for (const int64_t block_q : {64, 128})
    for (const int64_t block_kv : {64, 128}) {
      Problem& p = add(make("block mask", 200, 330, 40, 40, 4, 2));
      all.back().name += " of " + std::to_string(block_q) + " x " + std::to_string(block_kv);
      p.block_q = block_q, p.block_kv = block_kv, p.causal = block_q == block_kv;
      keep_some(p, random, .5);
    }
  Problem& none = add(make("block mask, a row of nothing", 130, 200, 64, 64));
  keep_some(none, random, .6);
  for (int i = 0; i < 4; ++i) none.keep[i] = 0;

  Case c = make("additive mask", 65, 130, 64, 64, 4, 2);
  bias_some(c, random, .2, TAMIS_FP32);
  add(c).causal = true;
  c = make("additive mask, fp16, strided", 65, 130, 40, 64);
  c.layout = every_other;
  bias_some(c, random, .2, TAMIS_FP16);
  add(c);
  c = make("bool mask, empty rows", 130, 200, 64, 40);
  bias_some(c, random, .4, TAMIS_BOOL);
  for (const int64_t row : {0, 17, 40, 129})
    for (int64_t j = 0; j < 200; ++j) c.problem.bias[row * 200 + j] = -INFINITY;
  add(c);
  c = make("a single head, all of it hidden", 65, 65, 64, 64, 1, 1);
  bias_some(c, random, 1, TAMIS_BOOL);
  add(c);

  add(make("softcap", 130, 200, 64, 64)).softcap = 1.5;
  Problem& capped = add(make("softcap, causal, block mask", 200, 200, 40, 64, 4, 2));
  capped.softcap = 30, capped.causal = true;
  keep_some(capped, random, .7);
  add(make("sink logits", 130, 200, 80, 64, 4, 2)).sink = {-1, 0, 2, 5};
  c = make("sink logits, empty rows", 200, 65, 64, 64);
  c.problem.causal = true, c.problem.sink = {1, -INFINITY};
  add(c);

  for (const bool masked : {false, true}) {
    c = make("pv_threshold", 200, 330, 64, 64);
    c.skip = true;
    // Blocks of keys of very different size: some hold little of the weight, and are skipped.
    for (int64_t i = 0; i < (int64_t)c.problem.k.size(); ++i) c.problem.k[i] *= .2 + i / 64 % 330 / 64 * 7 % 5;
    if (masked) c.name += ", causal, block mask", c.problem.causal = true, keep_some(c.problem, random, .7);
    add(c);
  }
  // Published for this scheme on normals with one value scale per channel and key block, as in tests/test_int8.py.
  c = make("1000 normals", 65, 1000, 64, 64);
  c.known_error = .0152;
  add(c);
  return all;
}

Case random_case(uint64_t seed) {
  Random random(seed);
  Case c;
  c.name = "random call of --seed " + std::to_string(seed);
  Problem& p = c.problem;
  const int64_t lengths[] = {1, 2, 15, 17, 33, 63, 64, 65, 127, 129, 1 + random.below(260)};
  const int64_t sizes[] = {1, 3, 4, 15, 16, 17, 40, 63, 64, 65, 80, 128, 129, 1 + random.below(256)};
  p.batch = 1 + random.chance(.3), p.kv_heads = 1 + random.below(2), p.heads = p.kv_heads * (1 + random.below(3));
  p.q_len = random.pick(lengths), p.kv_len = random.pick(lengths), p.dim = random.pick(sizes);
  p.value_dim = random.pick(sizes), p.block_q = 64 << random.below(2), p.block_kv = 64 << random.below(2);
  fill(p, random, random.chance(.3) ? 2 : 1);
  c.dtype = (int)random.below(3), c.layout = (int)random.below(kLayouts);
  p.causal = random.chance(.5);
  if (random.chance(.2)) p.window = 1 + random.below(p.kv_len + 3);
  if (random.chance(.2)) p.scale = random.chance(.5) ? -.1 : 0;
  if (random.chance(.2)) p.softcap = random.chance(.5) ? .5 : 30;
  if (random.chance(.2)) p.sink = normals(random, p.heads);
  if (random.chance(.5)) keep_some(p, random, .1 + random.uniform());
  if (random.chance(.3)) bias_some(c, random, .3, (int)random.below(4));
  c.skip = random.chance(.2);
  return c;
}

void check_parts(Judge& judge) {
  for (const int dtype : {TAMIS_FP32, TAMIS_BF16, TAMIS_FP16})
    for (int layout = 0; layout < kLayouts; ++layout) {
      check_summarize(judge, {2, 2, 200, layout % 2 ? 40 : 64}, 64, dtype, layout);
      check_pack(judge, layout % 2 ? 40 : 64, layout % 2 ? 33 : 24, dtype, layout);
    }
  for (const int64_t seq : {1, 63, 65, 300}) check_summarize(judge, {1, 2, seq, 80}, 128, TAMIS_FP32, dense);
  for (const bool causal : {false, true}) {
    check_select(judge, 1000, 1000, causal, .3, 0);
    check_select(judge, 700, 1100, causal, 0, .9);
    check_select(judge, 63, 65, causal, .5, 0);
    check_select(judge, 130, 6500, causal, 0, .5);
  }
  check_predict(judge, 300, 700, 40, TAMIS_BF16);
  check_predict(judge, 1, 65, 16, TAMIS_FP32);
  check_predict(judge, 700, 700, 64, TAMIS_FP32);
  check_refusals(judge);
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

int usage(const char* name) {
  std::fprintf(stderr, "usage: %s [--expect \"NAMES\"] [--seconds N] [--seed N]\n", name);
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  const char* expected = nullptr;
  double seconds = 0;
  long long seed = -1;
  for (int i = 1; i < argc; i += 2) {
    if (i + 1 == argc) return usage(argv[0]);
    if (!std::strcmp(argv[i], "--expect"))
      expected = argv[i + 1];
    else if (!std::strcmp(argv[i], "--seconds"))
      seconds = std::atof(argv[i + 1]);
    else if (!std::strcmp(argv[i], "--seed"))
      seed = std::atoll(argv[i + 1]);
    else
      return usage(argv[0]);
  }
  if (tamis_abi_version() != TAMIS_ABI_VERSION) return std::printf("FAIL: another ABI version\n"), 1;
  const std::string names = tamis_targets();
  if (expected && names != expected)
    return std::printf("FAIL: the targets are \"%s\", expected \"%s\"\n", names.c_str(), expected), 1;

  std::vector<Judge> judges;  // the plainest first: the others are compared with it
  for (size_t at = 0; at != std::string::npos && at < names.size();) {
    const size_t end = std::min(names.find(' ', at), names.size());
    judges.insert(judges.begin(), Judge());
    judges[0].target = names.substr(at, end - at);
    at = end + 1;
  }
  size_t cases = 0, random = 0;
  const auto start = std::chrono::steady_clock::now();
  if (seed >= 0) {
    check_attend(judges, random_case((uint64_t)seed), {1, 3}, false), ++random;
  } else {
    for (const Case& c : fixed_cases()) check_attend(judges, c, {1, 3}, true), ++cases;
    for (Judge& judge : judges) check_parts(judge);
    while (seconds_since(start) < seconds) check_attend(judges, random_case(++random), {1, 3}, false);
  }
  int failures = 0;
  for (const Judge& judge : judges) {
    failures += judge.failures;
    std::printf("%-12s %s: %d checks; %zu cases and %zu random calls, full and int8; largest error %.2f of its bound\n",
                judge.target.c_str(), judge.failures ? "FAILED" : "ok", judge.checks, cases, random, judge.closest);
  }
  std::printf("%d failures, %.1f seconds\n", failures, seconds_since(start));
  return failures ? 1 : 0;
}
