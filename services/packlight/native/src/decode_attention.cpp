// Decode attention over head pages. See packlight/native/decode.py.
//
// Legend: B rows, K KV heads, G query heads per KV head, D head dim, P page size. A *site* is one (row, KV head).
//
// Threads share splits: a site's tokens, cut at each multiple of kSplitTokens. Where the cuts lie depends on the site
// alone, and the parts of a site are added up in their order by the thread that finishes the last of them. So what a row
// gets depends neither on the rows beside it nor on the number of threads, to the last bit.

#include "decode_coded.h"
#include "decode_pages.h"
#include "decode_sites.h"

namespace packlight::decode {
namespace {

template <class T>
class Decode {
 public:
  Decode(const PacklightDecode& arguments, Workspace& workspace)
      : a_(arguments), workspace_(workspace), dim_(round_up(a_.head_dim, kStep)) {}

  void run() {
    const int num_sites = int(workspace_.sites.size()), num_parts = workspace_.num_parts();
#pragma omp parallel num_threads(a_.num_threads)
    {
      if (workspace_.has_sparse) {
#pragma omp for schedule(dynamic, 1)
        for (int site = 0; site < num_sites; ++site) choose_pages(site);
      }
#pragma omp for schedule(dynamic, 1) nowait
      for (int part = 0; part < num_parts; ++part) run_part(part);
    }
  }

 private:
  // The new token counts in what pages are rated by, so it is stored here. From then on the site has the chosen pages.
  void choose_pages(int index) {
    Site& site = workspace_.sites[index];
    if (!site.is_sparse(a_.page_size)) return;
    store_token(site);
    thread_local PageChooser<T> chooser;
    int32_t* chosen = workspace_.chosen(index);
    chooser.choose(query(site), a_.q_head_stride, a_.group, a_.head_dim, a_.scale, site.rule,
                   static_cast<const T*>(a_.bounds), site.pages, site.num_tokens, a_.page_size, chosen);
    site.pages = chosen;
  }

  void run_part(int part) {
    const int index = workspace_.site_of(part);
    const Site& site = workspace_.sites[index];
    const int split = part - site.first_part + site.first_split();
    if (part == site.first_part + storing_part(site) && !site.is_sparse(a_.page_size)) store_token(site);
    const int start = std::max(site.start, split * kSplitTokens), end = std::min(site.end, (split + 1) * kSplitTokens);
    attend(site, part, start, end);
    if (workspace_.finish(index)) write_out(site);
  }

  // The part that reads the new token also stores it; with a sliding window that does not reach it, any part may.
  static int storing_part(const Site& site) {
    return std::max(0, site.new_index / kSplitTokens - site.first_split());
  }

  void store_token(const Site& site) const {
    if (a_.k == nullptr) return;
    const T* k = static_cast<const T*>(a_.k) + site.place * a_.k_row_stride + site.head * a_.k_head_stride;
    const T* v = static_cast<const T*>(a_.v) + site.place * a_.v_row_stride + site.head * a_.v_head_stride;
    const int64_t row = pages_of(site).row(site.new_index);
    std::copy_n(k, a_.head_dim, static_cast<T*>(a_.k_pages) + row);
    std::copy_n(v, a_.head_dim, static_cast<T*>(a_.v_pages) + row);
    if (site.is_summarised) summarise(site, k);
  }

  // The smallest and largest key elements of the new token's page, which begins with it or had some before.
  void summarise(const Site& site, const T* k) const {
    const int64_t page = site.pages[site.new_index / a_.page_size];
    T* low = static_cast<T*>(a_.bounds) + page * 2 * a_.head_dim;
    T* high = low + a_.head_dim;
    if (site.new_index % a_.page_size == 0) {
      std::copy_n(k, a_.head_dim, low);
      std::copy_n(k, a_.head_dim, high);
    }
    for (int d = 0; d < a_.head_dim; ++d) {
      if (to_float(k[d]) < to_float(low[d])) low[d] = k[d];
      if (to_float(k[d]) > to_float(high[d])) high[d] = k[d];
    }
  }

