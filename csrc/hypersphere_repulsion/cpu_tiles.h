// Tiles of cosines, and the distances of single pairs. A part of cpu.cpp.
#pragma once

#include "hypersphere_repulsion/cpu_operands.h"

namespace synface::hypersphere_repulsion {
namespace {

// Points of a block: enough that GEMMs run at full speed, few enough that the cosines of two blocks
// stay in a core's cache.
constexpr int64_t kBlock = 512;
constexpr int64_t kSmallBlock = 128;
// Memory limit of all threads' blocks together.
constexpr int64_t kScratchBytes = int64_t(48) << 20;
constexpr double kNormMax = 0x1p100;
// From this cosine on, 2 − 2c has lost too many digits: r² is computed from the coordinates'
// differences.
constexpr double kClose = 0.9375;

// Distance and direction between two points.
template <class T>
class Pair {
 public:
  Pair(const Problem& p, const SimdKernels<T>& simd)
      : x_(p.x),
        y_(p.y ? *p.y : p.x),
        symmetric_(!p.y),
        simd_(simd),
        from_x_(x_.rows, simd.load),
        from_y_(y_.rows, simd.load),
        difference_(x_.rows.cols) {}

  // Returns r² = ‖x̂_i − ŷ_j‖², from the points as they came.
  double square(int64_t i, int64_t j) const {
    return simd_.subtract(from_x_.row(i), x_.inverse[i], from_y_.row(j), y_.inverse[j],
                          difference_.get(), dim());
  }

  // Returns max(r, r_min), and sets `direction` to the unit vector from ŷ_j to x̂_i times that.
  double apart(int64_t i, int64_t j, double r_min) const {
    const double r = std::sqrt(square(i, j));
    if (r == 0) {
      std::fill_n(difference_.get(), dim(), 0.0);
      const T* x = from_x_.row(i);
      int64_t axis = (i + j) % dim();
      if (std::abs(x[axis] * x_.inverse[i]) > 0.8) axis = (axis + 1) % dim();
      difference_[axis] = symmetric_ && i > j ? -r_min : r_min;
    } else if (r < r_min) {
      for (int64_t d = 0; d < dim(); ++d) difference_[d] *= r_min / r;
    }
    return std::max(r, r_min);
  }
  const double* direction() const { return difference_.get(); }

 private:
  int64_t dim() const { return x_.rows.cols; }
  const Points& x_;
  const Points& y_;
  bool symmetric_;
  const SimdKernels<T>& simd_;
  RowReader<T> from_x_, from_y_;
  Buffer<double> difference_;
};

// Calls run(range) on ranges of n rows, in parallel.
template <class F>
void for_rows(const Runtime& runtime, int64_t n, F&& run) {
  const int64_t tasks = std::min<int64_t>(n, kTasksPerThread * runtime.threads);
  runtime.parallel(int(tasks), [&](int task) { run(part_of(n, tasks, task)); });
}

// Cosines of a block of points (rows) with another, or with itself (diagonal: only pairs i < j).
template <class T, class Operand>
struct Tile {
  Range rows, columns;
  int64_t row_block, column_block;
  BlockOperand<T, Operand> row_points, column_points;
  T* cosines;
  int64_t stride;           // of the cosines' rows
  Packed<Operand>* packed;  // scratch for either block's points
  bool diagonal;
};

// Scratch memory of a thread in bytes: for each pair of points of two blocks, and for each point of
// one.
struct ScratchBytes {
  int64_t pair = 0, point = 0;
};

// Visits all pairs of points in tiles. Tiles are scheduled in rounds in which no block occurs
// twice, so a visitor may write to its two blocks' results, in an order that does not depend on
// timing.
template <class T, class Operand = T>
class Tiles {
 public:
  // `more` is what visitors take besides a tile; `least_block` the points that a block has at least
  // where there are few blocks for all threads.
  Tiles(const Problem& p, const Runtime& runtime, const SimdKernels<T>& simd,
        const ScratchBytes& more = {}, int64_t least_block = kSmallBlock)
      : p_(p),
        runtime_(runtime),
        simd_(simd),
        dim_(p.x.rows.cols),
        x_(p.x, simd),
        y_(p.y ? *p.y : p.x, simd) {
    // Both blocks' points, and one block's packed in two ways.
    const int64_t points = x_.point_bytes() + y_.point_bytes() + 2 * dim_ * operand_bytes<Operand>;
    const double room = double(kScratchBytes) / runtime.threads;
    const auto pair = double(more.pair + int64_t(sizeof(T)));
    const double half = 0.5 * double(more.point + points);
    const auto most = int64_t((std::sqrt(half * half + pair * room) - half) / pair);
    const auto blocks = [&](int64_t n) {
      const int64_t least = ceil_div(n, std::clamp<int64_t>(most, 16, kBlock));
      return std::max(
          {least, std::min(kTasksPerThread * runtime.threads, n / least_block), int64_t(1)});
    };
    row_blocks_ = blocks(rows());
    column_blocks_ = p.y ? blocks(columns()) : row_blocks_;
  }

