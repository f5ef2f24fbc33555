#include "groups.h"

namespace pama {
namespace {

// Numbers ids in the order they first come. Open addressing: half empty, linear probing.
class Numbers {
 public:
  explicit Numbers(int64_t rows) {
    while ((int64_t{1} << bits) < 2 * rows) ++bits;
    slots.assign(int64_t{1} << bits, {0, -1});
  }

  // The number of `id`; `next` if it is new.
  int64_t of(int64_t id, int64_t next) {
    const uint64_t mask = (uint64_t{1} << bits) - 1;
    for (uint64_t k = static_cast<uint64_t>(id) * 0x9e3779b97f4a7c15u >> (64 - bits);; k = (k + 1) & mask) {
      Slot& slot = slots[k];
      if (slot.number < 0) return slot = {id, next}, next;
      if (slot.id == id) return slot.number;
    }
  }

 private:
  struct Slot {
    int64_t id, number;
  };
  int bits = 1;
  std::vector<Slot> slots;
};

}  // namespace

Grouping::Grouping(CombineParams& p) {
  const NormalizeOptions& how = p.normalize;
  if (how.by != Pool::kGroup && how.combined != Pool::kGroup && p.level != Level::kGroup) return;
  if (how.groups == Groups::kIds) {
    by_ids(p);
  } else {
    starts.resize(p.groups + 1);
    for (int64_t g = 0; g <= p.groups; ++g)
      starts[g] = how.groups == Groups::kSize ? g * how.group_size : p.group_value(g);
  }
  p.starts = starts.data();
  p.order = order.empty() ? nullptr : order.data();
}

void Grouping::by_ids(CombineParams& p) {
  Numbers numbers(p.batch);
  std::vector<int64_t> group(p.batch);
  std::vector<int64_t> size;
  bool runs = true;  // rows of a group follow each other
  for (int64_t row = 0; row < p.batch; ++row) {
    const int64_t id = p.group_value(row), next = static_cast<int64_t>(size.size());
    const bool same = row > 0 && id == p.group_value(row - 1);
    group[row] = same ? group[row - 1] : numbers.of(id, next);
    if (group[row] == next) size.push_back(0);
    runs &= group[row] == static_cast<int64_t>(size.size()) - 1;
    ++size[group[row]];
  }
  p.groups = static_cast<int64_t>(size.size());
  starts.assign(1, 0);
  for (const int64_t n : size) starts.push_back(starts.back() + n);
  if (runs) return;
  order.resize(p.batch);  // a counting sort: stable, so what a group's samples add up to is the same bits every time
  std::vector<int64_t> at(starts.begin(), starts.end() - 1);
  for (int64_t row = 0; row < p.batch; ++row) order[at[group[row]]++] = row;
}

}  // namespace pama
