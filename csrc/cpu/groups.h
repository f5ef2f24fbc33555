// Groups of rows on the CPU, whichever way the caller described them.
#pragma once

#include <cstdint>
#include <vector>

#include "pama/combine.h"

namespace pama {

// Fills order and starts of `params`, and `groups` where ids are counted. Owns the memory.
class Grouping {
 public:
  explicit Grouping(CombineParams& params);

 private:
  void by_ids(CombineParams& params);

  std::vector<int64_t> starts, order;
};

}  // namespace pama
