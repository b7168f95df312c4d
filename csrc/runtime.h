// What a CPU kernel is given by the program around it: threads, and matrices of what it brings.
// The torch bindings and the NumPy bindings each bring their own threads, so kernels know neither.
#pragma once

#include <cstdint>
#include <functional>

namespace synface {

struct Runtime {
  int threads;  // how many tasks run at once; each takes the next one when it is done
  std::function<void(int tasks, const std::function<void(int task)>&)> parallel;
};

inline Runtime one_thread() {
  return {1, [](int tasks, const std::function<void(int)>& run) {
            for (int task = 0; task < tasks; ++task) run(task);
          }};
}

// Element types that arrive from outside.
enum class Dtype { f32, f64, bf16, f16, u8 };

// A matrix with contiguous rows, `stride` elements apart.
struct Rows {
  const void* data;
  Dtype dtype;
  int64_t rows, cols, stride;
};

}  // namespace synface
