// The running state of an item's rows, and what they visit.
#pragma once
#include "ahead.h"
#include "softmax.h"

constexpr int kLinesAVisit = 8;  // of either that a visit of a tile brings in

struct State {
  float *m, *l, *o;  // running maximum [rows], denominator [rows], output [tiles][channels][32]
  float *s, *rows;   // a tile of scores; a tile of fp32 rows
  Ahead next, out;   // the query rows of the item that may come next, and where this one's output goes
  double pv;         // PV products done, one row against one key block counting as 1
};

// Up to 64 keys of a kept block, as all row tiles of a query block see them.
struct Part {
  int64_t j0, keys;
  double weight;  // of the block
  Sight sights[kMostRows / kTileRows];
};
