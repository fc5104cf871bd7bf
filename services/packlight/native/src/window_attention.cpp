// Attention that the last rows of a prompt pay to every key, summed by key. See packlight/native/window.py.
//
// One KV head after another, a stretch of keys at a time and in parallel: scores as a product summed in fp32, weighed
// against the stretch's own maximum (the online softmax, arXiv 1805.02867) and kept. When all are there each row's
// log-sum-exp is known, and a second look corrects the weights and adds them up. Where the log-sum-exp is known from the
// start, weights are what they should be at once: they are added up as they are made, and not kept.

#include <algorithm>
#include <cmath>

#include <omp.h>

#include "lanes.h"
#include "packlight.h"
#include "prefill_attention_tiles.h"

namespace packlight {
namespace {

using prefill::Tiles;
#if PACKLIGHT_LEVEL >= 4
using prefill::kTileBytes, prefill::kTileRows, prefill::settle_memory, prefill::tiles_are_allowed;
#endif

constexpr int kStretch = 256;  // keys whose weights stay in the L2 cache
constexpr int kKeys = 4;        // keys and vectors of rows of a product: as many sums as there are registers for
constexpr int kVectors = PACKLIGHT_LEVEL >= 2 ? 6 : 3;
constexpr float kLeast = -1e30f;  // below any score, and finite: weights of a stretch that a row does not see are 0
constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.693147180559945309417f;

// What one KV head is computed from and into. Rows are the window's, of all query heads of the group, head by head;
// `num_vectors` vectors of them, the last one filled up with rows of zeros.
struct Head {
  const PacklightWindow& args;
  int64_t head = 0, num_rows = 0, num_vectors = 0, num_stretches = 0;
  bool by_tiles = false;     // of AMX, where queries and keys are multiplied as they are
  float* queries = nullptr;  // [num_vectors][head_dim][kLanes]; by tiles [num_vectors][head_dim / 2][kLanes][2] of bf16
  float* seen = nullptr;     // [num_vectors][kLanes]: the last key that a row sees
  float* peaks = nullptr;    // [num_stretches][num_vectors][kLanes]; in the end the factors that correct its weights
  float* sums = nullptr;     // likewise
  float* known = nullptr;    // instead of both, [num_vectors][kLanes]: log-sum-exp in base 2, infinite without a row
  float* weights = nullptr;  // [num_keys][num_vectors][kLanes]; by thread [kStretch] of them if the log-sum-exp is known
  float* keys = nullptr;     // by thread [kStretch][head_dim]

