// Backward pass: the gradients of embeddings and centers. A part of cpu.cpp.
#pragma once

#include "margin_cross_entropy/cpu_targets.h"

namespace synface::margin_cross_entropy {
namespace {

template <class T>
double cosine_sum_gradient(const Upstream<T>& from, int64_t row) {
  return from.grad_cosine_sum ? from.grad_cosine_sum[row] : 0;
}

// Computes the gradients of embeddings, one row at a time.
template <class T>
class InputGradient {
 public:
  InputGradient(const Context<T>& context, const Upstream<T>& from, void* grad_input)
      : p_(context.p),
        simd_(context.simd),
        x_(context.x),
        from_(from),
        grad_input_(static_cast<char*>(grad_input)),
        gradient_(x_.dim),
        targets_(p_, simd_) {}

  // Writes the gradient of the i-th valid row.
  void operator()(int64_t i) {
    const int64_t dim = x_.dim, row = x_.source[i], k = p_.labels_per_row;
    const T spread = T(p_.scale * from_.grad_negative_lse[row]),
            all = T(cosine_sum_gradient(from_, row));
    const double* grad_cosine = from_.grad_target_cosine + row * k;
    if (spread == 0 && all == 0 &&
        std::all_of(grad_cosine, grad_cosine + k, [](double g) { return g == 0; })) {
      return;  // without upstream gradients, and the row may hold NaN
    }
    T* gradient = gradient_.get();
    for (int64_t d = 0; d < dim; ++d) gradient[d] = spread * from_.mean_center[row * dim + d];
    for (int64_t d = 0; from_.grad_cosine_sum && d < dim; ++d) {
      gradient[d] += all * T(from_.center_sum[d]);
    }
    simd_.axpy_scale(gradient, -simd_.dot(gradient, x_.row(i), dim), x_.row(i), x_.inverse[i], dim);
    targets_.visit(row, {0, p_.classes}, [&](const Target& t) {
      const double g = grad_cosine[t.label] / (t.x * t.w) * targets_.embedding_shrink();
      simd_.add_tangent(gradient, g, targets_.center(), t.xw / (t.x * t.x), targets_.embedding(),
                        dim);
    });
    simd_.store(gradient, grad_input_ + size_t(row * dim) * bytes(p_.input.dtype), p_.input.dtype,
                dim);
  }

