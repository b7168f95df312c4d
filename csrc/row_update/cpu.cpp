#include "row_update/cpu.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <vector>

#include "common/memory.h"
#include "common/splitmix.h"
#include "simd/scalar.h"

namespace synface::row_update {
namespace {

template <class T>
struct SgdStep {
  explicit SgdStep(const Sgd& o)
      : lr(T(o.lr)), momentum(T(o.momentum)), decay(T(o.weight_decay)), take(T(1 - o.dampening)) {}
  T lr, momentum, decay, take;
};

template <class T>
struct AdamWStep {
  AdamWStep(const AdamW& o, int64_t step)
      : beta1(T(o.beta1)),
        take1(T(1 - o.beta1)),
        beta2(T(o.beta2)),
        take2(T(1 - o.beta2)),
        keep(T(1 - o.lr * o.weight_decay)),
        size(T(o.lr / (1 - std::pow(o.beta1, double(step))))),
        root(T(1 / std::sqrt(1 - std::pow(o.beta2, double(step))))),
        eps(T(o.eps)) {}
  T beta1, take1, beta2, take2, keep, size, root, eps;
};

// Vectorized loops of cpu-inl.h, compiled for one instruction set.
template <class T>
struct SimdKernels {
  void (*sgd_plain)(T* w, const T* g, const SgdStep<T>& s, int64_t n);
  void (*sgd_momentum)(T* w, T* b, const T* g, const SgdStep<T>& s, int64_t n);
  void (*sgd_nesterov)(T* w, T* b, const T* g, const SgdStep<T>& s, int64_t n);
  void (*scale)(T* w, T factor, int64_t n);
  void (*linear)(T* w, T* b, const T* a, int64_t n);
  void (*adamw_step)(T* w, T* m, T* v, const T* g, const AdamWStep<T>& s, int64_t n);
  void (*roots)(const T* v, T* root, int64_t n);
  void (*add_quotients)(T* sum, const T* root, T size, T factor, T eps, int64_t n);
  void (*adamw_missed)(T* w, T* m, T* v, const T* sum, T keep, T beta1, T beta2, int64_t n);
  void (*load)(const void* from, Dtype dtype, T* to, int64_t n);
  void (*store)(const T* from, void* to, Dtype dtype, int64_t n);
  void (*store_stochastic)(const T* from, uint16_t* to, uint32_t low, uint32_t high, int64_t n);
};

}  // namespace
}  // namespace synface::row_update

#define SYNFACE_ISA_SOURCE "row_update/cpu-inl.h"
#include "simd/foreach_isa.h"

namespace synface::row_update {
namespace {

constexpr int64_t kTaskElements = 1 << 14;  // elements of the smallest task

uint64_t mix(uint64_t z) { return splitmix::mixed(z + splitmix::kGolden); }

// One row at a time of a state, opened as T and written back when it is closed.
template <class T>
class Row {
 public:
  // `stream` distinguishes the random streams of a problem's states.
  Row(const Problem& p, const State& state, int64_t stream, const SimdKernels<T>& simd)
      : state_(state),
        cols_(p.cols),
        stochastic_(p.stochastic && state.dtype == Dtype::bf16),
        key_(mix(mix(p.seed) ^ (4 * uint64_t(p.step) + uint64_t(stream)))),
        simd_(simd),
        converter_(state.dtype, cols_, simd.load) {}

  // Null if there is no such state.
  T* open(int64_t row) {
    row_ = row;
    opened_ = state_.data ? converter_.row(row_at(state_, row)) : nullptr;
    return opened_;
  }
  void close() const {
    if (!opened_ || !converter_.copies()) return;
    void* to = row_at(state_, row_);
    if (stochastic_) {
      const uint64_t key = mix(key_ ^ uint64_t(row_));
      simd_.store_stochastic(opened_, static_cast<uint16_t*>(to), uint32_t(key),
                             uint32_t(key >> 32), cols_);
    } else {
      simd_.store(opened_, to, state_.dtype, cols_);
    }
  }

