// x W^T for weights in panels, bfloat16 or fewer bits: the one matrix product of prefill and decode.
//
// Quantised panels are written out in bfloat16, two at a time, and multiplied as if they had always been: what a step
// reads from memory shrinks, and a long prompt pays for the unpacking once per 256 rows.

#pragma once

#include "linear_block.h"
#include "linear_team.h"
#include "linear_unpack.h"
#include "packlight.h"

namespace packlight::linear {

constexpr int64_t kRowsPerPiece = 256;  // of activations: they stay in the second-level cache while panels pass

// Two panels in bfloat16: where they lie, or unpacked into `room` (32 * depth elements).
PACKLIGHT_ONCE inline const uint16_t* panels_of(const PacklightLinear& linear, int64_t block, uint16_t* room) {
  const int64_t count = kBlock * linear.depth, first = block * count;
  if (linear.format == PACKLIGHT_BF16) return static_cast<const uint16_t*>(linear.panels) + first;
  if (linear.format == PACKLIGHT_INT8) {
    unpack_int8(static_cast<const int8_t*>(linear.panels) + first, count / (2 * kPanel), room);
    return room;
  }
  const uint8_t* codes = static_cast<const uint8_t*>(linear.panels) + first / 2;
  const uint16_t* scales = static_cast<const uint16_t*>(linear.scales) + first / kTileDepth * 2;
  for (int64_t tile = 0; tile < count / kTileSize; ++tile) {
    unpack_int4(codes + tile * kTileSize / 2, scales + tile * 2 * kPanel, room + tile * kTileSize);
  }
  return room;
}

PACKLIGHT_ONCE inline void scale_and_shift(const PacklightLinear& linear, int64_t column, int width, float* values) {
  if (linear.format == PACKLIGHT_INT8) {
    const float* scales = static_cast<const float*>(linear.scales) + column;
    for (int i = 0; i < width; ++i) values[i] *= scales[i];
  }
  if (linear.bias) {
    for (int i = 0; i < width; ++i) values[i] += linear.bias[column + i];
  }
}

// To be fetched: the panels of a block, without their scales.
inline Ahead ahead_of(const PacklightLinear& linear, int64_t block) {
  const int64_t bits = linear.format == PACKLIGHT_BF16 ? 16 : linear.format == PACKLIGHT_INT8 ? 8 : 4;
  const int64_t num_bytes = kBlock * linear.depth * bits / 8;
  return Ahead(static_cast<const char*>(linear.panels) + block * num_bytes, num_bytes);
}

// A few rows times quantised weights, unpacked on the way. False where that is not to be had: unpack first.
inline bool multiply_codes([[maybe_unused]] Blocks& blocks, const PacklightLinear& linear,
                           [[maybe_unused]] int64_t block,
                           [[maybe_unused]] const uint16_t* x, int64_t num_rows, [[maybe_unused]] Ahead& ahead,
                           [[maybe_unused]] float (*out)[kBlock]) {
  if (linear.format == PACKLIGHT_BF16 || num_rows > kPanel) return false;
#if PACKLIGHT_LEVEL >= 4
  if (!may_use_tiles()) return false;
  const int64_t depth = linear.depth, first = block * kBlock * depth;
  const int rows = static_cast<int>(num_rows);
  if (linear.format == PACKLIGHT_INT8) {
    Int8Tiles codes(static_cast<const int8_t*>(linear.panels) + first);
    blocks.tiles().coded_block(x, depth, rows, codes, depth, ahead, out);
  } else {
    const uint16_t* scales = static_cast<const uint16_t*>(linear.scales) + first / kTileDepth * 2;
    Int4Tiles codes(static_cast<const uint8_t*>(linear.panels) + first / 2, scales);
    blocks.tiles().coded_block(x, depth, rows, codes, depth, ahead, out);
  }
  return true;
#else
  return false;
#endif
}

// One stage: `take(row, column, width, values)` gets every finished row of a block, float32.
template <class Take>
void multiply(Worker& worker, const PacklightLinear& linear, const uint16_t* x, int64_t num_rows, uint16_t* room,
              Take&& take) {
  const int64_t num_blocks = (linear.num_columns + kBlock - 1) / kBlock;
  const int64_t num_pieces = (num_rows + kRowsPerPiece - 1) / kRowsPerPiece;
  uint16_t* own_room = room ? room + worker.thread() * kBlock * linear.depth : nullptr;
  Blocks blocks;
  worker.each(num_pieces * num_blocks, [&](int64_t piece, int64_t next) {
    const int64_t block = piece % num_blocks, column = block * kBlock;
    const int64_t first = piece / num_blocks * kRowsPerPiece, last = std::min(first + kRowsPerPiece, num_rows);
    const int width = static_cast<int>(std::min<int64_t>(kBlock, linear.num_columns - column));
    alignas(64) float out[kBlock][kBlock];
    Ahead ahead = next < 0 ? Ahead() : ahead_of(linear, next % num_blocks);
    const bool done = multiply_codes(blocks, linear, block, x, num_rows, ahead, out);
    const uint16_t* panels = done ? nullptr : panels_of(linear, block, own_room);
    for (int64_t row = first; row < last; row += kBlock) {
      const int here = static_cast<int>(std::min<int64_t>(kBlock, last - row));
      if (!done) {
        blocks.multiply(x + row * linear.depth, linear.depth, here, panels, linear.depth, ahead, out);
      }
      for (int i = 0; i < here; ++i) {
        scale_and_shift(linear, column, width, out[i]);
        take(row + i, column, width, out[i]);
      }
    }
  });
}

}  // namespace packlight::linear