  int64_t row_floats() const { return num_vectors * kLanes; }
  float* keys_of_thread() const { return keys + omp_get_thread_num() * kStretch * args.head_dim; }
};

// Keys `first` to `end`, and where their products become weights.
struct Stretch {
  int64_t first, end;
  float* weights;  // [end - first][num_vectors][kLanes], and room for whole tiles
};

Stretch stretch_at(const Head& at, int64_t index) {
  const int64_t first = index * kStretch, place = at.args.lse_is_known ? omp_get_thread_num() * kStretch : first;
  return {first, std::min(first + kStretch, at.args.num_keys), at.weights + place * at.row_floats()};
}

int64_t count_vectors(int64_t num_rows) { return (num_rows + kLanes - 1) / kLanes; }
int64_t count_stretches(int64_t num_keys) { return (num_keys + kStretch - 1) / kStretch; }

// Tiles are written whole.
int64_t whole_tiles(int64_t num_keys) { return (num_keys + 15) / 16 * 16; }

int64_t count_floats(int64_t num_rows, int64_t num_keys, int64_t head_dim, bool lse_is_known, int num_threads) {
  const int64_t row_floats = count_vectors(num_rows) * kLanes;
  const int64_t kept = lse_is_known ? 1 + num_threads * kStretch : 2 * count_stretches(num_keys) + whole_tiles(num_keys);
  return row_floats * (head_dim + 1 + kept) + num_threads * kStretch * head_dim;
}

// Where element `d` of a row's query is kept.
template <class Kept>
Kept& query_at(const Head& at, int64_t row, int64_t d) {
  constexpr int64_t kPack = sizeof(float) / sizeof(Kept);
  const int64_t vector = row / kLanes, lane = row % kLanes;
  const int64_t line = (vector * at.args.head_dim + d) / kPack;
  return reinterpret_cast<Kept*>(at.queries)[(line * kLanes + lane) * kPack + d % kPack];
}

template <class Kept, class T>
void take_queries(const Head& at) {
  const PacklightWindow& args = at.args;
  const auto* q = static_cast<const T*>(args.q);
  const int64_t group = args.num_heads / args.num_kv_heads;
  for (int64_t row = 0; row < at.row_floats(); ++row) {
    const bool is_row = row < at.num_rows;
    const int64_t token = row % args.num_rows, head = at.head * group + (is_row ? row / args.num_rows : 0);
    const T* from = q + token * args.q_token_stride + head * args.q_head_stride;
    for (int64_t d = 0; d < args.head_dim; ++d) {
      query_at<Kept>(at, row, d) = from_float<Kept>(is_row ? to_float(from[d]) : 0.0f);
    }
    at.seen[row] = float(args.num_keys - args.num_rows + token);
  }
}

template <class T>
const T* key_at(const Head& at, int64_t key) {
  const PacklightWindow& args = at.args;
  const int64_t page = (args.blocks[key / args.page_size] * args.num_layers + args.layer) * args.num_kv_heads + at.head;
  return static_cast<const T*>(args.k_pool) + (page * args.page_size + key % args.page_size) * args.head_dim;
}

// ── products: q.k of the keys of a stretch ──────────────────────────────────────────────────────────────────────────

// Of `num_keys` keys and `vectors` vectors of rows, to the key's `weights`.
template <int num_keys, int vectors>
void multiply(const Head& at, const float* keys, float* weights, int64_t vector) {
  const int64_t head_dim = at.args.head_dim;
  const float* queries = at.queries + vector * head_dim * kLanes;
  Lanes sums[num_keys][vectors] = {};
  for (int64_t d = 0; d < head_dim; ++d) {
    Lanes q[vectors];
    for (int j = 0; j < vectors; ++j) q[j] = load(queries + (j * head_dim + d) * kLanes);
    for (int i = 0; i < num_keys; ++i) {
      for (int j = 0; j < vectors; ++j) sums[i][j] += q[j] * keys[i * head_dim + d];
    }
  }
  for (int i = 0; i < num_keys; ++i) {
    float* to = weights + i * at.row_floats() + vector * kLanes;
    for (int j = 0; j < vectors; ++j) store(to + j * kLanes, sums[i][j]);
  }
}

// The next `vectors` vectors of rows, or as many as are left.
template <int vectors>
void multiply_keys(const Head& at, const Stretch& stretch, int64_t vector) {
  if constexpr (vectors > 0) {
    if (at.num_vectors - vector < vectors) return multiply_keys<vectors - 1>(at, stretch, vector);
    const int64_t head_dim = at.args.head_dim, size = at.row_floats(), num_keys = stretch.end - stretch.first;
    const float* keys = at.keys_of_thread();
    int64_t i = 0;
    for (; i + kKeys <= num_keys; i += kKeys) {
      multiply<kKeys, vectors>(at, keys + i * head_dim, stretch.weights + i * size, vector);
    }
    for (; i < num_keys; ++i) multiply<1, vectors>(at, keys + i * head_dim, stretch.weights + i * size, vector);
  }
}

template <class T>
void multiply_lanes(const Head& at, const Stretch& stretch) {
  float* keys = at.keys_of_thread();
  for (int64_t key = stretch.first; key < stretch.end; ++key) {
    const T* from = key_at<T>(at, key);
    for (int64_t d = 0; d < at.args.head_dim; ++d) *keys++ = to_float(from[d]);
  }
  for (int64_t vector = 0; vector < at.num_vectors; vector += kVectors) multiply_keys<kVectors>(at, stretch, vector);
}

#if PACKLIGHT_LEVEL >= 4

// A tile of keys as they lie, against all rows. What a page holds behind the last key is multiplied, and not looked at.
void multiply_tiles(const Head& at, const Stretch& stretch) {
  const int64_t head_dim = at.args.head_dim, line_bytes = head_dim * int64_t{sizeof(Bf16)};
  const auto* queries = reinterpret_cast<const Bf16*>(at.queries);
  for (int64_t key = stretch.first; key < stretch.end; key += kTileRows) {
    const Bf16* keys = key_at<Bf16>(at, key);
    float* weights = stretch.weights + (key - stretch.first) * at.row_floats();
    settle_memory();
    for (int64_t vector = 0; vector < at.num_vectors; ++vector) {
      _tile_zero(0);
      for (int64_t d = 0; d < head_dim; d += kTileBytes / int64_t{sizeof(Bf16)}) {
        _tile_loadd(1, keys + d, line_bytes);
        _tile_loadd(2, queries + (vector * head_dim + d) * kLanes, kTileBytes);
        _tile_dpbf16ps(0, 1, 2);
      }
      _tile_stored(0, weights + vector * kLanes, at.row_floats() * int64_t{sizeof(float)});
    }
    settle_memory();
  }
}

bool can_tile(const PacklightWindow& args) {
  return args.is_bf16 && args.head_dim % 32 == 0 && args.page_size % kTileRows == 0 && tiles_are_allowed();
}

#else

void multiply_tiles(const Head&, const Stretch&) {}
bool can_tile(const PacklightWindow&) { return false; }

#endif

template <class T>
void multiply_stretch(const Head& at, const Stretch& stretch) {
  at.by_tiles ? multiply_tiles(at, stretch) : multiply_lanes<T>(at, stretch);
}

// ── weights ─────────────────────────────────────────────────────────────────────────────────────────────────────────

// Scores in base 2 of one vector of rows, out of its products; -inf where a row may not look.
struct Scores {
  const float* products;  // of the first key
  int64_t first, row_floats, all_seen;  // every row sees the keys up to `all_seen`
  Lanes seen;
  float scale;

