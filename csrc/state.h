// The running state of an item's rows.
#pragma once

struct State {
  float *m, *l, *o;  // running maximum [rows], denominator [rows], output [tiles][value_dim][32]
  float *s, *rows;   // a tile of scores; a tile of fp32 rows
  double pv;         // PV products done, one row against one key block counting as 1
};