  const T* query(const Site& site) const {
    return static_cast<const T*>(a_.q) + site.place * a_.q_row_stride + site.head * a_.group * a_.q_head_stride;
  }

  PagesOf<T> pages_of(const Site& site) const {
    const auto *k = static_cast<const T*>(a_.k_pages), *v = static_cast<const T*>(a_.v_pages);
    return {k, v, site.pages, a_.page_size, a_.head_dim};
  }

  CodedPagesOf<T> coded_pages_of(const Site& site) const {
    const auto *k = static_cast<const T*>(a_.k_pages), *v = static_cast<const T*>(a_.v_pages);
    return {static_cast<const uint8_t*>(a_.records), a_.record_bytes, a_.states, k, v, a_.bits, a_.value_group,
            site.pages, a_.page_size, a_.head_dim};
  }

  void attend(const Site& site, int part, int start, int end) {
    if (a_.records != nullptr) {
      attend_by<CodedPages<T>, float>(coded_pages_of(site), site, part, start, end);
    } else if (PagesInPlace<T>::can_read(a_.page_size, a_.head_dim)) {
      attend_by<PagesInPlace<T>, T>(pages_of(site), site, part, start, end);
    } else {
      attend_by<PagesCopied<T>, T>(pages_of(site), site, part, start, end);
    }
  }

  // `Row` is what rows are made of when they leave the source.
  template <class Source, class Row, class Pages>
  void attend_by(const Pages& pages, const Site& site, int part, int start, int end) {
    for (int g = 0; g < a_.group; g += kMaxGroup) {
      const int64_t first = int64_t{part} * a_.group + g;
      SplitAttention<Row> attention(query(site) + g * a_.q_head_stride, a_.q_head_stride,
                                    std::min(kMaxGroup, a_.group - g), a_.head_dim, a_.scale,
                                    workspace_.states() + first, workspace_.outs() + first * dim_);
      Source source(pages);
      attention.run(source, start, end);
    }
  }

  void write_out(const Site& site) const {
    T* out = static_cast<T*>(a_.out) + int64_t{site.place} * a_.num_kv_heads * a_.group * a_.head_dim;
    for (int g = 0; g < a_.group; ++g) write_head(site, g, out + (site.head * a_.group + g) * a_.head_dim);
  }

  // The parts of head g, each weighted by how its maximum compares with the largest, divided by the sum of all weights.
  void write_head(const Site& site, int g, T* out) const {
    const Softmax* states = workspace_.states() + int64_t{site.first_part} * a_.group + g;
    const float* outs = workspace_.outs() + (int64_t{site.first_part} * a_.group + g) * dim_;
    float maximum = -INFINITY, total = 0.0f;
    for (int i = 0; i < site.num_parts; ++i) maximum = std::max(maximum, states[i * a_.group].maximum);
    float sums[kMaxDim] = {};
    for (int i = 0; i < site.num_parts; ++i) {
      const Softmax& state = states[i * a_.group];
      const float weight = std::exp2(state.maximum - maximum);
      total += weight * state.total;
      for (int d = 0; d < dim_; ++d) sums[d] += weight * outs[int64_t{i} * a_.group * dim_ + d];
    }
    for (int i = 0; i < dim_; ++i) {
      const int place = i % kStep, d = i - place + (a_.records == nullptr ? dim_at<T>(place) : dim_at<float>(place));
      if (d < a_.head_dim) out[d] = from_float<T>(sums[i] / total);
    }
  }

  const PacklightDecode& a_;
  Workspace& workspace_;
  const int dim_;
};

}  // namespace
}  // namespace packlight::decode

void packlight_decode_attention(const PacklightDecode* arguments) {
  thread_local packlight::decode::Workspace workspace;
  workspace.plan(*arguments);
  if (arguments->is_bf16) {
    packlight::decode::Decode<packlight::Bf16>(*arguments, workspace).run();
  } else {
    packlight::decode::Decode<float>(*arguments, workspace).run();
  }
}
