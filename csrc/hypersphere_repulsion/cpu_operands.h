// Blocks of points as operands of the GEMMs: unit vectors, their bf16 splits, or bfloat16 points as
// they came, which factors normalize after the GEMM. A part of cpu.cpp.
#pragma once

#include "gemm/bf16.h"

namespace synface::hypersphere_repulsion {
namespace {

// bfloat16 points whose norms are not all in [1/kPlainNorm, kPlainNorm] are multiplied by powers of
// two, which is exact, so that neither dot products nor weights overflow or are flushed to 0.
constexpr double kPlainNorm = 0x1p8;

// Memory for a block's points as operands.
template <class T>
struct OperandBuffer {
  Buffer<T> units, factors;
  Buffer<uint16_t> high, low;
};

// Points (rows) as a left operand, and what normalizes them: null where they are unit vectors.
template <class T, class Operand>
struct BlockOperand {
  Left<Operand> points;
  const T* factors = nullptr;

  // Returns the rows from the i-th on.
  BlockOperand from(int64_t i) const {
    const int64_t at = i * points.row;
    const T* rest = factors ? factors + i : nullptr;
    if constexpr (is_split<Operand>) {
      return {{{points.data.high + at, points.data.low + at}, points.row}, rest};
    } else {
      return {{points.data + at, points.row}, rest};
    }
  }
};

// Reads blocks of points.
template <class T, class Operand>
class PointOperands {
 public:
  PointOperands(const Points& points, const SimdKernels<T>& simd)
      : points_(points), simd_(simd), dim_(points.rows.cols) {
    const double* inverse = points.inverse;
    scales_ =
        is_bf16<Operand> && std::any_of(inverse, inverse + points.rows.rows, [](double factor) {
          return factor > kPlainNorm || factor < 1 / kPlainNorm;
        });
  }

  // Bytes of a point in an OperandBuffer, but for its factor.
  int64_t point_bytes() const {
    return is_bf16<Operand> && !scales_ ? 0 : dim_ * operand_bytes<Operand>;
  }

  OperandBuffer<T> buffer(int64_t rows) const {
    const int64_t size = rows * dim_;
    const bool converts = is_split<Operand> || scales_;  // one row at a time
    const int64_t units = std::is_same_v<Operand, T> ? size : 0;
    return {.units = Buffer<T>(converts ? dim_ : units),
            .factors = Buffer<T>(is_bf16<Operand> ? rows : 0),
            .high = Buffer<uint16_t>(converts ? size : 0),
            .low = Buffer<uint16_t>(is_split<Operand> ? size : 0)};
  }

  // What normalizes the i-th point as an operand.
  T factor(int64_t i) const {
    if constexpr (!is_bf16<Operand>) return 1;
    return T(points_.inverse[i] / scale(i));
  }

  BlockOperand<T, Operand> read(Range range, const OperandBuffer<T>& to) const {
    if constexpr (is_bf16<Operand>) {
      for (int64_t i = 0; i < range.size(); ++i) to.factors[i] = factor(range.begin + i);
      if (!scales_) {
        const auto* rows = static_cast<const uint16_t*>(row_at(points_.rows, range.begin));
        return {{rows, points_.rows.stride}, to.factors.get()};
      }
    }
    for (int64_t i = 0; i < range.size(); ++i) {
      const int64_t at = i * dim_, point = range.begin + i;
      T* row = to.units.get() + (std::is_same_v<Operand, T> ? at : 0);
      simd_.load(row_at(points_.rows, point), points_.rows.dtype, row, dim_);
      simd_.multiply(row, T(is_bf16<Operand> ? scale(point) : points_.inverse[point]), dim_);
      if constexpr (is_split<Operand>) split_row(row, dim_, to.high.get() + at, to.low.get() + at);
      if constexpr (is_bf16<Operand>) simd_.store(row, to.high.get() + at, Dtype::bf16, dim_);
    }
    if constexpr (is_split<Operand>) {
      return {{SplitBf16{to.high.get(), to.low.get()}, dim_}};
    } else if constexpr (is_bf16<Operand>) {
      return {{to.high.get(), dim_}, to.factors.get()};
    } else {
      return {{to.units.get(), dim_}};
    }
  }

 private:
  // The power of two that a bfloat16 point is multiplied by: then its norm is in (½, 1].
  double scale(int64_t i) const {
    return scales_ ? std::ldexp(1.0, std::ilogb(points_.inverse[i])) : 1;
  }

  const Points& points_;
  const SimdKernels<T>& simd_;
  int64_t dim_;
  bool scales_;
};

}  // namespace
}  // namespace synface::hypersphere_repulsion