  int64_t row_blocks() const { return row_blocks_; }
  int64_t column_blocks() const { return column_blocks_; }
  int64_t most_rows() const { return ceil_div(rows(), row_blocks_); }
  int64_t most_columns() const { return ceil_div(columns(), column_blocks_); }
  const PointOperands<T, Operand>& x() const { return x_; }
  const PointOperands<T, Operand>& y() const { return y_; }
  Range row_block(int64_t b) const { return part_of(rows(), row_blocks_, b); }
  Range column_block(int64_t b) const { return part_of(columns(), column_blocks_, b); }

  // Calls visit(thread, tile), except for pairs of blocks that prefilter(thread, rows, columns,
  // scratch for their cosines) has handled. It is not called for a block with itself.
  template <class Visit, class Prefilter>
  void run(const Visit& visit, Prefilter&& prefilter) const {
    std::vector<Scratch> scratch;
    for (int t = 0; t < runtime_.threads; ++t) {
      scratch.emplace_back(x_.buffer(most_rows()), y_.buffer(most_columns()), *this);
    }
    for (int64_t round = 0; round < rounds(); ++round) {
      const std::vector<BlockPair> pairs = pairs_of(round);
      std::atomic<size_t> next{0};
      const int threads = std::min<int>(runtime_.threads, int(pairs.size()));
      runtime_.parallel(threads, [&](int thread) {
        for (size_t p = next++; p < pairs.size(); p = next++) {
          const bool diagonal = !p_.y && pairs[p].row == pairs[p].column;
          if (!diagonal && prefilter(thread, row_block(pairs[p].row), column_block(pairs[p].column),
                                     scratch[thread].cosines.get())) {
            continue;
          }
          visit_pair(thread, scratch[thread], pairs[p], visit);
        }
      });
    }
  }
  template <class Visit>
  void run(const Visit& visit) const {
    run(visit, [](int, Range, Range, T*) { return false; });
  }

 private:
  struct BlockPair {
    int64_t row, column;
  };
  struct Scratch {
    Scratch(OperandBuffer<T> x, OperandBuffer<T> y, const Tiles& tiles)
        : row_points(std::move(x)),
          column_points(std::move(y)),
          cosines(tiles.most_rows() * padded<T>(tiles.most_columns())),
          transposed(tiles.dim_, tiles.most_columns()),
          packed(std::max(tiles.most_rows(), tiles.most_columns()), tiles.dim_) {}
    OperandBuffer<T> row_points, column_points;
    Buffer<T> cosines;
    Packed<Operand> transposed, packed;
  };

  int64_t rows() const { return p_.x.rows.rows; }
  int64_t columns() const { return p_.y ? p_.y->rows.rows : rows(); }

