#include "common/merge.h"

#include "common/matrix.h"

namespace ck {
namespace {

void check(const Merge& merge) {
  require_matrix("base", merge.base, merge.rows(), merge.width());
  if (merge.weights.size() != merge.targets.size())
    throw std::invalid_argument("weights and targets: must be equally many");
  for (size_t n = 0; n < merge.weights.size(); ++n) {
    require_matrix("weights", merge.weights[n], merge.rows(), merge.width());
    require_matrix("targets", merge.targets[n], merge.targets[n].size[2], merge.width());
  }
}

}  // namespace

void check_residual(const Merge& merge) {
  check(merge);
  require_matrix("out", merge.out, merge.rows(), merge.constraints());
}

void check_apply(const Merge& merge) {
  check(merge);
  require_matrix("basis", merge.basis, merge.constraints(), merge.width());
  require_matrix("out", merge.out, merge.rows(), merge.width());
  require_dtype("out", merge.out, merge.base.dtype);
}

}  // namespace ck