 private:
  State state_;
  int64_t cols_, row_ = 0;
  bool stochastic_;
  uint64_t key_;
  const SimdKernels<T>& simd_;
  RowConverter<T> converter_;
  T* opened_ = nullptr;
};

// Steps up to which the rows are updated.
class LastStep {
 public:
  explicit LastStep(const Problem& p) : p_(p) {}
  int64_t of(int64_t row) const {
    return !p_.last_step   ? due()
           : p_.long_steps ? static_cast<const int64_t*>(p_.last_step)[row]
                           : static_cast<const int32_t*>(p_.last_step)[row];
  }
  int64_t missed(int64_t row) const { return due() - of(row); }
  void set(int64_t row) const {
    if (!p_.last_step) return;
    if (p_.long_steps) {
      static_cast<int64_t*>(p_.last_step)[row] = p_.step;
    } else {
      static_cast<int32_t*>(p_.last_step)[row] = int32_t(p_.step);
    }
  }

 private:
  // Step up to which rows must be updated before the gradient is applied.
  int64_t due() const { return p_.gradient.data ? p_.step - 1 : p_.step; }
  const Problem& p_;
};

// Calls run(range) on ranges of the rows, in parallel.
template <class F>
void over_rows(const Problem& p, const Runtime& runtime, F&& run) {
  const int64_t tasks =
      std::clamp<int64_t>(p.count * p.cols / kTaskElements, 1, kTasksPerThread * runtime.threads);
  runtime.parallel(int(tasks), [&](int task) { run(part_of(p.count, tasks, task)); });
}

using Matrix = std::array<double, 4>;  // row by row

Matrix product(const Matrix& a, const Matrix& b) {
  return {a[0] * b[0] + a[1] * b[2], a[0] * b[1] + a[1] * b[3], a[2] * b[0] + a[3] * b[2],
          a[2] * b[1] + a[3] * b[3]};
}

Matrix power(Matrix base, int64_t exponent) {
  Matrix result{1, 0, 0, 1};
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) result = product(result, base);
    base = product(base, base);
  }
  return result;
}

// Returns a step without a gradient as a linear map of (weight, momentum).
Matrix idle_step(const Sgd& o) {
  const double to_buffer = (1 - o.dampening) * o.weight_decay;
  if (o.nesterov) {
    return {1 - o.lr * (o.weight_decay + o.momentum * to_buffer), -o.lr * o.momentum * o.momentum,
            to_buffer, o.momentum};
  }
  return {1 - o.lr * to_buffer, -o.lr * o.momentum, to_buffer, o.momentum};
}

// Terms of `missed` steps without gradients: a weight loses m·Σ size/(√v·factor + eps), then
// decays.
template <class T>
struct AdamWMissed {
  struct Term {
    double size, factor;
  };
  AdamWMissed(const AdamW& o, int64_t last, int64_t missed)
      : keep(std::pow(1 - o.lr * o.weight_decay, double(missed))),
        beta1(std::pow(o.beta1, double(missed))),
        beta2(std::pow(o.beta2, double(missed))) {
    const double decay = 1 - o.lr * o.weight_decay;
    // Relative to the first term, term k is at most ratio^k, up to bias corrections.
    const double ratio = o.beta1 / (std::sqrt(o.beta2) * decay);
    const bool falls = decay > 0 && ratio < 1;
    const double negligible = std::is_same_v<T, float> ? 0x1p-26 : 0x1p-55;
    double moment = 1, square = 1, bound = 1, enough = 0;
    double power1 = std::pow(o.beta1, double(last)), power2 = std::pow(o.beta2, double(last));
    for (int64_t k = 1; k <= missed; ++k) {
      moment *= o.beta1, square *= o.beta2, power1 *= o.beta1, power2 *= o.beta2, bound *= ratio;
      terms.push_back({o.lr * moment / (1 - power1), std::sqrt(square / (1 - power2))});
      if (k == 1) enough = negligible * bound * std::sqrt(1 - power2) / (1 - power1);
      if (moment == 0) break;
      if (falls && bound * ratio / (1 - ratio) / (1 - power1) < enough) break;
    }
    double later = std::pow(decay, double(missed - int64_t(terms.size())));
    for (auto term = terms.rbegin(); term != terms.rend(); ++term, later *= decay) {
      term->size *= later;
    }
  }
  std::vector<Term> terms;
  double keep, beta1, beta2;
};

}  // namespace

