// Forward pass: the softmax statistics of each row. A part of cpu.cpp.
#pragma once

#include "margin_cross_entropy/cpu_targets.h"

namespace synface::margin_cross_entropy {
namespace {

// One thread's partial softmax reduction over its classes: each row's greatest cosine,
// Σ e^{s·(cos − max)}, Σ e^{…}·ŵ and number of filtered classes; and Σ ŵ.
template <class T>
struct Partial {
  struct Wanted {
    bool mean, filtered, center_sum;
  };
  Partial(int64_t rows, int64_t dim, Wanted wanted)
      : most(rows, -std::numeric_limits<T>::infinity()),
        sum(rows, 0.0),
        mean(0),
        filtered(wanted.filtered ? rows : 0, 0.0),
        center_sum(wanted.center_sum ? dim : 0, 0.0) {
    if (wanted.mean) {
      mean = Buffer<T>(rows * dim);
      std::fill_n(mean.get(), rows * dim, T(0));
    }
  }
  std::vector<T> most;
  std::vector<double> sum;
  Buffer<T> mean;
  std::vector<double> filtered, center_sum;
};

// Some of the valid rows, packed in blocks.
template <class Operand>
struct RowGroup {
  Range rows;
  std::vector<Packed<Operand>> blocks;
};

// Reduces a range of classes into `partial`, for the rows of a group.
template <class T, class Operand>
void scan_classes(const Context<T>& context, const RowGroup<Operand>& group, Range classes,
                  const SavedCosines<T>& saved, Partial<T>& partial) {
  const Problem& p = context.p;
  const SimdKernels<T>& simd = context.simd;
  const Embeddings<T>& x = context.x;
  const Range rows = group.rows;
  const int64_t dim = x.dim, m = p.sub_centers;
  const T scale = T(p.scale), infinity = std::numeric_limits<T>::infinity();
  const int64_t width = tile_classes(p, classes);
  const int64_t height = std::min(kBlock, rows.size());
  const TileGemms<T, Operand> gemms(x, simd, width * m, height);
  Negatives<T, Operand> tile(context, gemms, width * m, height);
  const int64_t stride = tile.stride();
  Buffer<T> most(stride), shift(stride), sum(stride);
  Centers<T, Operand> centers(p, simd, width * m);
  Packed<Operand> packed(partial.mean.get() ? width * m : 0, dim);
  for (int64_t c0 = classes.begin; c0 < classes.end; c0 += width) {
    const Range own{c0, std::min(c0 + width, classes.end)};
    centers.read({own.begin * m, own.end * m});
    const int64_t n = centers.size();
    if (partial.mean.get()) gemms.pack(centers, packed);
    for (int64_t j = 0; !partial.center_sum.empty() && j < n; ++j) {
      simd.add_scaled(partial.center_sum.data(), centers.inverse(j), centers.row(j), dim);
    }
    for (int64_t r0 = rows.begin, block = 0; r0 < rows.end; r0 += kBlock, ++block) {
      const int64_t count = std::min(kBlock, rows.end - r0), at = r0 - rows.begin;
      tile.fill(centers, own, group.blocks[block], {r0, r0 + count});
      const int64_t columns = std::clamp<int64_t>(saved.embeddings - r0, 0, count),
                    saved_rows = columns > 0 ? std::min(n, (saved.classes - c0) * m) : 0;
      for (int64_t j = 0; j < saved_rows; ++j) {
        T* to = saved.cosines + (c0 * m + j) * saved.stride + r0;
        if (j + kRowsAhead < saved_rows) prefetch(to + kRowsAhead * saved.stride, columns);
        std::copy_n(tile.row(j), columns, to);
      }
      std::fill_n(most.get(), count, -infinity);
      for (int64_t j = 0; j < n; ++j) simd.greatest(tile.row(j), most.get(), count);
      for (int64_t i = 0; i < count; ++i) {
        if (!partial.filtered.empty()) partial.filtered[at + i] += tile.filtered()[i];
        T& greatest = partial.most[at + i];
        if (most[i] > greatest) {
          const T shrink = std::exp(scale * (greatest - most[i]));
          partial.sum[at + i] *= shrink;
          T* mean = partial.mean.get() + (at + i) * dim;
          for (int64_t d = 0; partial.mean.get() && d < dim; ++d) mean[d] *= shrink;
          greatest = most[i];
        }
        // −∞ where there are no negatives so far, or only NaN, which stays.
        shift[i] = greatest == -infinity ? T(0) : greatest;
      }
      for (int64_t j0 = 0; j0 < n; j0 += kSummands) {
        std::fill_n(sum.get(), count, T(0));
        for (int64_t j = j0; j < std::min(j0 + kSummands, n); ++j) {
          simd.exponentials(tile.row(j), T(centers.factor(j)), scale, shift.get(), sum.get(),
                            count);
        }
        for (int64_t i = 0; i < count; ++i) partial.sum[at + i] += sum[i];
      }
      if (partial.mean.get()) {
        gemms.add_transposed(tile.row(0), stride, count, packed, partial.mean.get() + at * dim);
      }
    }
  }
}

// Merges the partial reductions of one row, one per class group, in the order of the classes.
template <class T>
class RowMerge {
 public:
  RowMerge(const Context<T>& context, const Statistics<T>& out, int64_t class_groups)
      : x_(context.x),
        out_(out),
        p_(context.p),
        class_groups_(class_groups),
        factor_(class_groups),
        targets_(context.p, context.simd) {}

