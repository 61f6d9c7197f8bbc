#include "common/low_rank.h"

#include <algorithm>

#include "common/matrix.h"

namespace ck {

void check(const LowRankSum& sum) {
  require_matrix("base", sum.base, sum.rows(), sum.width());
  require_matrix("out", sum.out, sum.rows(), sum.width());
  require_dtype("out", sum.out, sum.base.dtype);
  for (const LowRankSum::Term& term : sum.terms) {
    const int64_t rows = term.u.size[2], rank = term.u.size[3];
    require_matrix("u", term.u, rows, rank);
    require_matrix("v", term.v, rank, sum.width());
    if (term.start < 0 || rows > sum.rows() - term.start)
      throw std::invalid_argument("start: rows " + std::to_string(term.start) + " to " +
                                  std::to_string(term.start + rows) + " are not within base");
  }
}

std::vector<Span> spans(const LowRankSum& sum) {
  const int count = static_cast<int>(sum.terms.size());
  std::vector<int64_t> cuts = {0, sum.rows()};
  std::vector<int> order;  // terms that change anything, by their first row
  for (int i = 0; i < count; ++i) {
    const LowRankSum::Term& term = sum.terms[i];
    if (term.u.size[2] == 0 || term.u.size[3] == 0) continue;
    cuts.push_back(term.start);
    cuts.push_back(term.start + term.u.size[2]);
    order.push_back(i);
  }
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return sum.terms[a].start < sum.terms[b].start; });

  std::vector<Span> found;
  std::vector<int> open;  // terms that have begun and not ended
  size_t next = 0;
  for (size_t i = 0; i + 1 < cuts.size(); ++i) {
    const int64_t begin = cuts[i];
    open.erase(std::remove_if(open.begin(), open.end(),
                              [&](int t) { return sum.terms[t].start + sum.terms[t].u.size[2] <= begin; }),
               open.end());
    for (; next < order.size() && sum.terms[order[next]].start == begin; ++next) open.push_back(order[next]);
    found.push_back({begin, cuts[i + 1], open});
    std::sort(found.back().terms.begin(), found.back().terms.end());
  }
  return found;
}

}  // namespace ck
