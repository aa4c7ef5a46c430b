// Bringing rows into the second cache while something else is computed: a few lines at a time, for a core that waits
// for more than some sixteen has no room for its own misses.
#pragma once
#include "rows.h"

struct Ahead {
  const char* row = nullptr;
  int64_t rows = 0, stride = 0, bytes = 0, at = 0;  // rows left, how far apart they are, how long; of the first, done

  void some(int lines) {
    for (; lines > 0 && rows > 0; --lines) {
      __builtin_prefetch(row + at, 0, 2);
      at += 64;
      if (at >= bytes) at = 0, row += stride, --rows;
    }
  }
  int64_t lines_a_row() const { return (bytes + 63) / 64; }
  int64_t lines() const { return rows * lines_a_row(); }
  void a_row() { some((int)lines_a_row()); }
};

// A row that is asked for so many rows before it is read has come in by then.
constexpr int64_t kRowsAhead = 64;

// Rows i to end, or none.
static inline Ahead rows_ahead(const tamis_tensor& t, int64_t b, int64_t h, int64_t i, int64_t end, int64_t dim) {
  const int64_t size = dtype_size(t.dtype);
  if (!t.data || t.stride[3] != 1) return Ahead{};
  return {row_of(t, b, h, i), end - i, t.stride[2] * size, dim * size, 0};
}