  // Merges the i-th valid row, which is row `at` of the partials.
  void operator()(const std::unique_ptr<Partial<T>>* parts, int64_t at, int64_t i) {
    const int64_t to = x_.source[i], dim = x_.dim, k = p_.labels_per_row;
    T most = -std::numeric_limits<T>::infinity();
    double sum = 0;
    for (int64_t g = 0; g < class_groups_; ++g) most = std::max(most, parts[g]->most[at]);
    for (int64_t g = 0; g < class_groups_; ++g) {
      factor_[g] = 1;
      if (parts[g]->most[at] < most) {
        factor_[g] = std::exp(p_.scale * (double(parts[g]->most[at]) - most));
      }
      sum += factor_[g] * parts[g]->sum[at];
      if (out_.filtered) out_.filtered[to] += parts[g]->filtered[at];
    }
    out_.negative_max[to] = most;
    out_.negative_lse[to] = sum == 0 ? double(most) : p_.scale * most + std::log(sum);
    targets_.visit(to, {0, p_.classes}, [&](const Target& t) {
      out_.target_cosine[to * k + t.label] = t.xw / (t.x * t.w);  // ±1 for parallels where D = 1
    });
    for (int64_t d = 0; out_.center_sum && d < dim; ++d) {
      out_.cosine_sum[to] += x_.row(i)[d] * out_.center_sum[d];
    }
    if (!out_.mean_center || sum == 0) return;
    T* mean = out_.mean_center + to * dim;
    for (int64_t g = 0; g < class_groups_; ++g) {
      const T* from = parts[g]->mean.get() + at * dim;
      const T share = T(factor_[g] / sum);
      for (int64_t d = 0; d < dim; ++d) mean[d] += share * from[d];
    }
  }

