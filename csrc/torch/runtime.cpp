#include "torch/runtime.h"

#include <algorithm>
#include <atomic>

#include <ATen/Parallel.h>
#include <ATen/cpu/Utils.h>
#include <ATen/native/CPUBlas.h>

#include "gemm/gemm.h"
#include "simd/isa.h"

#if AT_PARALLEL_OPENMP && !defined(INTRA_OP_PARALLEL)
#error "at::parallel_for would be serial: compile with OpenMP, as torch was"
#endif

namespace synface {
namespace {

void brgemm(int64_t m, int64_t n, int64_t k, int64_t a_row, int64_t b_row, int64_t c_row,
            bool accumulate, const uint16_t* a, const uint16_t* b, float* c) {
  at::native::cpublas::brgemm(m, n, k, a_row, b_row, c_row, accumulate,
                              reinterpret_cast<const at::BFloat16*>(a),
                              reinterpret_cast<const at::BFloat16*>(b), c);
}

const bool offered = [] {
  set_brgemm(brgemm);
  offer_onednn(at::cpu::init_amx());
  return true;
}();

}  // namespace

Runtime torch_runtime() {
  return {at::get_num_threads(), [](int tasks, const std::function<void(int)>& run) {
            std::atomic<int> next{0};
            const int threads = std::min(tasks, at::get_num_threads());  // one: runs right here
            at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
              for (int task = next++; task < tasks; task = next++) run(task);
              // The next user of a thread's AMX tiles configures them again.
              if (isa() == Isa::onednn_bf16) at::native::cpublas::brgemm_release();
            });
          }};
}

}  // namespace synface
