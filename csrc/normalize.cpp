// Reads what pama_ext.Normalize spells out; it has been checked there.
#include "pama/normalize.h"

#include <sstream>
#include <stdexcept>

namespace pama {
namespace {

Pool pool_of(const std::string& name) {
  return name == "batch" ? Pool::kBatch : name == "group" ? Pool::kGroup : Pool::kNone;
}

Groups groups_of(const std::string& name) {
  return name == "size"      ? Groups::kSize
         : name == "ids"     ? Groups::kIds
         : name == "offsets" ? Groups::kOffsets
                             : Groups::kNone;
}

void read(std::istringstream& from, MomentRules& rules) {
  std::string eps, eps_in, singleton;
  from >> rules.center >> rules.scale >> rules.correction >> eps >> eps_in >> singleton;
  if (!from) return;
  rules.eps = std::stod(eps);
  rules.eps_in_variance = eps_in == "var";
  rules.raw_singleton = singleton == "raw";
}

}  // namespace

NormalizeOptions::NormalizeOptions(const std::string& spelled) {
  if (spelled.empty()) return;
  std::istringstream from(spelled);
  std::string by_, groups_, over, combined_;
  from >> by_ >> groups_ >> group_size >> over;
  read(from, each);
  from >> combined_;
  read(from, last);
  if (!from) throw std::invalid_argument("normalize: cannot read '" + spelled + "'");
  by = pool_of(by_);
  combined = pool_of(combined_);
  groups = groups_of(groups_);
  row_sums = over == "row_sums";
}

}  // namespace pama