  // Without y, a round-robin tournament: each block is paired with itself, then with each other
  // block once.
  int64_t rounds() const {
    if (p_.y) return std::max(row_blocks_, column_blocks_);
    return row_blocks_ + row_blocks_ % 2;
  }
  std::vector<BlockPair> pairs_of(int64_t round) const {
    std::vector<BlockPair> pairs;
    if (p_.y) {
      for (int64_t i = 0; i < row_blocks_; ++i) {
        const int64_t j = (i + round) % rounds();
        if (j < column_blocks_) pairs.push_back({i, j});
      }
    } else if (round == 0) {
      for (int64_t i = 0; i < row_blocks_; ++i) pairs.push_back({i, i});
    } else {
      const int64_t circle = rounds() - 1;  // the last block (or none) stays, the others rotate
      for (int64_t step = 0; step < rounds() / 2; ++step) {
        const int64_t a = (round + step) % circle;
        const int64_t b = step == 0 ? circle : (round - step + circle) % circle;
        if (std::max(a, b) < row_blocks_) pairs.push_back({std::min(a, b), std::max(a, b)});
      }
    }
    return pairs;
  }

  template <class Visit>
  void visit_pair(int thread, Scratch& scratch, BlockPair pair, const Visit& visit) const {
    Tile<T, Operand> tile{.rows = row_block(pair.row),
                          .columns = column_block(pair.column),
                          .row_block = pair.row,
                          .column_block = pair.column,
                          .row_points = x_.read(row_block(pair.row), scratch.row_points),
                          .column_points = {},
                          .cosines = scratch.cosines.get(),
                          .stride = padded<T>(column_block(pair.column).size()),
                          .packed = &scratch.packed,
                          .diagonal = false};
    if (!p_.y && pair.row == pair.column) {
      tile.column_points = tile.row_points;
      visit_diagonal(thread, scratch, tile, visit);
    } else {
      tile.column_points = y_.read(tile.columns, scratch.column_points);
      visit_tile(thread, scratch, tile, visit);
    }
  }

  template <class Visit>
  void visit_tile(int thread, Scratch& scratch, const Tile<T, Operand>& tile,
                  const Visit& visit) const {
    const int64_t n = tile.columns.size();
    const auto& columns = tile.column_points;
    scratch.transposed.fill(columns.points.data, dim_, n, 1, columns.points.row);
    multiply(tile.rows.size(), tile.row_points.points, scratch.transposed,
             {.data = tile.cosines, .stride = tile.stride});
    for (int64_t i = 0; columns.factors && i < tile.rows.size(); ++i) {
      simd_.multiply_each(tile.cosines + i * tile.stride, tile.row_points.factors[i],
                          columns.factors, n);
    }
    visit(thread, tile);
  }

  // Splits a block with itself recursively, so that little more than half of it is computed.
  template <class Visit>
  void visit_diagonal(int thread, Scratch& scratch, Tile<T, Operand> tile,
                      const Visit& visit) const {
    const auto [begin, end] = tile.rows;
    if (end - begin <= kSmallBlock) {
      tile.diagonal = true;
      return visit_tile(thread, scratch, tile, visit);
    }
    const int64_t middle = (begin + end) / 2;
    Tile<T, Operand> first = tile, second = tile, across = tile;
    first.rows = first.columns = across.rows = {begin, middle};
    second.rows = second.columns = across.columns = {middle, end};
    second.row_points = second.column_points = across.column_points =
        tile.row_points.from(middle - begin);
    visit_diagonal(thread, scratch, first, visit);
    visit_diagonal(thread, scratch, second, visit);
    visit_tile(thread, scratch, across, visit);
  }

  const Problem& p_;
  const Runtime& runtime_;
  const SimdKernels<T>& simd_;
  int64_t dim_, row_blocks_, column_blocks_;
  PointOperands<T, Operand> x_, y_;
};

}  // namespace

}  // namespace synface::hypersphere_repulsion
