// Energies: sums over all pairs, and their gradients. A part of cpu.cpp.
#pragma once

#include "hypersphere_repulsion/cpu_tiles.h"

namespace synface::hypersphere_repulsion {
namespace {

// Results of the blocks of x, or of y: their points' gradients (not yet projected) and their share
// of the sum. For log_sum_exp both are in units of e^{a·shift}, with a shift per block.
template <class T>
struct Sums {
  Sums(T* gradient, int64_t blocks)
      : gradient(gradient), shift(blocks, -std::numeric_limits<T>::infinity()), sum(blocks, 0.0) {}
  T* gradient;
  std::vector<T> shift;
  std::vector<double> sum;
};

// Sums the potential over all pairs of points. A gradient is summed in units of its point's factor
// (see PointOperands), since the weights of pairs are multiplied by both points' factors.
template <class T, class Operand>
class PairSum {
 public:
  PairSum(const Problem& p, const Potential& potential, const Runtime& runtime,
          const Gradients<T>& gradients)
      : p_(p),
        potential_(potential),
        runtime_(runtime),
        simd_(SYNFACE_DISPATCH(simd_kernels<T>)),
        tiles_(p, runtime, simd_,
               {.pair = RoundedTile<Operand>::rounds() ? operand_bytes<Operand> : 0}),
        dim_(p.x.rows.cols),
        x_(gradients.x, tiles_.row_blocks()),
        y_(gradients.y, p.y ? tiles_.column_blocks() : 0),
        columns_(p.y ? y_ : x_) {
    for (int t = 0; t < runtime.threads; ++t) {
      scratch_.push_back({Pair<T>(p, simd_), {tiles_.most_rows(), tiles_.most_columns()}});
    }
  }

  double run() {
    tiles_.run([&](int thread, const Tile& tile) { visit(tile, scratch_[thread]); });
    T most = 0;
    double sum = 0;
    if (exponential()) most = *std::max_element(x_.shift.begin(), x_.shift.end());
    for (size_t b = 0; b < x_.sum.size(); ++b) sum += x_.sum[b] * rescaling(x_.shift[b], most);
    const double factor = exponential() ? potential_.a / sum : 1;
    if (x_.gradient) finish(p_.x, tiles_.x(), x_, most, factor);
    if (y_.gradient) finish(*p_.y, tiles_.y(), y_, most, factor);
    return exponential() ? potential_.a * most + std::log(sum) : sum;
  }

 private:
  using Tile = hypersphere_repulsion::Tile<T, Operand>;
  struct Scratch {
    Pair<T> pair;
    RoundedTile<Operand> rounded;
  };

  bool exponential() const { return potential_.kind == Kind::log_sum_exp; }
  double rescaling(double from, double to) const {
    return exponential() ? std::exp(potential_.a * (from - to)) : 1;
  }

  void raise(Sums<T>& sums, int64_t block, Range points, T shift) const {
    const T before = sums.shift[block];
    if (shift <= before) return;
    sums.shift[block] = shift;
    if (before == -std::numeric_limits<T>::infinity()) return;  // nothing was added yet
    const double shrink = rescaling(before, shift);
    sums.sum[block] *= shrink;
    if (sums.gradient) {
      simd_.multiply(sums.gradient + points.begin * dim_, T(shrink), points.size() * dim_);
    }
  }

  // Returns the cosine that the tile's exponentials are relative to: at least the greatest of its
  // own and of earlier tiles of the blocks whose gradients it adds to. (Also for the smaller tiles
  // of a diagonal block: all its points share the shift.)
  T raise_shifts(const Tile& tile) {
    const int64_t n = tile.columns.size();
    T shift = x_.shift[tile.row_block];
    if (columns_.gradient) shift = std::max(shift, columns_.shift[tile.column_block]);
    for (int64_t i = 0; i < tile.rows.size(); ++i) {
      const int64_t begin = tile.diagonal ? i + 1 : 0;
      shift = std::max(shift, simd_.maximum(tile.cosines + i * tile.stride + begin, n - begin));
    }
    raise(x_, tile.row_block, tiles_.row_block(tile.row_block), shift);
    raise(columns_, tile.column_block, tiles_.column_block(tile.column_block), shift);
    return shift;
  }

