// The same products on AMX tiles: 16 rows of 64 bytes each, 8 tiles, one instruction for 16 x 16 x 32 of them.
//
// Knows tiles, their configuration and the permission to use them. Does not know what is multiplied.

#pragma once

#include "prefill_attention_products.h"

#if PACKLIGHT_LEVEL >= 4

#include <sys/syscall.h>
#include <unistd.h>

namespace packlight::prefill {

// The system hands out tile registers to processes that ask; it refuses where signal stacks are too small for them.
inline bool tiles_are_allowed() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool allowed = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return allowed;
}

// GCC's tile intrinsics do not say which memory they read. Without this, stores before them may come too late.
inline void settle_memory() { __asm__ volatile("" ::: "memory"); }

// This thread's tiles, all of them 16 x 64 bytes, for as long as it lives. Without `wanted` it does nothing.
class Tiles {
 public:
  explicit Tiles(bool wanted) : wanted_(wanted) {
    if (!wanted_) return;
    alignas(64) volatile unsigned char config[64] = {};
    config[0] = 1;  // the palette
    for (int tile = 0; tile < 8; ++tile) {
      config[16 + 2 * tile] = 64;  // bytes of a row, 16 bits each
      config[48 + tile] = 16;      // rows
    }
    settle_memory();
    _tile_loadconfig(const_cast<unsigned char*>(config));
  }
  ~Tiles() {
    if (wanted_) _tile_release();
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  bool wanted_;
};

constexpr int kTileRows = 16, kTileBytes = 64, kTile = kTileRows * kStripRows;  // the last: fp32 of C, pairs of B

// C = A B for a k of 64: all of B stays in four tiles, and each of A is loaded once.
inline void multiply_by_held_tiles(Left<Bf16> a, int num_rows, const Bf16* b, ptrdiff_t b_strip_size, float* c,
                                   ptrdiff_t c_strip_size) {
  const ptrdiff_t row_bytes = a.row_stride * sizeof(Bf16);
  _tile_loadd(4, b, kTileBytes);
  _tile_loadd(5, b + 2 * kTile, kTileBytes);
  _tile_loadd(6, b + b_strip_size, kTileBytes);
  _tile_loadd(7, b + b_strip_size + 2 * kTile, kTileBytes);
  for (int row = 0; row < num_rows; row += kTileRows) {
    const Bf16* left = a.at + row * a.row_stride;
    float* to = c + row * kStripRows;
    _tile_loadd(2, left, row_bytes);
    _tile_zero(0);
    _tile_dpbf16ps(0, 2, 4);
    _tile_zero(1);
    _tile_dpbf16ps(1, 2, 6);
    _tile_loadd(3, left + a.step_stride, row_bytes);
    _tile_dpbf16ps(0, 3, 5);
    _tile_dpbf16ps(1, 3, 7);
    _tile_stored(0, to, kTileBytes);
    _tile_stored(1, to + c_strip_size, kTileBytes);
  }
}

// C = A B or C += A B: 32 rows by two strips at a time, so that each tile that is loaded serves two products.
inline void multiply_by_tiles(Left<Bf16> a, int num_rows, int num_k, const Bf16* b, ptrdiff_t b_strip_size, bool add,
                              float* c, ptrdiff_t c_strip_size) {
  const ptrdiff_t row_bytes = a.row_stride * sizeof(Bf16);
  for (int row = 0; row < num_rows; row += 2 * kTileRows) {
    const Bf16* upper = a.at + row * a.row_stride;
    const Bf16* lower = upper + kTileRows * a.row_stride;
    const Bf16* right = b;
    float* to = c + row * kStripRows;
    if (add) {
      _tile_loadd(0, to, kTileBytes);
      _tile_loadd(1, to + c_strip_size, kTileBytes);
      _tile_loadd(2, to + kTile, kTileBytes);
      _tile_loadd(3, to + kTile + c_strip_size, kTileBytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int k = 0; k < num_k; k += Bf16Pairs::kStep) {
      _tile_loadd(4, upper, row_bytes);
      _tile_loadd(6, right, kTileBytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, right + b_strip_size, kTileBytes);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, lower, row_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      upper += a.step_stride, lower += a.step_stride, right += 2 * kTile;
    }
    _tile_stored(0, to, kTileBytes);
    _tile_stored(1, to + c_strip_size, kTileBytes);
    _tile_stored(2, to + kTile, kTileBytes);
    _tile_stored(3, to + kTile + c_strip_size, kTileBytes);
  }
}

// As multiply_lanes.
inline void multiply_tiles(Left<Bf16> a, int num_rows, int num_k, const Bf16* b, ptrdiff_t b_strip_size, bool add,
                           float* c, ptrdiff_t c_strip_size) {
  settle_memory();
  if (num_k == 2 * Bf16Pairs::kStep && !add) {
    multiply_by_held_tiles(a, num_rows, b, b_strip_size, c, c_strip_size);
  } else {
    multiply_by_tiles(a, num_rows, num_k, b, b_strip_size, add, c, c_strip_size);
  }
  settle_memory();
}

}  // namespace packlight::prefill

#else

namespace packlight::prefill {

inline bool tiles_are_allowed() { return false; }

class Tiles {
 public:
  explicit Tiles(bool) {}
};

}  // namespace packlight::prefill

#endif
