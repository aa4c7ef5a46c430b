// The running state of an item's rows, and what they visit.
#pragma once
#include "softmax.h"

struct State {
  float *m, *l, *o;  // running maximum [rows], denominator [rows], output [tiles][channels][32]
  float *s, *rows;   // a tile of scores; a tile of fp32 rows
  double pv;         // PV products done, one row against one key block counting as 1
};

// Up to 64 keys of a kept block, as all row tiles of a query block see them.
struct Part {
  int64_t j0, keys;
  double weight;  // of the block
  Sight sights[kMostRows / kTileRows];
};
