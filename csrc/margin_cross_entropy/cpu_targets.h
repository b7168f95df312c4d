// Negatives and targets: which cosines of a tile enter the softmax, and the cosines of a row's own
// labels. A part of cpu.cpp.
#pragma once

#include "margin_cross_entropy/cpu_operands.h"

namespace synface::margin_cross_entropy {
namespace {

// Calls visit(position in the range, index among the row's labels) for labels in a range of
// classes.
template <class F>
void for_labels_in(const int64_t* labels, int64_t k, Range classes, F&& visit) {
  for (int64_t l = 0; l < k; ++l) {
    if (labels[l] >= classes.begin && labels[l] < classes.end) visit(labels[l] - classes.begin, l);
  }
}

// Prefetch distance, in rows.
constexpr int64_t kRowsAhead = 16;
template <class T>
void prefetch(const T* row, int64_t n) {
  for (int64_t i = 0; i < n; i += int64_t(64 / sizeof(T))) __builtin_prefetch(row + i, 1);
}

// A tile of cosines, a row for each center and a column for each embedding: −∞ where the center is
// no negative of the embedding. Centers of the row's labels, sub-centers below their class's
// maximum and cosines over the limit are −∞ too, so that readers of a tile need not know of them.
template <class T, class Operand>
class Negatives {
 public:
  // Tiles hold at most this many centers and rows.
  Negatives(const Context<T>& context, const TileGemms<T, Operand>& gemms, int64_t centers,
            int64_t rows)
      : p_(context.p),
        simd_(context.simd),
        x_(context.x),
        gemms_(gemms),
        stride_(padded<T>(rows)),
        tile_(centers * stride_),
        best_(stride_),
        filtered_(stride_) {}

  // Fills the columns of these rows, from column `at` on.
  void fill(const Centers<T, Operand>& centers, Range classes, const Packed<Operand>& block,
            Range rows, int64_t at = 0) {
    const int64_t count = rows.size(), m = p_.sub_centers, k = p_.labels_per_row;
    gemms_.logits(centers, block, rows.begin, row(0) + at, stride_);
    for (int64_t j = 0; !centers.normalizes() && j < centers.size(); ++j) {
      simd_.cosines(row(j) + at, Parts<T>(centers.factor(j)), count);
    }
    for (int64_t j = 0; m > 1 && j < centers.size(); j += m) {
      simd_.keep_greatest(row(j) + at, stride_, m, best_.get(), count);
    }
    for (int64_t i = 0; i < count; ++i) {
      for_labels_in(p_.labels + x_.source[rows.begin + i] * k, k, classes, [&](int64_t j, int64_t) {
        for (int64_t s = 0; s < m; ++s) {
          row(j * m + s)[at + i] = -std::numeric_limits<T>::infinity();
        }
      });
    }
    if (p_.limit == std::numeric_limits<double>::infinity()) return;
    std::fill_n(filtered_.get(), count, T(0));
    for (int64_t j = 0; j < centers.size(); ++j) {
      simd_.filter(row(j) + at, T(p_.limit), filtered_.get(), count);
    }
  }
  int64_t stride() const { return stride_; }
  T* row(int64_t j) const { return tile_.get() + j * stride_; }
  const T* filtered() const { return filtered_.get(); }

 private:
  const Problem& p_;
  const SimdKernels<T>& simd_;
  const Embeddings<T>& x_;
  const TileGemms<T, Operand>& gemms_;
  int64_t stride_;
  Buffer<T> tile_, best_, filtered_;
};

// A label of a row: ⟨x, w⟩, ‖x‖ and ‖w‖ of its embedding and the label's (nearest sub-)center.
struct Target {
  int64_t center;  // in the range of classes
  int64_t label;   // index among the row's labels
  double xw, x, w;
};

// Visits a row's own labels one at a time, in double: with the embedding and the label's center as
// they came, or shortened. Zero vectors are skipped.
template <class T>
class Targets {
 public:
  Targets(const Problem& p, const SimdKernels<T>& simd)
      : p_(p),
        simd_(simd),
        embedding_(p.input.cols),
        center_(p.input.cols),
        other_(p.sub_centers > 1 ? p.input.cols : 0) {}

  const T* embedding() const { return embedding_.get(); }
  const T* center() const { return center_.get(); }
  // Factors by which a long embedding or center was scaled; 1 for others.
  double embedding_shrink() const { return embedding_shrink_; }
  double center_shrink() const { return center_shrink_; }

  // Calls visit(target) for the row's labels in a range of classes.
  template <class F>
  void visit(int64_t source, Range classes, F&& visit) {
    const int64_t dim = p_.input.cols, k = p_.labels_per_row, m = p_.sub_centers;
    double x = -1;  // not loaded yet
    for_labels_in(p_.labels + source * k, k, classes, [&](int64_t j, int64_t l) {
      if (x == -1) {
        simd_.load(row_at(p_.input, source), p_.input.dtype, embedding_.get(), dim);
        x = std::sqrt(square_norm(simd_, embedding_.get(), dim, embedding_shrink_));
      }
      if (x <= kNormMin) return;
      Loaded best = load(center_, (classes.begin + j) * m);
      int64_t nearest = 0;
      for (int64_t s = 1; s < m; ++s) {
        const Loaded next = load(other_, (classes.begin + j) * m + s);
        if (next.cosine() > best.cosine() || std::isnan(next.w)) {
          std::swap(center_, other_);
          best = next;
          nearest = s;
        }
      }
      center_shrink_ = best.shrink;
      if (best.w > kNormMin || std::isnan(best.w)) {
        visit(Target{.center = j * m + nearest, .label = l, .xw = best.xw, .x = x, .w = best.w});
      }
    });
  }

 private:
  struct Loaded {
    double xw, w, shrink;                                         // ⟨x, w⟩, ‖w‖
    double cosine() const { return w <= kNormMin ? 0 : xw / w; }  // times ‖x‖
  };
  Loaded load(const Buffer<T>& to, int64_t c) {
    const int64_t dim = p_.input.cols;
    simd_.load(center_at(p_, c), p_.weight.dtype, to.get(), dim);
    double shrink;
    const double w = std::sqrt(square_norm(simd_, to.get(), dim, shrink));
    return {.xw = simd_.dot_double(embedding(), to.get(), dim), .w = w, .shrink = shrink};
  }

  const Problem& p_;
  const SimdKernels<T>& simd_;
  Buffer<T> embedding_, center_, other_;
  double embedding_shrink_ = 1, center_shrink_ = 1;
};

}  // namespace
}  // namespace synface::margin_cross_entropy
