// The sites of a decode step, one per (row, KV head), and how the work on them is cut.
//
// Legend as in decode_attention.cpp.

#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "decode_choice.h"
#include "packlight.h"

namespace packlight::decode {

constexpr int kSplitTokens = 1024;

struct Site {
  int place, head;
  const int32_t* pages;
  int new_index, num_tokens;
  bool is_summarised;  // its page summaries are kept up to date
  PageRule rule;
  int start, end;  // the tokens it reads, of all or of those on its chosen pages
  int first_part, num_parts;

  int num_pages(int page_size) const { return (num_tokens + page_size - 1) / page_size; }
  bool is_sparse(int page_size) const { return is_summarised && num_pages(page_size) > rule.max_pages; }
  int first_split() const { return start / kSplitTokens; }
};

// What the sites of one call leave behind for each other. Its memory is kept for the next call of the same thread.
class Workspace {
 public:
  std::vector<Site> sites;
  bool has_sparse = false;

  void plan(const PacklightDecode& a) {
    sites.clear();
    part_sites_.clear();
    has_sparse = false;
    max_chosen_ = 0;
    for (int row = 0; row < a.num_rows; ++row) {
      for (int head = 0; head < a.num_kv_heads; ++head) add_site(a, row, head);
    }
    if (num_counters_ < sites.size()) {
      unfinished_ = std::make_unique<std::atomic<int>[]>(sites.size());
      num_counters_ = sites.size();
    }
    for (size_t i = 0; i < sites.size(); ++i) unfinished_[i] = sites[i].num_parts;
    states_.resize(part_sites_.size() * a.group);
    outs_.resize(part_sites_.size() * a.group * round_up(a.head_dim, kStep));
    chosen_.resize(has_sparse ? sites.size() * max_chosen_ : 0);
  }

  int num_parts() const { return int(part_sites_.size()); }
  int site_of(int part) const { return part_sites_[part]; }
  Softmax* states() { return states_.data(); }
  float* outs() { return outs_.data(); }
  int32_t* chosen(int site) { return chosen_.data() + int64_t{site} * max_chosen_; }

  // Whether the caller has just finished the last part of a site; it then sees what the others wrote.
  bool finish(int site) { return unfinished_[site].fetch_sub(1, std::memory_order_acq_rel) == 1; }

 private:
  void add_site(const PacklightDecode& a, int row, int head) {
    const int64_t index = (int64_t{row} * a.num_layers + a.layer) * a.num_kv_heads + head;
    const int64_t in_table = (int64_t{a.table_rows[row]} * a.num_layers + a.layer) * a.num_kv_heads + head;
    Site site{};
    site.place = a.places[row];
    site.head = head;
    site.pages = a.pages + in_table * a.pages_per_head;
    site.new_index = a.new_index[index];
    site.end = site.num_tokens = a.lengths[index];
    if (a.window > 0) site.start = std::max(0, site.end - a.window);
    if (a.ratings != nullptr) set_rule(a, row, site);
    site.first_part = num_parts();
    site.num_parts = (site.end + kSplitTokens - 1) / kSplitTokens - site.first_split();
    part_sites_.insert(part_sites_.end(), site.num_parts, int(sites.size()));
    sites.push_back(site);
  }

  void set_rule(const PacklightDecode& a, int row, Site& site) {
    site.rule = {a.ratings[row], a.num_dims[row], a.max_pages[row]};
    site.is_summarised = site.rule.rating != 0 && a.layer >= a.num_dense_layers[row] && a.window == 0;
    if (!site.is_sparse(a.page_size)) return;
    has_sparse = true;
    max_chosen_ = std::max(max_chosen_, site.rule.max_pages);
    site.end -= (site.num_pages(a.page_size) - site.rule.max_pages) * a.page_size;
  }

  std::vector<int> part_sites_;
  std::unique_ptr<std::atomic<int>[]> unfinished_;
  size_t num_counters_ = 0;
  std::vector<Softmax> states_;
  std::vector<float> outs_;
  std::vector<int32_t> chosen_;
  int max_chosen_ = 0;
};

}  // namespace packlight::decode
