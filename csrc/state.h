// The running state of an item's rows, and what they visit.
#pragma once
#include "ahead.h"
#include "softmax.h"

constexpr int64_t kMostLines = 16;  // of either that a visit of a tile brings in

struct State {
  float *m, *l, *o;  // running maximum [rows], denominator [rows], output [tiles][channels][32]
  float *s, *rows;   // a tile of scores; a tile of fp32 rows
  Ahead next, out;   // the query rows of the item that may come next, and where this one's output goes
  int lines;         // of either that a visit brings in
  double pv;         // PV products done, one row against one key block counting as 1

  // Of an item with so many visits of tiles: all is to come in within half of them.
  void spread_lines(int64_t visits) {
    const int64_t most = greatest(next.lines(), out.lines()), each = visits ? (2 * most + visits - 1) / visits : 0;
    lines = (int)least(each, kMostLines);
  }
  void bring_in() { next.some(lines), out.some(lines); }
};

// Up to 64 keys of a kept block, as all row tiles of a query block see them.
struct Part {
  int64_t j0, keys;
  double weight;  // of the block
  Sight sights[kMostRows / kTileRows];
};
