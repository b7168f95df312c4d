#include "hypersphere_repulsion/cpu.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "gemm/gemm.h"
#include "memory.h"
#include "simd/scalar.h"

namespace synface::hypersphere_repulsion {
namespace {

// Values compared at once; where one of them reaches its threshold all are looked at.
constexpr int64_t kChunk = 64;

template <class T>
struct Loops {
  double (*dot_double)(const T* a, const T* b, int64_t n);
  void (*multiply)(T* values, T factor, int64_t n);
  T (*maximum)(const T* values, int64_t n);
  int64_t (*first_reaching)(const T* values, T row, const T* columns, int64_t from, int64_t n);
  int64_t (*count_reaching)(const T* values, T row, const T* columns, int64_t n);
  void (*round)(const T* x, T inverse, uint16_t* to, int64_t n);
  double (*residual)(const T* x, double inverse, const uint16_t* rounded, int64_t n);
  double (*subtract)(const T* x, double a, const T* y, double b, double* difference, int64_t n);
  void (*add)(T* to, double factor, const double* from, int64_t n);
  void (*add_double)(double* to, double factor, const double* from, int64_t n);
  void (*project)(const T* v, const T* x, double inverse, double scale, T* to, int64_t n);
  void (*project_double)(const double* v, const T* x, double inverse, double scale, T* to,
                         int64_t n);
  T (*derivatives[4])(T* values, T a, T shift, bool linear, int64_t n);  // by Kind
  void (*load)(const void* from, Dtype dtype, T* to, int64_t n);
  void (*store)(const T* from, void* to, Dtype dtype, int64_t n);
};

}  // namespace
}  // namespace synface::hypersphere_repulsion

#define SYNFACE_ISA_SOURCE "hypersphere_repulsion/cpu-inl.h"
#include "simd/foreach_isa.h"

namespace synface::hypersphere_repulsion {
namespace {

// Points of a block: enough that products run at full speed, and that the cosines of two blocks
// stay in a core's cache.
constexpr int64_t kBlock = 512;
constexpr int64_t kSmallBlock = 128;
// What all threads' blocks may take together.
constexpr int64_t kScratchBytes = int64_t(48) << 20;
constexpr int64_t kTasksPerThread = 4;
constexpr double kNormMin = 1e-12;  // as in op.py
constexpr double kNormMax = 0x1p100;
// From this cosine on 2 − 2c has lost too many digits: r² comes from the coordinates' differences.
constexpr double kClose = 0.9375;

// The rows of a matrix one at a time as T, copied only where they are not.
template <class T>
class Reader {
 public:
  Reader(const Points& points, const Loops<T>& loops)
      : points_(points),
        loops_(loops),
        copies_(points.rows.dtype != dtype_of<T>),
        copy_(copies_ ? points.rows.cols : 0) {}
  const T* row(int64_t i) const {
    const void* from = row_at(points_.rows, i);
    if (!copies_) return static_cast<const T*>(from);
    loops_.load(from, points_.rows.dtype, copy_.get(), points_.rows.cols);
    return copy_.get();
  }

 private:
  const Points& points_;
  const Loops<T>& loops_;
  bool copies_;
  Buffer<T> copy_;
};

// A pair of points: what separates them.
template <class T>
class Pair {
 public:
  Pair(const Problem& p, const Loops<T>& loops)
      : x_(p.x),
        y_(p.y ? *p.y : p.x),
        symmetric_(!p.y),
        loops_(loops),
        from_x_(x_, loops),
        from_y_(y_, loops),
        difference_(x_.rows.cols) {}

  // r² = ‖x̂_i − ŷ_j‖², from the points as they came.
  double square(int64_t i, int64_t j) const {
    return loops_.subtract(from_x_.row(i), x_.inverse[i], from_y_.row(j), y_.inverse[j],
                           difference_.get(), dim());
  }

