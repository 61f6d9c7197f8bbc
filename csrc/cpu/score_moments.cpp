#include <vector>

#include "common/thread_pool.h"
#include "cpu/attention.h"
#include "cpu/kernels.h"

namespace ck {

Moments score_moments(const Tensor& query, const Tensor& key, int threads) {
  const Kernels& isa = kernels();
  const int64_t batch = query.size[0], heads = query.size[1];
  std::vector<MomentsTask> tasks(batch * heads);
  parallel_for(threads, batch * heads, [&](int64_t i) {
    tasks[i] = {query, key, i / heads, i % heads, 0, 0};
    isa.score_moments(tasks[i]);
  });
  Moments total{0, 0};
  for (const MomentsTask& task : tasks) {
    total.sum += task.sum;
    total.sum_of_squares += task.sum_of_squares;
  }
  return total;
}

}  // namespace ck