  void visit(const Tile& tile, const Scratch& scratch) {
    const int64_t n = tile.columns.size();
    const T shift = exponential() ? raise_shifts(tile) : T(0);
    const auto derivatives = simd_.derivatives[int(potential_.kind)];
    double sum = 0;
    for (int64_t i = 0; i < tile.rows.size(); ++i) {
      T* row = tile.cosines + i * tile.stride;
      int64_t j = tile.diagonal ? i + 1 : 0;
      std::fill_n(row, j, T(0));
      while (j < n) {
        int64_t close = simd_.first_reaching(row, T(kClose), nullptr, j, n);
        while (close < n && row[close] < T(kClose)) ++close;
        sum += derivatives(row + j, T(potential_.a), shift, potential_.power == 1, close - j);
        if (close < n) {
          sum += add_close(scratch.pair, tile.rows.begin + i, tile.columns.begin + close, shift);
          row[close] = 0;
        }
        j = close + 1;
      }
      if (const T* factors = tile.column_points.factors) {
        simd_.multiply_each(row, tile.row_points.factors[i], factors, n);
      }
    }
    x_.sum[tile.row_block] += sum;
    if (x_.gradient) add_gradient(tile, false, scratch.rounded);
    if (columns_.gradient) add_gradient(tile, true, scratch.rounded);
  }

  // Adds the tile, or its transpose, times the other block's points to a block's gradient.
  void add_gradient(const Tile& tile, bool transposed, const RoundedTile<Operand>& rounded) const {
    const Range own = transposed ? tile.columns : tile.rows;
    const Range other = transposed ? tile.rows : tile.columns;
    const auto& points = (transposed ? tile.row_points : tile.column_points).points;
    const Sums<T>& sums = transposed ? columns_ : x_;
    const Output<T> to{
        .data = sums.gradient + own.begin * dim_, .stride = dim_, .accumulate = true};
    tile.packed->fill(points.data, other.size(), dim_, points.row, 1);
    if constexpr (RoundedTile<Operand>::rounds()) {
      multiply(own.size(),
               rounded({.data = tile.cosines,
                        .rows = tile.rows.size(),
                        .cols = tile.columns.size(),
                        .stride = tile.stride,
                        .transposed = transposed}),
               *tile.packed, to);
    } else {
      const Left<T> weights =
          transposed ? Left<T>{tile.cosines, 1, tile.stride} : Left<T>{tile.cosines, tile.stride};
      multiply(own.size(), weights, *tile.packed, to);
    }
  }

  // Adds a close pair's gradients, along its difference; returns f.
  double add_close(const Pair<T>& pair, int64_t i, int64_t j, T shift) {
    const double a = potential_.a, r = pair.apart(i, j, potential_.r_min);
    const double c = 1 - r * r / 2, over = std::max(0.0, c - a);
    double f = 0, slope = 0;  // slope: the derivative of f by the cosine
    switch (potential_.kind) {
      case Kind::log_sum_exp:
        f = slope = std::exp(a * (c - shift));
        break;
      case Kind::riesz:
        f = std::pow(r, -a);
        slope = a * f / (r * r);
        break;
      case Kind::log:
        f = -std::log(r);
        slope = 1 / (r * r);
        break;
      case Kind::hinge:
        f = potential_.power == 1 ? over : over * over / 2;
        slope = potential_.power == 1 ? over > 0 : over;
        break;
    }
    const double* push = pair.direction();
    if (x_.gradient) simd_.add(x_.gradient + i * dim_, -slope * tiles_.x().factor(i), push, dim_);
    if (columns_.gradient) {
      simd_.add(columns_.gradient + j * dim_, slope * tiles_.y().factor(j), push, dim_);
    }
    return f;
  }

  // Turns sums of derivatives times points into gradients of the unnormalized points.
  void finish(const Points& points, const PointOperands<T, Operand>& operands, const Sums<T>& sums,
              T most, double factor) const {
    const auto blocks = int64_t(sums.sum.size());
    runtime_.parallel(int(blocks), [&](int block) {
      const RowReader<T> reader(points.rows, simd_.load);
      const double scale = factor * rescaling(sums.shift[block], most);
      const Range range = part_of(points.rows.rows, blocks, block);
      for (int64_t i = range.begin; i < range.end; ++i) {
        T* gradient = sums.gradient + i * dim_;
        const double inverse = points.inverse[i];
        const double norms = inverse / operands.factor(i);
        simd_.project(gradient, reader.row(i), inverse, scale * norms, gradient, dim_);
      }
    });
  }

  const Problem& p_;
  const Potential& potential_;
  const Runtime& runtime_;
  const SimdKernels<T>& simd_;
  Tiles<T, Operand> tiles_;
  int64_t dim_;
  Sums<T> x_, y_;
  Sums<T>& columns_;
  std::vector<Scratch> scratch_;
};

}  // namespace

}  // namespace synface::hypersphere_repulsion