 private:
  const Embeddings<T>& x_;
  const Statistics<T>& out_;
  const Problem& p_;
  int64_t class_groups_;
  std::vector<double> factor_;
  Targets<T> targets_;
};

// Sets all outputs but the saved cosines to zero.
template <class T>
void clear(const Problem& p, const Statistics<T>& out) {
  const int64_t n = p.input.rows, dim = p.input.cols;
  std::fill_n(out.negative_lse, n, 0.0);
  std::fill_n(out.negative_max, n, T(0));
  std::fill_n(out.target_cosine, n * p.labels_per_row, 0.0);
  if (out.filtered) std::fill_n(out.filtered, n, 0.0);
  if (out.mean_center) std::fill_n(out.mean_center, n * dim, T(0));
  if (out.center_sum) {
    std::fill_n(out.cosine_sum, n, 0.0);
    std::fill_n(out.center_sum, dim, 0.0);
  }
}

template <class Operand, class T>
void forward_by(const Problem& p, const Runtime& runtime, const Statistics<T>& out) {
  check(p);
  const SimdKernels<T>& simd = SYNFACE_DISPATCH(simd_kernels<T>);
  const int64_t n = p.input.rows, dim = p.input.cols;
  const int64_t centers = p.classes * p.sub_centers;
  clear(p, out);
  const Embeddings<T> x(p, simd, std::type_identity<Operand>());
  const Context<T> context{.p = p, .simd = simd, .x = x};
  const int64_t unused = out.saved.in_gradient ? 0 : out.saved.embeddings - x.count();
  for (int64_t c = 0; unused > 0 && c < out.saved.classes * p.sub_centers; ++c) {
    std::fill_n(out.saved.cosines + c * out.saved.stride + x.count(), unused, T(0));
  }
  if (x.count() == 0) return;

  // A grid of row groups × class groups. Each class group needs partial results for its rows; each
  // row group reads all centers: so there are as many class groups as memory allows.
  const int64_t partial_bytes = x.count() * dim * int64_t(sizeof(T));
  const int64_t most_groups =
      out.mean_center ? std::max<int64_t>(1, kPartialBytes / partial_bytes) : p.classes;
  const int64_t class_groups = std::min({task_count(runtime, x.count() * centers * dim),
                                         most_groups, p.classes, ceil_div(centers, kTile / 8)});
  const int64_t row_groups =
      std::clamp<int64_t>(runtime.threads / class_groups, 1, ceil_div(x.count(), kBlock / 8));
  std::vector<RowGroup<Operand>> groups(static_cast<size_t>(row_groups));
  runtime.parallel(int(row_groups), [&](int group) {
    const Range rows = part_of(x.count(), row_groups, group);
    groups[group] = {.rows = rows, .blocks = pack_blocks<Operand>(x, rows, true)};
  });
  std::vector<std::unique_ptr<Partial<T>>> partials(size_t(class_groups * row_groups));
  runtime.parallel(int(partials.size()), [&](int task) {
    const int64_t group = task / class_groups;
    partials[task] = std::make_unique<Partial<T>>(
        groups[group].rows.size(), dim,
        typename Partial<T>::Wanted{.mean = out.mean_center != nullptr,
                                    .filtered = out.filtered != nullptr,
                                    .center_sum = out.center_sum && group == 0});
    scan_classes(context, groups[group], part_of(p.classes, class_groups, task % class_groups),
                 out.saved, *partials[task]);
  });

  // Merged in the order of the classes, so that results depend on the number of threads alone.
  for (int64_t g = 0; out.center_sum && g < class_groups; ++g) {
    for (int64_t d = 0; d < dim; ++d) out.center_sum[d] += partials[g]->center_sum[d];
  }
  const int64_t tasks =
      std::min(task_count(runtime, x.count() * (p.labels_per_row + 1) * dim * 16), x.count());
  runtime.parallel(int(tasks), [&](int task) {
    RowMerge<T> merge(context, out, class_groups);
    const Range mine = part_of(x.count(), tasks, task);
    for (int64_t group = 0; group < row_groups; ++group) {
      const Range rows = groups[group].rows;
      for (int64_t i = std::max(rows.begin, mine.begin); i < std::min(rows.end, mine.end); ++i) {
        merge(&partials[group * class_groups], i - rows.begin, i);
      }
    }
  });
}

}  // namespace
}  // namespace synface::margin_cross_entropy