  // The same, with `direction` then the unit vector from ŷ_j to x̂_i times its result.
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
  const Loops<T>& loops_;
  Reader<T> from_x_, from_y_;
  Buffer<double> difference_;
};

template <class F>
void for_rows(const Runtime& runtime, int64_t n, F&& run) {
  const int64_t tasks = std::min<int64_t>(n, kTasksPerThread * runtime.threads);
  runtime.parallel(int(tasks), [&](int task) { run(part_of(n, tasks, task)); });
}

// Cosines of a block of points (rows) with another, or with itself (diagonal: pairs i < j count).
template <class T>
struct Tile {
  Range rows, columns;
  int64_t row_block, column_block;
  const T* row_units;
  const T* column_units;
  T* cosines;
  int64_t stride;     // of the cosines' rows
  Packed<T>* packed;  // room for either block's points
  bool diagonal;
};

// All pairs in tiles. Tiles go in rounds, in which no block takes part twice, so a visitor may
// write what belongs to its two blocks, and does so in an order that does not depend on timing.
template <class T>
class Tiles {
 public:
  // `operands`: how many blocks' points a thread has room for besides the cosines. Here both
  // blocks', and a block's packed in two ways.
  Tiles(const Problem& p, const Runtime& runtime, const Loops<T>& loops, int operands = 4)
      : p_(p), runtime_(runtime), loops_(loops), dim_(p.x.rows.cols) {
    const double room = double(kScratchBytes) / double(sizeof(T)) / runtime.threads;
    const double half = 0.5 * operands * double(dim_);
    const auto most = int64_t(std::sqrt(half * half + room) - half);
    const auto blocks = [&](int64_t n) {
      const int64_t least = ceil_div(n, std::clamp<int64_t>(most, 16, kBlock));
      return std::max(
          {least, std::min(kTasksPerThread * runtime.threads, n / kSmallBlock), int64_t(1)});
    };
    row_blocks_ = blocks(rows());
    column_blocks_ = p.y ? blocks(columns()) : row_blocks_;
  }

  int64_t row_blocks() const { return row_blocks_; }
  int64_t column_blocks() const { return column_blocks_; }
  int64_t most_rows() const { return ceil_div(rows(), row_blocks_); }
  int64_t most_columns() const { return ceil_div(columns(), column_blocks_); }
  Range row_block(int64_t b) const { return part_of(rows(), row_blocks_, b); }
  Range column_block(int64_t b) const { return part_of(columns(), column_blocks_, b); }