  Lanes operator()(int64_t key) const {
    const Lanes score = load(products + (key - first) * row_floats) * scale;
    if (key <= all_seen) return score;
    return seen < all_lanes(float(key)) ? all_lanes(-INFINITY) : score;
  }
};

Scores scores_of(const Head& at, const Stretch& stretch, int64_t vector) {
  return {stretch.weights + vector * kLanes,       stretch.first,
          at.row_floats(),                         at.args.num_keys - at.args.num_rows,
          load(at.seen + vector * kLanes),         at.args.scale * kLog2E};
}

// Products of a stretch and one vector of rows to weights; their maxima and sums.
void weigh(const Head& at, int64_t index, const Stretch& stretch, int64_t vector) {
  const Scores scores = scores_of(at, stretch, vector);
  float* column = stretch.weights + vector * kLanes;
  Lanes peak = all_lanes(kLeast), total = {};
  for (int64_t key = stretch.first; key < stretch.end; ++key) peak = larger(scores(key), peak);
  for (int64_t key = stretch.first; key < stretch.end; ++key, column += at.row_floats()) {
    const Lanes weight = exp2(scores(key) - peak);
    store(column, weight);
    total += weight;
  }
  const int64_t place = index * at.row_floats() + vector * kLanes;
  store(at.peaks + place, peak);
  store(at.sums + place, total);
}

template <class T>
void weigh_stretch(const Head& at, int64_t index) {
  const Stretch stretch = stretch_at(at, index);
  multiply_stretch<T>(at, stretch);
  for (int64_t vector = 0; vector < at.num_vectors; ++vector) weigh(at, index, stretch, vector);
}

// Each row's log-sum-exp. Its maxima in `peaks` become the factors its weights are off by, 0 where there is no row.
void correct_vector(const Head& at, int64_t vector, float* lse) {
  const int64_t size = at.row_floats(), num_stretches = at.num_stretches;
  float *peaks = at.peaks + vector * kLanes, *sums = at.sums + vector * kLanes;
  Lanes highest = all_lanes(kLeast), total = {}, is_row = {};
  for (int64_t i = 0; i < num_stretches; ++i) highest = larger(load(peaks + i * size), highest);
  for (int64_t i = 0; i < num_stretches; ++i) total += exp2(load(peaks + i * size) - highest) * load(sums + i * size);
  const int64_t rows = std::min<int64_t>(kLanes, at.num_rows - vector * kLanes);
  for (int64_t row = 0; row < rows; ++row) {
    lse[vector * kLanes + row] = (highest[row] + std::log2(total[row])) * kLn2;
    is_row[row] = 1.0f;
  }
  for (int64_t i = 0; i < num_stretches; ++i) {
    store(peaks + i * size, exp2(load(peaks + i * size) - highest) * is_row / total);
  }
}

void correct(const Head& at) {
  float* lse = at.args.lse + at.head * at.num_rows;
  for (int64_t vector = 0; vector < at.num_vectors; ++vector) correct_vector(at, vector, lse);
}

void add_up(const Head& at, int64_t stretch) {
  const float* factors = at.peaks + stretch * at.row_floats();
  float* mass = at.args.mass + at.head * at.args.num_keys;
  const int64_t first = stretch * kStretch, end = std::min(first + kStretch, at.args.num_keys);
  for (int64_t key = first; key < end; ++key) {
    const float* row = at.weights + key * at.row_floats();
    Lanes total = {};
    for (int64_t i = 0; i < at.row_floats(); i += kLanes) total += load(row + i) * load(factors + i);
    mass[key] = sum(total);
  }
}

// ── the same, where the log-sum-exp is known ────────────────────────────────────────────────────────────────────────

void take_lse(const Head& at) {
  const float* lse = at.args.lse + at.head * at.num_rows;
  for (int64_t row = 0; row < at.row_floats(); ++row) at.known[row] = row < at.num_rows ? lse[row] * kLog2E : INFINITY;
}

// Products to final weights, a vector of rows at a time, and their sums by key.
template <class T>
void sum_stretch(const Head& at, int64_t index) {
  const Stretch stretch = stretch_at(at, index);
  multiply_stretch<T>(at, stretch);
  Lanes totals[kStretch] = {};
  for (int64_t vector = 0; vector < at.num_vectors; ++vector) {
    const Scores scores = scores_of(at, stretch, vector);
    const Lanes known = load(at.known + vector * kLanes);
    for (int64_t key = stretch.first; key < stretch.end; ++key) totals[key - stretch.first] += exp2(scores(key) - known);
  }
  float* mass = at.args.mass + at.head * at.args.num_keys;
  for (int64_t key = stretch.first; key < stretch.end; ++key) mass[key] = sum(totals[key - stretch.first]);
}

// ── heads ───────────────────────────────────────────────────────────────────────────────────────────────────────────

Head head_of(const PacklightWindow& args) {
  Head at{args};
  at.num_rows = args.num_heads / args.num_kv_heads * args.num_rows;
  at.num_vectors = count_vectors(at.num_rows);
  at.num_stretches = count_stretches(args.num_keys);
  at.by_tiles = can_tile(args);
  at.queries = args.scratch;
  at.seen = at.queries + at.row_floats() * args.head_dim;
  at.peaks = at.seen + at.row_floats();
  at.sums = at.peaks + at.row_floats() * at.num_stretches;
  at.known = at.peaks;
  at.weights = args.lse_is_known ? at.known + at.row_floats() : at.sums + at.row_floats() * at.num_stretches;
  const int64_t num_kept = args.lse_is_known ? args.num_threads * int64_t{kStretch} : whole_tiles(args.num_keys);
  at.keys = at.weights + at.row_floats() * num_kept;
  return at;
}

// To be called by all threads of a team.
template <class T>
void attend_head(const Head& at) {
#pragma omp for schedule(dynamic)
  for (int64_t index = 0; index < at.num_stretches; ++index) weigh_stretch<T>(at, index);
#pragma omp single
  correct(at);
#pragma omp for schedule(static)
  for (int64_t index = 0; index < at.num_stretches; ++index) add_up(at, index);
}

template <class T>
void attend_known_head(const Head& at) {
#pragma omp for schedule(dynamic)
  for (int64_t index = 0; index < at.num_stretches; ++index) sum_stretch<T>(at, index);
}

template <class T>
void attend(const PacklightWindow& args) {
  Head at = head_of(args);
  for (at.head = 0; at.head < args.num_kv_heads; ++at.head) {
    at.by_tiles ? take_queries<Bf16, T>(at) : take_queries<float, T>(at);
    if (args.lse_is_known) take_lse(at);
#pragma omp parallel num_threads(args.num_threads)
    {
      const Tiles tiles(at.by_tiles);
      args.lse_is_known ? attend_known_head<T>(at) : attend_head<T>(at);
    }
  }
}

}  // namespace
}  // namespace packlight

size_t packlight_window_scratch_bytes(int64_t num_rows, int64_t num_keys, int64_t head_dim, int32_t lse_is_known,
                                      int32_t num_threads) {
  return sizeof(float) * size_t(packlight::count_floats(num_rows, num_keys, head_dim, lse_is_known, num_threads));
}

void packlight_window_attention(const PacklightWindow* args) {
  args->is_bf16 ? packlight::attend<packlight::Bf16>(*args) : packlight::attend<float>(*args);
}
