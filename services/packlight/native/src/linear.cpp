// Single products and the embedding. See packlight/native/linear.py.

#include "linear.h"

#include "elementwise.h"

using namespace packlight::linear;

void packlight_linear(const PacklightLinear* linear, const uint16_t* x, int64_t num_rows, float* out, uint16_t* room,
                      int num_threads) {
  together(num_threads, [&](Worker& worker) {
    multiply(worker, *linear, x, num_rows, room, [&](int64_t row, int64_t column, int width, const float* values) {
      std::memcpy(out + row * linear->num_columns + column, values, width * sizeof *values);
    });
  });
}

void packlight_rows(const PacklightLinear* linear, const int64_t* rows, int64_t num_rows, uint16_t* out, uint16_t* room,
                    int num_threads) {
  const int64_t depth = linear->depth;
  together(num_threads, [&](Worker& worker) {
    uint16_t* own_room = room ? room + worker.thread() * kBlock * depth : nullptr;
    worker.each(num_rows, [&](int64_t i, int64_t) {
      const int64_t row = rows[i], column = row % kBlock;
      const uint16_t* weights = panels_of(*linear, row / kBlock, own_room);
      weights += column / kPanel * kTileSize + column % kPanel * 2;
      const float scale = linear->format == PACKLIGHT_INT8 ? static_cast<const float*>(linear->scales)[row] : 1.0f;
      for (int64_t k = 0; k < depth; ++k) {
        const int64_t line = k / kTileDepth * 2 * kLinesPerTile + k % kTileDepth / 2;
        const uint16_t weight = weights[line * kLine + k % 2];
        out[i * depth + k] = scale == 1.0f ? weight : to_bf16(to_float(weight) * scale);
      }
    });
  });
}
