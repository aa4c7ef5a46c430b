// The products of 32 query rows with 64 keys, and of their weights with the values, in tiles.
#pragma once
#include "softmax.h"
#include "tiles.h"

// S[64][32] to `to`, of rows packed as [key_bytes / 4][32][4]. Work alternates between two sets of tiles, so that one
// set's sums are stored while the other's are made.
template <bool kInt8>
static void tile_scores(const char* key, int64_t ld, const char* rows, int64_t key_bytes, char* to) {
  const int64_t row = kTileRows * 4;
  for (int64_t j = 0; j < kKeys; j += 32, key += 32 * ld, to += 32 * row) {
    TILE_ZERO(0);
    TILE_ZERO(1);
    for (int64_t c = 0; c < key_bytes; c += 64) {
      if (key_bytes > 64 || j == 0) {  // else they are still there
        TILE_LOAD(6, rows + c * kTileRows, row);
        TILE_LOAD(7, rows + c * kTileRows + 64, row);
      }
      TILE_LOAD(4, key + c, ld);
      if (kInt8) {
        TILE_DOT_INT8(0, 4, 6);
        TILE_DOT_INT8(1, 4, 7);
      } else {
        TILE_DOT_BF16(0, 4, 6);
        TILE_DOT_BF16(1, 4, 7);
      }
    }
    TILE_STORE(0, to, row);
    TILE_STORE(1, to + 64, row);
    TILE_ZERO(2);
    TILE_ZERO(3);
    for (int64_t c = 0; c < key_bytes; c += 64) {
      if (key_bytes > 64) {
        TILE_LOAD(6, rows + c * kTileRows, row);
        TILE_LOAD(7, rows + c * kTileRows + 64, row);
      }
      TILE_LOAD(5, key + 16 * ld + c, ld);
      if (kInt8) {
        TILE_DOT_INT8(2, 5, 6);
        TILE_DOT_INT8(3, 5, 7);
      } else {
        TILE_DOT_BF16(2, 5, 6);
        TILE_DOT_BF16(3, 5, 7);
      }
    }
    TILE_STORE(2, to + 16 * row, row);
    TILE_STORE(3, to + 16 * row + 64, row);
  }
}

// O[wide][32] += V^T . P for the vectors of rows that move; V as in tile_values.h, P [32][32][2].
static void tile_values(const uint16_t* value, const uint16_t* p, int64_t wide, float* o, uint32_t moving) {
  const int64_t row = kTileRows * 4, key_row = kKeys * 2;
  const bool first = moving & 1, second = moving & 2;
  TILE_LOAD(4, p, row);
  TILE_LOAD(5, p + 32, row);
  TILE_LOAD(6, p + kTileRows * 32, row);
  TILE_LOAD(7, p + kTileRows * 32 + 32, row);
  for (int64_t c = 0; c < wide; c += 16, value += 16 * kKeys, o += 16 * kTileRows) {
    if (first && second) {
      TILE_LOAD(0, o, row);
      TILE_LOAD(2, value, key_row);
      TILE_LOAD(1, o + W, row);
      TILE_LOAD(3, value + 32, key_row);
      TILE_DOT_BF16(0, 2, 4);
      TILE_DOT_BF16(1, 2, 5);
      TILE_DOT_BF16(0, 3, 6);
      TILE_DOT_BF16(1, 3, 7);
      TILE_STORE(0, o, row);
      TILE_STORE(1, o + W, row);
      continue;
    }
    TILE_LOAD(2, value, key_row);
    TILE_LOAD(3, value + 32, key_row);
    if (first) {
      TILE_LOAD(0, o, row);
      TILE_DOT_BF16(0, 2, 4);
      TILE_DOT_BF16(0, 3, 6);
      TILE_STORE(0, o, row);
    } else {
      TILE_LOAD(1, o + W, row);
      TILE_DOT_BF16(1, 2, 5);
      TILE_DOT_BF16(1, 3, 7);
      TILE_STORE(1, o + W, row);
    }
  }
}
