// Some tokens of each KV head out of a pool's blocks into pages of their own. See packlight/native/pack.py.
//
// What is copied are rows of bytes, so every dtype is the same. Tokens that follow each other in a block lie in one run
// of memory, and are copied as one: a page of which everything is kept, at once.

#include <algorithm>
#include <cstring>

#include "packlight.h"

namespace {

constexpr int64_t kLine = 64;

struct Packing {
  const PacklightPack& args;

  int64_t page_bytes() const { return args.page_size * args.row_bytes; }
  int64_t num_pages(int64_t head) const { return (args.num_tokens[head] + args.page_size - 1) / args.page_size; }

  int64_t total_pages() const {
    int64_t total = 0;
    for (int64_t head = 0; head < args.num_kv_heads; ++head) total += num_pages(head);
    return total;
  }

  // Where token `index` of a head lies, in bytes from the start of the pool.
  int64_t place(int64_t head, int64_t index) const {
    const int64_t block = args.blocks[index / args.page_size];
    const int64_t head_page = (block * args.num_layers + args.layer) * args.num_kv_heads + head;
    return (head_page * args.page_size + index % args.page_size) * args.row_bytes;
  }

  // How many of the `most` tokens from `indices` on follow each other in one block.
  int64_t run_length(const int64_t* indices, int64_t most) const {
    most = std::min(most, args.page_size - indices[0] % args.page_size);
    if (indices[most - 1] - indices[0] == most - 1) return most;
    int64_t length = 1;
    while (length < most && indices[length] - indices[0] == length) ++length;
    return length;
  }

  // Tokens that were chosen one by one lie anywhere: asked for a page ahead, they come while the page before is copied.
  // Inlined by force: GCC takes a function that does nothing but prefetch for one that does nothing, and drops its calls.
  [[gnu::always_inline]] void expect(int64_t head, const int64_t* indices, int64_t count) const {
    for (int64_t token = 0; token < count; ++token) {
      const int64_t from = place(head, indices[token]);
      for (int64_t line = 0; line < args.row_bytes; line += kLine) {
        __builtin_prefetch(static_cast<const char*>(args.k_pool) + from + line);
        __builtin_prefetch(static_cast<const char*>(args.v_pool) + from + line);
      }
    }
  }

  // Page `page` of a head, K and V, to `to`.
  void write_page(int64_t head, int64_t page, char* to) const {
    const int64_t first = page * args.page_size, left = args.num_tokens[head] - first;
    const int64_t count = std::min(args.page_size, left);
    const int64_t* indices = args.indices[head] + first;
    expect(head, indices + count, std::min(args.page_size, left - count));
    const auto *k = static_cast<const char*>(args.k_pool), *v = static_cast<const char*>(args.v_pool);
    char *k_to = to, *v_to = to + page_bytes();
    for (int64_t token = 0, length; token < count; token += length) {
      length = run_length(indices + token, count - token);
      const int64_t from = place(head, indices[token]), at = token * args.row_bytes, size = length * args.row_bytes;
      std::memcpy(k_to + at, k + from, size);
      std::memcpy(v_to + at, v + from, size);
    }
    const int64_t used = count * args.row_bytes;
    std::memset(k_to + used, 0, page_bytes() - used);
    std::memset(v_to + used, 0, page_bytes() - used);
  }

  // Pages `first` to `last` of the layer.
  void write_pages(int64_t first, int64_t last) const {
    char* to = static_cast<char*>(args.pages) + 2 * page_bytes() * first;
    for (int64_t head = 0; head < args.num_kv_heads && last > 0; ++head) {
      const int64_t count = num_pages(head);
      for (int64_t page = std::max<int64_t>(first, 0); page < std::min(last, count); ++page) {
        write_page(head, page, to);
        to += 2 * page_bytes();
      }
      first -= count, last -= count;
    }
  }
};

}  // namespace

void packlight_pack(const PacklightPack* args) {
  const Packing packing{*args};
  const int64_t total = packing.total_pages();
  const auto num_threads = int32_t(std::min<int64_t>(args->num_threads, std::max<int64_t>(total, 1)));
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int32_t thread = 0; thread < num_threads; ++thread) {
    packing.write_pages(total * thread / num_threads, total * (thread + 1) / num_threads);
  }
}
