// The product of up to 32 rows with two panels of weights: 32 sums per row, in float32.
//
// With few rows the time is that of reading the weights, whatever computes. With many, AMX does: a panel is stored just
// as a tile of the second operand wants it, and rows of activations are the first operand as they lie.

#pragma once

#include <algorithm>
#include <cstdint>

#include "linear_ahead.h"
#include "linear_lanes.h"
#include "linear_unpack.h"

#if PACKLIGHT_LEVEL >= 4
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace packlight::linear {

// How many rows share one pass over the weights: as many as their sums fit into registers.
constexpr int kRowsAtOnce = PACKLIGHT_LEVEL >= 2 ? 8 : PACKLIGHT_LEVEL >= 1 ? 2 : 1;

// `rows[i]` are read in pairs; they may repeat.
template <int kRows>
PACKLIGHT_ONCE void dot_rows(const uint16_t* const* rows, const uint16_t* panels, int64_t depth, Ahead& ahead,
                             float (*out)[kBlock]) {
  Sums sums[kRows][2];
  for (int64_t k = 0; k < depth; k += kTileDepth, panels += 2 * kTileSize) {
    for (int line = 0; line < kLinesPerTile; ++line) {
      const uint16_t *first = panels + line * kLine, *second = first + kTileSize;
      ahead.fetch(4 * kLine);
      const Pairs left = Pairs::of_panel(first), right = Pairs::of_panel(second);
      for (int row = 0; row < kRows; ++row) {
        const PairOfRow x = pair_of_row(rows[row] + k + 2 * line);
        sums[row][0].add(left, x);
        sums[row][1].add(right, x);
      }
    }
  }
  for (int row = 0; row < kRows; ++row) {
    sums[row][0].store(out[row]);
    sums[row][1].store(out[row] + kPanel);
  }
}

inline void dot_block(const uint16_t* x, int64_t stride, int num_rows, const uint16_t* panels, int64_t depth,
                      Ahead& ahead, float (*out)[kBlock]) {
  const uint16_t* rows[kRowsAtOnce];
  for (int row = 0; row < num_rows; row += kRowsAtOnce) {
    const int here = std::min(kRowsAtOnce, num_rows - row);
    for (int i = 0; i < kRowsAtOnce; ++i) rows[i] = x + (row + std::min(i, here - 1)) * stride;
    if (here == 1) {
      dot_rows<1>(rows, panels, depth, ahead, out + row);
    } else {
      // A short group repeats its last row; `out` has room.
      dot_rows<kRowsAtOnce>(rows, panels, depth, ahead, out + row);
    }
  }
}

#if PACKLIGHT_LEVEL >= 4

// Linux hands out the tile registers on request only, to the whole process.
inline bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

// Tiles 0-3: sums, 4-5: rows of x, 6-7: panels.
class Tiles {
 public:
  ~Tiles() {
    if (rows_) _tile_release();
  }

  void block(const uint16_t* x, int64_t stride, int num_rows, const uint16_t* panels, int64_t depth, Ahead& ahead,
             float (*out)[kBlock]) {
    configure(num_rows);
    if (num_rows <= kPanel) {
      Bf16Tiles tiles{panels};
      short_block(x, stride, tiles, depth, ahead, out);
    } else {
      long_block(x, stride, panels, depth, ahead, out);
    }
  }

  // At most 16 rows with weights that are unpacked on the way.
  template <class Codes>
  void coded_block(const uint16_t* x, int64_t stride, int num_rows, Codes& codes, int64_t depth, Ahead& ahead,
                   float (*out)[kBlock]) {
    configure(num_rows);
    short_block(x, stride, codes, depth, ahead, out);
  }

 private:
  static constexpr int kLineBytes = 64;

  void configure(int num_rows) {
    if (rows_ == num_rows) return;
    rows_ = num_rows;
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t line_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    const int upper = std::min(num_rows, kPanel), lower = num_rows - upper;
    const int rows[8] = {upper, upper, lower, lower, upper, lower, kPanel, kPanel};
    for (int tile = 0; tile < 8; ++tile) {
      config.rows[tile] = static_cast<uint8_t>(rows[tile]);
      config.line_bytes[tile] = rows[tile] ? kLineBytes : 0;
    }
    _tile_loadconfig(&config);
  }

  template <class PanelTiles>
  PACKLIGHT_ONCE static void short_block(const uint16_t* x, int64_t stride, PanelTiles& tiles, int64_t depth,
                                         Ahead& ahead, float (*out)[kBlock]) {
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t k = 0; k < depth; k += kTileDepth) {
      const uint16_t *first = tiles(0, k), *second = tiles(1, k);
      ahead.fetch(PanelTiles::kStepBytes);
      asm volatile("" ::: "memory");  // the compiler does not see that a tile load reads what was just unpacked
      _tile_loadd(4, x + k, 2 * stride);
      _tile_loadd(6, first, kLineBytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, second, kLineBytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, out[0], sizeof out[0]);
    _tile_stored(1, out[0] + kPanel, sizeof out[0]);
  }

  PACKLIGHT_ONCE static void long_block(const uint16_t* x, int64_t stride, const uint16_t* panels, int64_t depth,
                         Ahead& ahead, float (*out)[kBlock]) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < depth; k += kTileDepth, panels += 2 * kTileSize) {
      ahead.fetch(Bf16Tiles::kStepBytes);
      _tile_loadd(4, x + k, 2 * stride);
      _tile_loadd(6, panels, kLineBytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, panels + kTileSize, kLineBytes);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, x + kPanel * stride + k, 2 * stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out[0], sizeof out[0]);
    _tile_stored(1, out[0] + kPanel, sizeof out[0]);
    _tile_stored(2, out[kPanel], sizeof out[0]);
    _tile_stored(3, out[kPanel] + kPanel, sizeof out[0]);
  }

  int rows_ = 0;
};

#endif

// What a thread keeps while it works through blocks.
class Blocks {
 public:
  // `out` has room for 32 rows; those past `num_rows` come out undefined.
  void multiply(const uint16_t* x, int64_t stride, int num_rows, const uint16_t* panels, int64_t depth,
                Ahead& ahead, float (*out)[kBlock]) {
#if PACKLIGHT_LEVEL >= 4
    if (may_use_tiles()) return tiles_.block(x, stride, num_rows, panels, depth, ahead, out);
#endif
    dot_block(x, stride, num_rows, panels, depth, ahead, out);
  }

#if PACKLIGHT_LEVEL >= 4
  Tiles& tiles() { return tiles_; }

 private:
  Tiles tiles_;
#endif
};

}  // namespace packlight::linear