  // visit(thread, tile), but for the pairs of blocks with which skim(thread, rows, columns, room
  // for their cosines) has dealt. It is not asked about a block with itself.
  template <class Visit, class Skim>
  void run(const Visit& visit, Skim&& skim) const {
    std::vector<Scratch> scratch;
    for (int t = 0; t < runtime_.threads; ++t) {
      scratch.emplace_back(most_rows(), most_columns(), dim_);
    }
    for (int64_t round = 0; round < rounds(); ++round) {
      const std::vector<BlockPair> pairs = pairs_of(round);
      std::atomic<size_t> next{0};
      const int threads = std::min<int>(runtime_.threads, int(pairs.size()));
      runtime_.parallel(threads, [&](int thread) {
        for (size_t p = next++; p < pairs.size(); p = next++) {
          const bool diagonal = !p_.y && pairs[p].row == pairs[p].column;
          if (!diagonal && skim(thread, row_block(pairs[p].row), column_block(pairs[p].column),
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
    Scratch(int64_t rows, int64_t columns, int64_t dim)
        : row_units(rows * dim),
          column_units(columns * dim),
          cosines(rows * padded<T>(columns)),
          transposed(dim, columns),
          packed(std::max(rows, columns), dim) {}
    Buffer<T> row_units, column_units, cosines;
    Packed<T> transposed, packed;
  };

  int64_t rows() const { return p_.x.rows.rows; }
  int64_t columns() const { return p_.y ? p_.y->rows.rows : rows(); }

  // Without y a tournament where each block meets each other one once, after meeting itself.
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
      const int64_t circle = rounds() - 1;  // the last one (or nobody) stays, the others go round
      for (int64_t step = 0; step < rounds() / 2; ++step) {
        const int64_t a = (round + step) % circle;
        const int64_t b = step == 0 ? circle : (round - step + circle) % circle;
        if (std::max(a, b) < row_blocks_) pairs.push_back({std::min(a, b), std::max(a, b)});
      }
    }
    return pairs;
  }

  void normalize(const Points& points, Range range, T* units) const {
    for (int64_t i = range.begin; i < range.end; ++i) {
      T* unit = units + (i - range.begin) * dim_;
      loops_.load(row_at(points.rows, i), points.rows.dtype, unit, dim_);
      loops_.multiply(unit, T(points.inverse[i]), dim_);
    }
  }

  template <class Visit>
  void visit_pair(int thread, Scratch& scratch, BlockPair pair, const Visit& visit) const {
    Tile<T> tile{row_block(pair.row),
                 column_block(pair.column),
                 pair.row,
                 pair.column,
                 scratch.row_units.get(),
                 scratch.column_units.get(),
                 scratch.cosines.get(),
                 padded<T>(column_block(pair.column).size()),
                 &scratch.packed,
                 false};
    normalize(p_.x, tile.rows, scratch.row_units.get());
    if (!p_.y && pair.row == pair.column) {
      tile.column_units = tile.row_units;
      visit_diagonal(thread, scratch, tile, visit);
    } else {
      normalize(p_.y ? *p_.y : p_.x, tile.columns, scratch.column_units.get());
      visit_product(thread, scratch, tile, visit);
    }
  }

  template <class Visit>
  void visit_product(int thread, Scratch& scratch, const Tile<T>& tile, const Visit& visit) const {
    scratch.transposed.fill(tile.column_units, dim_, tile.columns.size(), 1, dim_);
    multiply(tile.rows.size(), Left<T>{tile.row_units, dim_, 1}, scratch.transposed, tile.cosines,
             tile.stride, false);
    visit(thread, tile);
  }

  // Of a block with itself little more than a half is computed.
  template <class Visit>
  void visit_diagonal(int thread, Scratch& scratch, Tile<T> tile, const Visit& visit) const {
    const auto [begin, end] = tile.rows;
    if (end - begin <= kSmallBlock) {
      tile.diagonal = true;
      return visit_product(thread, scratch, tile, visit);
    }
    const int64_t middle = (begin + end) / 2;
    const Range first{begin, middle}, second{middle, end};
    const T* units = tile.row_units;
    const T* second_units = units + (middle - begin) * dim_;
    const auto part = [&](Range rows, const T* row_units, Range columns, const T* column_units) {
      return Tile<T>{rows,         columns,      tile.row_block, tile.column_block, row_units,
                     column_units, tile.cosines, tile.stride,    tile.packed,       false};
    };
    visit_diagonal(thread, scratch, part(first, units, first, units), visit);
    visit_diagonal(thread, scratch, part(second, second_units, second, second_units), visit);
    visit_product(thread, scratch, part(first, units, second, second_units), visit);
  }

  const Problem& p_;
  const Runtime& runtime_;
  const Loops<T>& loops_;
  int64_t dim_, row_blocks_, column_blocks_;
};

// ---- sums over all pairs
// -------------------------------------------------------------------------

// What belongs to the blocks of x, or of y: their points' gradients (not yet projected) and their
// share of the sum. Under log_sum_exp both are in units of e^{a·shift}, with a shift per block.
template <class T>
struct Sums {
  Sums(T* gradient, int64_t blocks)
      : gradient(gradient), shift(blocks, -std::numeric_limits<T>::infinity()), sum(blocks, 0.0) {}
  T* gradient;
  std::vector<T> shift;
  std::vector<double> sum;
};

template <class T>
class PairSum {
 public:
  PairSum(const Problem& p, const Potential& potential, const Runtime& runtime, T* grad_x,
          T* grad_y)
      : p_(p),
        potential_(potential),
        runtime_(runtime),
        loops_(SYNFACE_PICK(loops<T>)),
        tiles_(p, runtime, loops_),
        dim_(p.x.rows.cols),
        x_(grad_x, tiles_.row_blocks()),
        y_(grad_y, p.y ? tiles_.column_blocks() : 0),
        columns_(p.y ? y_ : x_) {
    for (int t = 0; t < runtime.threads; ++t) pairs_.emplace_back(p, loops_);
  }

  double run() {
    tiles_.run([&](int thread, const Tile<T>& tile) { visit(tile, pairs_[thread]); });
    T most = 0;
    double sum = 0;
    if (exponential()) most = *std::max_element(x_.shift.begin(), x_.shift.end());
    for (size_t b = 0; b < x_.sum.size(); ++b) sum += x_.sum[b] * rescaling(x_.shift[b], most);
    const double factor = exponential() ? potential_.a / sum : 1;
    if (x_.gradient) finish(p_.x, x_, tiles_.row_blocks(), most, factor);
    if (y_.gradient) finish(*p_.y, y_, tiles_.column_blocks(), most, factor);
    return exponential() ? potential_.a * most + std::log(sum) : sum;
  }

 private:
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
      loops_.multiply(sums.gradient + points.begin * dim_, T(shrink), points.size() * dim_);
    }
  }

  // The greatest cosine that the tile's exponentials are taken relative to: no less than any met so
  // far by blocks whose gradients it adds to. (That of the smaller tiles of a diagonal block too:
  // all its points share the shift.)
  T raise_shifts(const Tile<T>& tile) {
    const int64_t n = tile.columns.size();
    T shift = x_.shift[tile.row_block];
    if (columns_.gradient) shift = std::max(shift, columns_.shift[tile.column_block]);
    for (int64_t i = 0; i < tile.rows.size(); ++i) {
      const int64_t begin = tile.diagonal ? i + 1 : 0;
      shift = std::max(shift, loops_.maximum(tile.cosines + i * tile.stride + begin, n - begin));
    }
    raise(x_, tile.row_block, tiles_.row_block(tile.row_block), shift);
    raise(columns_, tile.column_block, tiles_.column_block(tile.column_block), shift);
    return shift;
  }

  void visit(const Tile<T>& tile, const Pair<T>& pair) {
    const int64_t n = tile.columns.size(), rows = tile.rows.size();
    const T shift = exponential() ? raise_shifts(tile) : T(0);
    const auto derivatives = loops_.derivatives[int(potential_.kind)];
    double sum = 0;
    for (int64_t i = 0; i < rows; ++i) {
      T* row = tile.cosines + i * tile.stride;
      int64_t j = tile.diagonal ? i + 1 : 0;
      std::fill_n(row, j, T(0));
      while (j < n) {
        int64_t close = loops_.first_reaching(row, T(kClose), nullptr, j, n);
        while (close < n && row[close] < T(kClose)) ++close;
        sum += derivatives(row + j, T(potential_.a), shift, potential_.power == 1, close - j);
        if (close < n) {
          sum += add_close(pair, tile.rows.begin + i, tile.columns.begin + close, shift);
          row[close] = 0;
        }
        j = close + 1;
      }
    }
    x_.sum[tile.row_block] += sum;
    if (x_.gradient) {
      tile.packed->fill(tile.column_units, n, dim_, dim_, 1);
      multiply(rows, Left<T>{tile.cosines, tile.stride, 1}, *tile.packed,
               x_.gradient + tile.rows.begin * dim_, dim_, true);
    }
    if (columns_.gradient) {
      tile.packed->fill(tile.row_units, rows, dim_, dim_, 1);
      multiply(n, Left<T>{tile.cosines, 1, tile.stride}, *tile.packed,
               columns_.gradient + tile.columns.begin * dim_, dim_, true);
    }
  }

  // Adds a close pair's gradients, along its difference; returns f.
  double add_close(const Pair<T>& pair, int64_t i, int64_t j, T shift) {
    const double a = potential_.a, r = pair.apart(i, j, potential_.r_min);
    const double c = 1 - r * r / 2, over = std::max(0.0, c - a);
    double f = 0, slope = 0;  // slope: of f by the cosine
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
    if (x_.gradient) loops_.add(x_.gradient + i * dim_, -slope, pair.direction(), dim_);
    if (columns_.gradient) loops_.add(columns_.gradient + j * dim_, slope, pair.direction(), dim_);
    return f;
  }

  // Sums of f's derivatives times points, to gradients by what came in.
  void finish(const Points& points, const Sums<T>& sums, int64_t blocks, T most,
              double factor) const {
    runtime_.parallel(int(blocks), [&](int block) {
      const Reader<T> reader(points, loops_);
      const double scale = factor * rescaling(sums.shift[block], most);
      const Range range = part_of(points.rows.rows, blocks, block);
      for (int64_t i = range.begin; i < range.end; ++i) {
        T* gradient = sums.gradient + i * dim_;
        const double inverse = points.inverse[i];
        loops_.project(gradient, reader.row(i), inverse, scale * inverse, gradient, dim_);
      }
    });
  }

  const Problem& p_;
  const Potential& potential_;
  const Runtime& runtime_;
  const Loops<T>& loops_;
  Tiles<T> tiles_;
  int64_t dim_;
  Sums<T> x_, y_;
  Sums<T>& columns_;
  std::vector<Pair<T>> pairs_;
};

// ---- nearest neighbors
// --------------------------------------------------------------------------

// For each row all points that may be among its k nearest: whose computed cosine is no more than
// 2·error below the k-th greatest. If no computed cosine is off by more than `error`, the true k
// nearest are among them. A row with too many is given up, and scanned anew in double.
template <class T>
class Candidates {
 public:
  Candidates(int64_t rows, int64_t k, T error)
      : k_(k),
        room_(2 * k + 6),
        margin_(2 * error),
        threshold_(rows),
        count_(rows),
        value_(rows * (room_ + 1)),
        index_(rows * (room_ + 1)) {
    std::fill_n(threshold_.get(), rows, -kInfinity);
    std::fill_n(count_.get(), rows, 0);
  }

  const T* thresholds() const { return threshold_.get(); }
  bool given_up(int64_t i) const { return threshold_[i] == kInfinity; }
  int64_t count(int64_t i) const { return count_[i]; }
  const int64_t* indices(int64_t i) const { return index_.get() + i * (room_ + 1); }

  void offer(int64_t i, T cosine, int64_t j) const {
    if (!(cosine >= threshold_[i])) return;
    T* value = value_.get() + i * (room_ + 1);
    int64_t* index = index_.get() + i * (room_ + 1);
    int64_t at = count_[i]++;
    for (; at > 0 && value[at - 1] < cosine; --at) {
      value[at] = value[at - 1];
      index[at] = index[at - 1];
    }
    value[at] = cosine;
    index[at] = j;
    if (count_[i] < k_) return;
    threshold_[i] = value[k_ - 1] - margin_;
    while (value[count_[i] - 1] < threshold_[i]) --count_[i];
    if (count_[i] > room_) threshold_[i] = kInfinity;
  }

 private:
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();
  int64_t k_, room_;
  T margin_;
  Buffer<T> threshold_;
  Buffer<int32_t> count_;
  Buffer<T> value_;
  Buffer<int64_t> index_;
};

// What the tiles' cosines may be off by. Each coordinate of a unit vector is off by at most 2u
// relative (the inverse norm's rounding and the product's), and a sum of D products, in any order,
// by D·u of Σ|x̂_d·ŷ_d| ≤ 1; what is left is for terms of higher order and vectors a little too
// long.
template <class T>
T cosine_error(int64_t dim) {
  return T(double(dim + 8) * double(std::numeric_limits<T>::epsilon()) / 2);
}

// The best of a row's points: by cosines rounded to T, the lowest index first among equals.
template <class T>
struct Neighbor {
  T cosine;
  int64_t index;
  double square;
  bool operator<(const Neighbor& other) const {
    return cosine != other.cosine ? cosine > other.cosine : index < other.index;
  }
};

// The search by products of bfloat16, where the CPU has them. They tell which pairs cannot be among
// the nearest: a product of rounded unit vectors a and b is off from x̂·ŷ by no more than
// ρ_x + ‖a‖·ρ_y, where ρ_x = ‖x̂ − a‖ and ρ_y = ‖ŷ − b‖, and by what the sum in float32 loses. The
// cosines of the few other pairs are taken in double.
class Skim {
 public:
  // Blocks have at most so many rows and columns.
  Skim(const Problem& p, const Runtime& runtime, const Loops<float>& loops,
       const Candidates<float>& candidates, int64_t rows, int64_t columns)
      : p_(p),
        y_(p.y ? *p.y : p.x),
        loops_(loops),
        candidates_(candidates),
        dim_(p.x.rows.cols),
        error_(p.x.rows.rows) {
    for (int t = 0; t < runtime.threads; ++t) scratch_.emplace_back(p, y_, loops, rows, columns);
    const double most_x = residuals(p.x, runtime, error_.get());
    const double most_y = p.y ? residuals(y_, runtime, nullptr) : most_x;
    const double sum = cosine_error<float>(dim_) * (1 + most_y);
    for (int64_t i = 0; i < p.x.rows.rows; ++i) {
      error_[i] = float((error_[i] + (1 + error_[i]) * (most_y + sum)) * (1 + 0x1p-20));
    }
  }

  // Offers the near pairs of two blocks. False, and nothing done, where products of float32 are the
  // better way: as long as some point knows too few others, or if too many pairs are near.
  bool operator()(int thread, Range rows, Range columns, float* cosines) {
    Scratch& s = scratch_[thread];
    if (s.rest > 0) return --s.rest, false;
    const int64_t n = columns.size(), stride = padded<float>(n);
    if (!lower(rows, s.row_least.get())) return false;
    float* column_least = p_.y ? nullptr : s.column_least.get();
    if (column_least && !lower(columns, column_least)) return false;
    round(p_.x, rows, s.row_units.get());
    round(y_, columns, s.column_units.get());
    s.packed.fill(s.column_units.get(), dim_, n, 1, dim_);
    multiply(rows.size(), s.row_units.get(), dim_, s.packed, cosines, stride, false);
    int64_t near = 0;
    for (int64_t i = 0; i < rows.size(); ++i) {
      near += loops_.count_reaching(cosines + i * stride, s.row_least[i], column_least, n);
    }
    if (near > rows.size() * n / kFew) {
      s.patience = s.rest = std::min(2 * s.patience + 1, kRest);
      return false;
    }
    s.patience = 0;
    for (int64_t i = 0; near > 0 && i < rows.size(); ++i) {
      const float* row = cosines + i * stride;
      const int64_t x = rows.begin + i;
      const float* point = nullptr;
      int64_t j = 0;
      while ((j = loops_.first_reaching(row, s.row_least[i], column_least, j, n)) < n) {
        for (const int64_t end = std::min(j + kChunk, n); j < end; ++j) {
          if (row[j] < s.row_least[i] && !(column_least && row[j] >= column_least[j])) continue;
          const int64_t y = columns.begin + j;
          if (!point) point = s.from_x.row(x);
          const auto cosine = float(loops_.dot_double(point, s.from_y.row(y), dim_) *
                                    p_.x.inverse[x] * y_.inverse[y]);
          candidates_.offer(x, cosine, y);
          if (!p_.y) candidates_.offer(y, cosine, x);
        }
      }
    }
    return true;
  }

 private:
  // Of so many pairs one may be near: its cosine costs as much as several tens in a product.
  static constexpr int64_t kFew = 32;
  // Pairs of blocks without a try after a vain one, at most.
  static constexpr int kRest = 15;

  struct Scratch {
    Scratch(const Problem& p, const Points& y, const Loops<float>& loops, int64_t rows,
            int64_t columns)
        : from_x(p.x, loops),
          from_y(y, loops),
          row_units(rows * p.x.rows.cols),
          column_units(columns * p.x.rows.cols),
          packed(p.x.rows.cols, columns),
          row_least(rows),
          column_least(columns) {}
    Reader<float> from_x, from_y;
    Buffer<uint16_t> row_units, column_units;
    Packed<uint16_t> packed;
    Buffer<float> row_least, column_least;
    int rest = 0, patience = 0;
  };

  // ρ of each point, if asked for; the greatest of them.
  double residuals(const Points& points, const Runtime& runtime, float* each) const {
    const int64_t n = points.rows.rows, tasks = std::min<int64_t>(n, runtime.threads);
    std::vector<double> most(tasks, 0);
    runtime.parallel(int(tasks), [&](int task) {
      const Reader<float> reader(points, loops_);
      Buffer<uint16_t> rounded(dim_);
      const Range range = part_of(n, tasks, task);
      for (int64_t i = range.begin; i < range.end; ++i) {
        const float* row = reader.row(i);
        loops_.round(row, float(points.inverse[i]), rounded.get(), dim_);
        const double rho = std::sqrt(loops_.residual(row, points.inverse[i], rounded.get(), dim_));
        if (each) each[i] = float(rho);
        most[task] = std::max(most[task], rho);
      }
    });
    return *std::max_element(most.begin(), most.end());
  }

  void round(const Points& points, Range range, uint16_t* units) const {
    const Reader<float> reader(points, loops_);
    for (int64_t i = range.begin; i < range.end; ++i) {
      loops_.round(reader.row(i), float(points.inverse[i]), units + (i - range.begin) * dim_, dim_);
    }
  }

  // The least products that points of x must look at; false if one of them must look at all.
  bool lower(Range range, float* least) const {
    for (int64_t i = range.begin; i < range.end; ++i) {
      const float threshold = candidates_.thresholds()[i];
      if (threshold == -std::numeric_limits<float>::infinity()) return false;
      least[i - range.begin] = threshold - error_[i];
    }
    return true;
  }

  const Problem& p_;
  const Points& y_;
  const Loops<float>& loops_;
  const Candidates<float>& candidates_;
  int64_t dim_;
  Buffer<float> error_;  // of a point's products
  std::vector<Scratch> scratch_;
};

template <class T>
void search(const Problem& p, const Runtime& runtime, const Loops<T>& loops,
            const Candidates<T>& candidates) {
  const bool symmetric = p.y == nullptr;
  const auto visit = [&](int, const Tile<T>& tile) {
    const int64_t n = tile.columns.size();
    const T* columns = symmetric ? candidates.thresholds() + tile.columns.begin : nullptr;
    for (int64_t i = 0; i < tile.rows.size(); ++i) {
      const T* row = tile.cosines + i * tile.stride;
      const int64_t x = tile.rows.begin + i;
      int64_t j = tile.diagonal ? i + 1 : 0;
      while ((j = loops.first_reaching(row, candidates.thresholds()[x], columns, j, n)) < n) {
        for (const int64_t end = std::min(j + kChunk, n); j < end; ++j) {
          candidates.offer(x, row[j], tile.columns.begin + j);
          if (symmetric) candidates.offer(tile.columns.begin + j, row[j], x);
        }
      }
    }
  };
  if constexpr (std::is_same_v<T, float>) {
    if (has_bf16_products()) {
      const Tiles<T> tiles(p, runtime, loops, 6);
      return tiles.run(
          visit, Skim(p, runtime, loops, candidates, tiles.most_rows(), tiles.most_columns()));
    }
  }
  Tiles<T>(p, runtime, loops).run(visit);
}

}  // namespace

template <class T>
int64_t inverse_norms(const Rows& rows, const Runtime& runtime, double* inverse) {
  const Loops<T>& loops = SYNFACE_PICK(loops<T>);
  for_rows(runtime, rows.rows, [&](Range range) {
    const Points points{rows, nullptr};
    const Reader<T> reader(points, loops);
    for (int64_t i = range.begin; i < range.end; ++i) {
      const T* row = reader.row(i);
      inverse[i] = 1 / std::sqrt(loops.dot_double(row, row, rows.cols));
    }
  });
  for (int64_t i = 0; i < rows.rows; ++i) {
    if (!(inverse[i] < 1 / kNormMin && inverse[i] >= 1 / kNormMax)) return i;
  }
  return -1;
}

template <class T>
double pairs(const Problem& p, const Potential& potential, const Runtime& runtime, T* grad_x,
             T* grad_y) {
  return PairSum<T>(p, potential, runtime, grad_x, grad_y).run();
}

template <class T>
void nearest(const Problem& p, int64_t k, const Runtime& runtime, double* square, int64_t* index) {
  const Loops<T>& loops = SYNFACE_PICK(loops<T>);
  const int64_t n = p.x.rows.rows, others = p.y ? p.y->rows.rows : n;
  const Candidates<T> candidates(n, k, cosine_error<T>(p.x.rows.cols));
  search(p, runtime, loops, candidates);
  for_rows(runtime, n, [&](Range range) {
    const Pair<T> pair(p, loops);
    std::vector<Neighbor<T>> best;
    for (int64_t i = range.begin; i < range.end; ++i) {
      best.clear();
      const auto consider = [&](int64_t j) {
        const double r2 = pair.square(i, j);
        const Neighbor<T> neighbor{T(1 - r2 / 2), j, r2};
        if (int64_t(best.size()) == k && !(neighbor < best.back())) return;
        if (int64_t(best.size()) == k) best.pop_back();
        best.insert(std::upper_bound(best.begin(), best.end(), neighbor), neighbor);
      };
      if (candidates.given_up(i)) {
        for (int64_t j = 0; j < others; ++j) {
          if (p.y || j != i) consider(j);
        }
      } else {
        for (int64_t c = 0; c < candidates.count(i); ++c) consider(candidates.indices(i)[c]);
      }
      for (int64_t c = 0; c < k; ++c) {
        square[i * k + c] = best[c].square;
        index[i * k + c] = best[c].index;
      }
    }
  });
}

template <class T>
void nearest_backward(const Problem& p, int64_t k, const int64_t* index, const double* grad_square,
                      double r_min, const Runtime& runtime, void* grad_x, void* grad_y) {
  const Loops<T>& loops = SYNFACE_PICK(loops<T>);
  const int64_t n = p.x.rows.rows, dim = p.x.rows.cols;
  const Points& y = p.y ? *p.y : p.x;
  // For each point the pairs in which it is the neighbor, in order.
  std::vector<int64_t> begin(y.rows.rows + 1, 0), chosen_by(n * k);
  for (int64_t pair = 0; pair < n * k; ++pair) ++begin[index[pair] + 1];
  for (int64_t j = 0; j < y.rows.rows; ++j) begin[j + 1] += begin[j];
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  for (int64_t pair = 0; pair < n * k; ++pair) chosen_by[next[index[pair]]++] = pair;

  const auto gradients = [&](const Points& points, bool as_x, bool as_y, void* out) {
    for_rows(runtime, points.rows.rows, [&](Range range) {
      const Pair<T> pair(p, loops);
      const Reader<T> reader(points, loops);
      Buffer<double> sum(dim);
      Buffer<T> result(dim);
      const auto add = [&](int64_t which, double sign) {
        if (grad_square[which] == 0) return;
        pair.apart(which / k, index[which], r_min);
        loops.add_double(sum.get(), 2 * sign * grad_square[which], pair.direction(), dim);
      };
      for (int64_t i = range.begin; i < range.end; ++i) {
        std::fill_n(sum.get(), dim, 0.0);
        if (as_x) {
          for (int64_t c = 0; c < k; ++c) add(i * k + c, 1);
        }
        if (as_y) {
          for (int64_t c = begin[i]; c < begin[i + 1]; ++c) add(chosen_by[c], -1);
        }
        const double inverse = points.inverse[i];
        loops.project_double(sum.get(), reader.row(i), inverse, inverse, result.get(), dim);
        void* to = static_cast<char*>(out) + size_t(i * dim) * bytes(points.rows.dtype);
        loops.store(result.get(), to, points.rows.dtype, dim);
      }
    });
  };
  if (grad_x) gradients(p.x, true, p.y == nullptr, grad_x);
  if (grad_y) gradients(y, false, true, grad_y);
}

#define SYNFACE_INSTANTIATE(T)                                                              \
  template int64_t inverse_norms<T>(const Rows&, const Runtime&, double*);                  \
  template double pairs<T>(const Problem&, const Potential&, const Runtime&, T*, T*);       \
  template void nearest<T>(const Problem&, int64_t, const Runtime&, double*, int64_t*);     \
  template void nearest_backward<T>(const Problem&, int64_t, const int64_t*, const double*, \
                                    double, const Runtime&, void*, void*);
SYNFACE_INSTANTIATE(float)
SYNFACE_INSTANTIATE(double)

}  // namespace synface::hypersphere_repulsion