 private:
  const Problem& p_;
  const SimdKernels<T>& simd_;
  const Embeddings<T>& x_;
  const Upstream<T>& from_;
  char* grad_input_;
  Buffer<T> gradient_;
  Targets<T> targets_;
};

// Per-row softmax terms shared by all weight-gradient tiles, an element for each valid row; and
// `common`, the term of the sum of cosines, which is the same for all centers (or empty).
template <class T>
struct SoftmaxTerms {
  SoftmaxTerms(const Problem& p, const Embeddings<T>& x, const Upstream<T>& from)
      : lse(x.count()), spread(x.count()), common(from.grad_cosine_sum ? x.dim : 0, T(0)) {
    for (int64_t i = 0; i < x.count(); ++i) {
      const double exact = from.negative_lse[x.source[i]];
      const double grad = from.grad_negative_lse[x.source[i]];
      // Without negatives, where the log-sum-exp is −∞, all probabilities are 0; without an
      // upstream gradient it may be NaN.
      const bool used = grad != 0 && exact != -std::numeric_limits<double>::infinity();
      lse[i] = used ? T(exact) : T(0);
      // The rounding error of the log-sum-exp goes into the factor.
      spread[i] = used ? T(p.scale * grad * std::exp(double(lse[i]) - exact)) : T(0);
    }
    std::vector<double> sum(common.size(), 0.0);
    for (int64_t i = 0; i < x.count(); ++i) {
      const double grad = cosine_sum_gradient(from, x.source[i]);
      for (int64_t d = 0; grad != 0 && d < x.dim; ++d) sum[d] += grad * double(x.row(i)[d]);
    }
    std::copy(sum.begin(), sum.end(), common.begin());
  }
  Buffer<T> lse, spread;
  std::vector<T> common;
};

// Inputs of the weight gradient, shared by its tasks.
template <class T, class Operand>
struct WeightGradient {
  const Context<T>& context;
  const std::vector<Packed<Operand>>& blocks;      // embeddings as operands of the gradient GEMM
  const std::vector<Packed<Operand>>& transposed;  // and of the logits GEMM, without the saved ones
  const SoftmaxTerms<T>& softmax;
  const Upstream<T>& from;
  const Gradients& to;
};

// Computes the gradients of the centers of some classes, a tile at a time.
template <class T, class Operand>
void weight_gradient(const WeightGradient<T, Operand>& task, Range classes) {
  const Problem& p = task.context.p;
  const SimdKernels<T>& simd = task.context.simd;
  const Embeddings<T>& x = task.context.x;
  const auto& softmax = task.softmax;
  const Upstream<T>& from = task.from;
  const int64_t dim = x.dim, k = p.labels_per_row, m = p.sub_centers;
  const int64_t width = tile_classes(p, classes);
  const bool direct = p.weight.dtype == dtype_of<T>;
  const int64_t height = std::min(kBlock, x.count());
  const TileGemms<T, Operand> gemms(x, simd, width * m, height);
  Negatives<T, Operand> tile(task.context, gemms, width * m, height);
  const int64_t row_bytes = dim * int64_t(bytes(p.weight.dtype));
  Buffer<T> scratch(direct ? 0 : width * m * dim);
  Buffer<char> delivered(task.to.on_tile ? width * m * row_bytes : 0);
  Centers<T, Operand> centers(p, simd, width * m);
  Targets<T> targets(p, simd);
  for (int64_t c0 = classes.begin; c0 < classes.end; c0 += width) {
    const Range own{c0, std::min(c0 + width, classes.end)};
    char* out =
        task.to.on_tile ? delivered.get() : static_cast<char*>(task.to.rows) + c0 * m * row_bytes;
    T* gradient = direct ? reinterpret_cast<T*>(out) : scratch.get();
    centers.read({own.begin * m, own.end * m});
    const int64_t n = centers.size();
    const int64_t columns = own.end <= from.saved.classes ? from.saved.embeddings : 0;
    for (int64_t r0 = 0, block = 0; r0 < x.count(); r0 += kBlock, ++block) {
      const int64_t count = std::min(kBlock, x.count() - r0),
                    saved = std::clamp<int64_t>(columns - r0, 0, count);
      if (saved < count) {
        tile.fill(centers, own, task.transposed[block], {r0 + saved, r0 + count}, saved);
      }
      const T *lse = softmax.lse.get() + r0, *spread = softmax.spread.get() + r0;
      for (int64_t j = 0; j < n; ++j) {
        T* row = tile.row(j);
        if (saved > 0) {
          const T* cosines = from.saved.cosines + (c0 * m + j) * from.saved.stride + r0;
          if (j + kRowsAhead < n) prefetch(cosines + kRowsAhead * from.saved.stride, saved);
          simd.probabilities(cosines, T(p.scale), lse, spread, row, saved);
        }
        simd.probabilities(row + saved, T(p.scale), lse + saved, spread + saved, row + saved,
                           count - saved);
      }
      gemms.add(tile.row(0), tile.stride(), n, task.blocks[block], gradient, r0 > 0);
    }
    for (int64_t j = 0; j < n; ++j) {
      T* g = gradient + j * dim;
      const T inverse = T(centers.inverse(j));
      for (size_t d = 0; d < softmax.common.size(); ++d) g[d] += softmax.common[d];
      const T along = simd.dot(g, centers.row(j), dim) * inverse * inverse;
      simd.axpy_scale(g, -along, centers.row(j), T(centers.inverse(j) * centers.shrink(j)), dim);
    }
    for (const int64_t row : x.source) {
      targets.visit(row, own, [&](const Target& t) {
        const double upstream = from.grad_target_cosine[row * k + t.label];
        if (upstream == 0) return;
        const double g = upstream / (t.x * t.w) * targets.center_shrink();
        simd.add_tangent(gradient + t.center * dim, g, targets.embedding(), t.xw / (t.w * t.w),
                         targets.center(), dim);
      });
    }
    if (!direct) simd.store(gradient, out, p.weight.dtype, n * dim);
    if (task.to.on_tile) task.to.on_tile(own, out);
  }
}

// Writes the weight gradient where there are no valid rows.
void zero_weight_gradient(const Problem& p, const Gradients& to) {
  const int64_t row_bytes = p.sub_centers * p.input.cols * int64_t(bytes(p.weight.dtype));
  if (!to.on_tile) {
    std::fill_n(static_cast<char*>(to.rows), p.classes * row_bytes, char(0));
    return;
  }
  const int64_t width = tile_classes(p, {0, p.classes});
  const std::vector<char> zeros(width * row_bytes);
  for (int64_t c0 = 0; c0 < p.classes; c0 += width) {
    to.on_tile({c0, std::min(c0 + width, p.classes)}, zeros.data());
  }
}

template <class Operand, class T>
void backward_by(const Problem& p, const Runtime& runtime, const Upstream<T>& from,
                 const Gradients& to) {
  check(p);
  const SimdKernels<T>& simd = SYNFACE_DISPATCH(simd_kernels<T>);
  const int64_t dim = p.input.cols, centers = p.classes * p.sub_centers;
  const Embeddings<T> x(p, simd, std::type_identity<Operand>());
  const Context<T> context{.p = p, .simd = simd, .x = x};
  if (to.input) {
    std::fill_n(static_cast<char*>(to.input), size_t(p.input.rows * dim) * bytes(p.input.dtype),
                char(0));
    const int64_t tasks =
        std::min(task_count(runtime, x.count() * (p.labels_per_row + 1) * dim * 16), x.count());
    runtime.parallel(int(tasks), [&](int task) {
      InputGradient<T> gradient(context, from, to.input);
      const Range rows = part_of(x.count(), tasks, task);
      for (int64_t i = rows.begin; i < rows.end; ++i) gradient(i);
    });
  }
  if (to.rows || to.on_tile) {
    if (x.count() == 0) return zero_weight_gradient(p, to);
    const int64_t tasks = std::min(
        {task_count(runtime, x.count() * centers * dim), p.classes, ceil_div(centers, kTile / 8)});
    const SoftmaxTerms<T> softmax(p, x, from);
    for (int64_t i = 0; i < x.count(); ++i) {  // a row without a gradient may hold NaN
      if (softmax.spread[i] == 0) x.clear(i);
      // The operands of a GEMM of bfloat16 embeddings are not unit vectors.
      if (x.high.get()) softmax.spread[i] *= x.high[i];
    }
    const Range rows{0, x.count()};
    const int64_t saved = from.saved.classes == p.classes ? from.saved.embeddings : 0;
    const std::vector<Packed<Operand>> blocks = pack_blocks<Operand>(x, rows, false),
                                       transposed = pack_blocks<Operand>(x, rows, true, saved);
    const WeightGradient<T, Operand> shared{.context = context,
                                            .blocks = blocks,
                                            .transposed = transposed,
                                            .softmax = softmax,
                                            .from = from,
                                            .to = to};
    runtime.parallel(int(tasks),
                     [&](int task) { weight_gradient(shared, part_of(p.classes, tasks, task)); });
  }
}

}  // namespace
}  // namespace synface::margin_cross_entropy