template <class T>
void sgd(const Problem& p, const State& momentum, const Sgd& o, const Runtime& runtime) {
  const SimdKernels<T>& simd = SYNFACE_DISPATCH(simd_kernels<T>);
  const SgdStep<T> step(o);
  const Matrix idle = idle_step(o);
  over_rows(p, runtime, [&](Range range) {
    Row<T> weights(p, p.weight, 0, simd), buffers(p, momentum, 1, simd);
    const RowReader<T> gradient(p.gradient, simd.load);
    const LastStep last(p);
    for (int64_t i = range.begin; i < range.end; ++i) {
      const int64_t row = p.class_ids[i], missed = last.missed(row);
      T *w = weights.open(row), *b = buffers.open(row);
      const T* g = p.gradient.data ? gradient.row(i) : nullptr;
      if (missed > 0 && b) {
        const Matrix a = power(idle, missed);
        const T to[4] = {T(a[0]), T(a[1]), T(a[2]), T(a[3])};
        simd.linear(w, b, to, p.cols);
      } else if (missed > 0) {
        simd.scale(w, T(std::pow(1 - o.lr * o.weight_decay, double(missed))), p.cols);
      }
      if (g && b) {
        (o.nesterov ? simd.sgd_nesterov : simd.sgd_momentum)(w, b, g, step, p.cols);
      } else if (g) {
        simd.sgd_plain(w, g, step, p.cols);
      }
      weights.close();
      buffers.close();
      last.set(row);
    }
  });
}

template <class T>
void adamw(const Problem& p, const State& exp_avg, const State& exp_avg_sq, const AdamW& o,
           const Runtime& runtime) {
  const SimdKernels<T>& simd = SYNFACE_DISPATCH(simd_kernels<T>);
  const AdamWStep<T> step(o, p.step);
  over_rows(p, runtime, [&](Range range) {
    Row<T> weights(p, p.weight, 0, simd), means(p, exp_avg, 1, simd),
        squares(p, exp_avg_sq, 2, simd);
    const RowReader<T> gradient(p.gradient, simd.load);
    const LastStep last(p);
    Buffer<T> root(p.last_step ? p.cols : 0), sum(p.last_step ? p.cols : 0);
    for (int64_t i = range.begin; i < range.end; ++i) {
      const int64_t row = p.class_ids[i], missed = last.missed(row);
      T *w = weights.open(row), *m = means.open(row), *v = squares.open(row);
      const T* g = p.gradient.data ? gradient.row(i) : nullptr;
      if (missed > 0) {
        AdamWMissed<T> idle(o, last.of(row), missed);
        // A row without moments only decays.
        const bool moves = std::any_of(m, m + p.cols, [](T x) { return x != 0; });
        std::fill_n(sum.get(), p.cols, T(0));
        if (moves) {
          simd.roots(v, root.get(), p.cols);
          for (const auto& term : idle.terms) {
            simd.add_quotients(sum.get(), root.get(), T(term.size), T(term.factor), T(o.eps),
                               p.cols);
          }
        }
        simd.adamw_missed(w, m, v, sum.get(), T(idle.keep), T(idle.beta1), T(idle.beta2), p.cols);
      }
      if (g) simd.adamw_step(w, m, v, g, step, p.cols);
      weights.close();
      means.close();
      squares.close();
      last.set(row);
    }
  });
}

#define SYNFACE_INSTANTIATE(T)                                                    \
  template void sgd<T>(const Problem&, const State&, const Sgd&, const Runtime&); \
  template void adamw<T>(const Problem&, const State&, const State&, const AdamW&, const Runtime&);
SYNFACE_INSTANTIATE(float)
SYNFACE_INSTANTIATE(double)

}  // namespace synface::row_update
