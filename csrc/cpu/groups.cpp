#include "groups.h"

namespace pama {
namespace {

// Numbers ids in the order they first come. Open addressing: half empty, linear probing.
class Numbers {
 public:
  explicit Numbers(size_t most) {
    while ((size_t{1} << bits) < 2 * most) ++bits;
    slots.assign(size_t{1} << bits, {0, -1});
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

// The first row of each run of equal ids, and the number of rows.
template <class T>
std::vector<int64_t> runs_of(const CombineParams& p) {
  const T* ids = static_cast<const T*>(p.group_data);
  std::vector<int64_t> runs(static_cast<size_t>(p.batch + 1));
  size_t count = 0;
  T last{};
  for (int64_t row = 0; row < p.batch; ++row) {
    const T id = ids[row * p.group_stride];
    runs[count] = row;  // stays if a run starts here
    count += row == 0 || id != last;
    last = id;
  }
  runs[count] = p.batch;
  runs.resize(count + 1);
  return runs;
}

}  // namespace

Grouping::Grouping(CombineParams& p) {
  const NormalizeOptions& how = p.normalize;
  if (how.by != Pool::kGroup && how.combined != Pool::kGroup && p.level != Level::kGroup) return;
  if (how.groups == Groups::kIds) {
    by_ids(p);
  } else {
    starts.resize(static_cast<size_t>(p.groups + 1));
    for (int64_t g = 0; g <= p.groups; ++g)
      starts[g] = how.groups == Groups::kSize ? g * how.group_size : p.group_value(g);
  }
  const int64_t size = p.groups > 0 ? starts[1] : 0;
  p.equal_rows = size;
  for (int64_t g = 0; g < p.groups; ++g)
    if (starts[g + 1] - starts[g] != size) p.equal_rows = 0;
  p.starts = starts.data();
  p.order = order.empty() ? nullptr : order.data();
}

void Grouping::by_ids(CombineParams& p) {
  switch (size_of(p.group_dtype)) {
    case 1: starts = runs_of<int8_t>(p); break;
    case 2: starts = runs_of<int16_t>(p); break;
    case 4: starts = runs_of<int32_t>(p); break;
    default: starts = runs_of<int64_t>(p);
  }
  // Ids usually come in runs, one for each group: then the runs are the groups.
  const std::vector<int64_t>& runs = starts;
  const size_t count = runs.size() - 1;
  Numbers numbers(count);
  std::vector<int64_t> number(count);  // of the group each run belongs to
  int64_t groups = 0;
  for (size_t r = 0; r < count; ++r) {
    number[r] = numbers.of(p.group_value(runs[r]), groups);
    groups += number[r] == groups;
  }
  p.groups = groups;
  if (groups == static_cast<int64_t>(count)) return;

  // A counting sort of the runs: stable, so what a group's samples add up to is the same bits every time.
  std::vector<int64_t> at(static_cast<size_t>(groups + 1));
  for (size_t r = 0; r < count; ++r) at[number[r] + 1] += runs[r + 1] - runs[r];
  for (int64_t g = 0; g < groups; ++g) at[g + 1] += at[g];
  std::vector<int64_t> firsts = at;
  order.resize(static_cast<size_t>(p.batch));
  for (size_t r = 0; r < count; ++r)
    for (int64_t row = runs[r]; row < runs[r + 1]; ++row) order[at[number[r]]++] = row;
  starts = std::move(firsts);
}

}  // namespace pama
