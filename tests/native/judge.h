// Bounds, and what has been checked. A test says where it is with `Judge::at`; failures are printed and counted.
#pragma once
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>

#include <cmath>
#include <string>
#include <vector>

struct Judge {
  std::string target, at;
  int failures = 0, checks = 0;
  double closest = 0;  // the largest error, as a share of its bound

  void fail(const char* format, ...) __attribute__((format(printf, 2, 3))) {
    va_list list;
    va_start(list, format);
    printf("FAIL %s: %s: ", target.c_str(), at.c_str());
    vprintf(format, list);
    printf("\n");
    va_end(list);
    ++failures;
  }
  void equal(int64_t actual, int64_t expected, const char* what) {
    ++checks;
    if (actual != expected) fail("%s is %lld, expected %lld", what, (long long)actual, (long long)expected);
  }
  void at_most(double error, double bound, const char* what) {
    ++checks;
    if (bound > 0) closest = fmax(closest, error / bound);
    if (!(error <= bound)) fail("%s: error %.4g, allowed %.4g", what, error, bound);
  }

  // Mean error <= 2 * that of the yardsticks + rounding, the largest within 4 times, as `assert_within` of
  // tests/oracle.py has it. Infinities stand in the same places.
  typedef std::vector<double> Numbers;
  void within(const Numbers& actual, const Numbers& expected, const std::vector<const Numbers*>& plains, double eps,
              const char* what) {
    double sum = 0, most = 0, size = 0, largest = 0, n = 0;
    Numbers plain_sum(plains.size(), 0), plain_most(plains.size(), 0);
    for (size_t i = 0; i < expected.size(); ++i) {
      if (!std::isfinite(expected[i])) {
        if (actual[i] != expected[i]) return fail("%s[%zu] is %g, expected %g", what, i, actual[i], expected[i]);
        continue;
      }
      if (!std::isfinite(actual[i])) return fail("%s[%zu] is %g, expected %g", what, i, actual[i], expected[i]);
      const double error = fabs(actual[i] - expected[i]);
      sum += error, most = fmax(most, error), n += 1;
      size += fabs(expected[i]), largest = fmax(largest, fabs(expected[i]));
      for (size_t k = 0; k < plains.size(); ++k) {
        const double theirs = fabs((*plains[k])[i] - expected[i]);
        plain_sum[k] += theirs, plain_most[k] = fmax(plain_most[k], theirs);
      }
    }
    if (n == 0) return;
    double mean_bound = eps * size, most_bound = eps * largest;
    for (size_t k = 0; k < plains.size(); ++k) mean_bound += 2 * plain_sum[k], most_bound += 4 * plain_most[k];
    at_most(sum / n, mean_bound / n, (std::string(what) + ", mean").c_str());
    at_most(most, most_bound, (std::string(what) + ", largest").c_str());
  }
};

// sum |actual - expected| / sum |expected| over `n` from `first`; 0 where both are 0.
inline double relative_l1(const std::vector<double>& actual, const std::vector<double>& expected, size_t first,
                          size_t n) {
  double error = 0, size = 0;
  for (size_t i = first; i < first + n; ++i) error += fabs(actual[i] - expected[i]), size += fabs(expected[i]);
  return error == 0 ? 0 : error / size;
}
