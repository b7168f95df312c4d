// Threads and work ranges. The torch bindings and the NumPy bindings each bring their own threads,
// so kernels know neither.
#pragma once

#include <cstdint>
#include <functional>

namespace synface {

struct Runtime {
  int threads;  // how many tasks run at once; each thread takes the next task when it is done
  std::function<void(int tasks, const std::function<void(int task)>&)> parallel;
};

inline Runtime one_thread() {
  return {1, [](int tasks, const std::function<void(int)>& run) {
            for (int task = 0; task < tasks; ++task) run(task);
          }};
}

// Several tasks a thread, so that a core shared with other programs (data-loader workers) delays
// nobody.
constexpr int64_t kTasksPerThread = 4;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// One of `parts` nearly equal ranges of [0, n).
inline Range part_of(int64_t n, int64_t parts, int64_t part) {
  return {n * part / parts, n * (part + 1) / parts};
}

}  // namespace synface
