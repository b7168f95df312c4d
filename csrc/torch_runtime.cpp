#include "torch_runtime.h"

#include <algorithm>
#include <atomic>

#include <ATen/Parallel.h>

#if AT_PARALLEL_OPENMP && !defined(INTRA_OP_PARALLEL)
#error "at::parallel_for would be serial: compile with OpenMP, as torch was"
#endif

namespace synface {

Runtime torch_runtime() {
  return {at::get_num_threads(), [](int tasks, const std::function<void(int)>& run) {
            std::atomic<int> next{0};
            const int threads = std::min(tasks, at::get_num_threads());  // one: runs right here
            at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
              for (int task = next++; task < tasks; task = next++) run(task);
            });
          }};
}

}  // namespace synface
