// Nearest neighbors, and the gradients of their squared distances. A part of cpu.cpp.
#pragma once

#include "hypersphere_repulsion/cpu_tiles.h"

namespace synface::hypersphere_repulsion {
namespace {

constexpr int64_t kExtra = 6;  // candidates of a row above 2·k

// Candidates for each row's k nearest points: those whose computed cosine is at most 2·error below
// the k-th greatest. If no computed cosine is off by more than `error`, the true k nearest are
// among them. A row with too many candidates is given up, see search_again.
template <class T>
class Candidates {
 public:
  Candidates(int64_t rows, int64_t k, T error, int64_t extra = kExtra)
      : k_(k),
        room_(2 * k + extra),
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

// Error bound of the tiles' cosines. Each coordinate of a unit vector has a relative error of at
// most 2u (the rounding of the inverse norm and of the multiplication), and a dot product of D
// terms, in any order, an error of D·u·Σ|x̂_d·ŷ_d| ≤ D·u; the rest covers terms of higher order and
// vectors slightly longer than 1.
template <class T>
T cosine_error(int64_t dim) {
  return T(double(dim + 8) * double(std::numeric_limits<T>::epsilon()) / 2);
}

// A candidate's distance. Neighbors are ordered by cosines rounded to T, then by index.
template <class T>
struct Neighbor {
  T cosine;
  int64_t index;
  double square;
  bool operator<(const Neighbor& other) const {
    return cosine != other.cosine ? cosine > other.cosine : index < other.index;
  }
};

// A bf16 GEMM that excludes pairs which cannot be among the nearest, where the CPU has one: the dot
// product of rounded unit vectors a and b differs from x̂·ŷ by at most ρ_x + ‖a‖·ρ_y, where
// ρ_x = ‖x̂ − a‖ and ρ_y = ‖ŷ − b‖, plus the rounding error of the float32 sum. The cosines of the
// few other pairs are computed in double.
class Bf16Prefilter {
 public:
  // Blocks have at most this many rows and columns.
  Bf16Prefilter(const Problem& p, const Runtime& runtime, const SimdKernels<float>& simd,
                const Candidates<float>& candidates, int64_t rows, int64_t columns)
      : p_(p),
        y_(p.y ? *p.y : p.x),
        simd_(simd),
        candidates_(candidates),
        dim_(p.x.rows.cols),
        error_(p.x.rows.rows) {
    for (int t = 0; t < runtime.threads; ++t) scratch_.emplace_back(p, y_, simd, rows, columns);
    const double most_x = residuals(p.x, runtime, error_.get());
    const double most_y = p.y ? residuals(y_, runtime, nullptr) : most_x;
    const double sum = cosine_error<float>(dim_) * (1 + most_y);
    for (int64_t i = 0; i < p.x.rows.rows; ++i) {
      error_[i] = float((error_[i] + (1 + error_[i]) * (most_y + sum)) * (1 + 0x1p-20));
    }
  }

  // Both blocks' points in bfloat16, and one block's packed.
  static ScratchBytes scratch_bytes(const Problem& p) {
    return {.point = 3 * p.x.rows.cols * operand_bytes<uint16_t>};
  }

  // Offers the near pairs of two blocks to the candidates. Returns false, having done nothing,
  // where the float32 GEMM is cheaper: while some point has fewer than k candidates, or if too many
  // pairs are near.
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
    multiply(rows.size(), Left<uint16_t>{s.row_units.get(), dim_}, s.packed,
             {.data = cosines, .stride = stride});
    int64_t near = 0;
    for (int64_t i = 0; i < rows.size(); ++i) {
      near += simd_.count_reaching(cosines + i * stride, s.row_least[i], column_least, n);
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
      while ((j = simd_.first_reaching(row, s.row_least[i], column_least, j, n)) < n) {
        for (const int64_t end = std::min(j + kChunk, n); j < end; ++j) {
          if (row[j] < s.row_least[i] && !(column_least && row[j] >= column_least[j])) continue;
          const int64_t y = columns.begin + j;
          if (!point) point = s.from_x.row(x);
          const auto cosine = float(simd_.dot_double(point, s.from_y.row(y), dim_) *
                                    p_.x.inverse[x] * y_.inverse[y]);
          candidates_.offer(x, cosine, y);
          if (!p_.y) candidates_.offer(y, cosine, x);
        }
      }
    }
    return true;
  }

 private:
  // At most one of this many pairs may be near: its cosine costs as much as several tens in a GEMM.
  static constexpr int64_t kFew = 32;
  // Most pairs of blocks skipped after the prefilter was of no use.
  static constexpr int kRest = 15;

  struct Scratch {
    Scratch(const Problem& p, const Points& y, const SimdKernels<float>& simd, int64_t rows,
            int64_t columns)
        : from_x(p.x.rows, simd.load),
          from_y(y.rows, simd.load),
          row_units(rows * p.x.rows.cols),
          column_units(columns * p.x.rows.cols),
          packed(p.x.rows.cols, columns),
          row_least(rows),
          column_least(columns) {}
    RowReader<float> from_x, from_y;
    Buffer<uint16_t> row_units, column_units;
    Packed<uint16_t> packed;
    Buffer<float> row_least, column_least;
    int rest = 0, patience = 0;
  };

  // Writes each point's ρ unless `each` is null; returns the greatest.
  double residuals(const Points& points, const Runtime& runtime, float* each) const {
    const int64_t n = points.rows.rows, tasks = std::min<int64_t>(n, runtime.threads);
    std::vector<double> most(tasks, 0);
    runtime.parallel(int(tasks), [&](int task) {
      const RowReader<float> reader(points.rows, simd_.load);
      Buffer<uint16_t> rounded(dim_);
      const Range range = part_of(n, tasks, task);
      for (int64_t i = range.begin; i < range.end; ++i) {
        const float* row = reader.row(i);
        simd_.round(row, float(points.inverse[i]), rounded.get(), dim_);
        const double rho = std::sqrt(simd_.residual(row, points.inverse[i], rounded.get(), dim_));
        if (each) each[i] = float(rho);
        most[task] = std::max(most[task], rho);
      }
    });
    return *std::max_element(most.begin(), most.end());
  }

  void round(const Points& points, Range range, uint16_t* units) const {
    const RowReader<float> reader(points.rows, simd_.load);
    for (int64_t i = range.begin; i < range.end; ++i) {
      simd_.round(reader.row(i), float(points.inverse[i]), units + (i - range.begin) * dim_, dim_);
    }
  }

  // Writes the least bf16 dot product at which each point's pairs must be examined; returns false
  // if a point has fewer than k candidates yet.
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
  const SimdKernels<float>& simd_;
  const Candidates<float>& candidates_;
  int64_t dim_;
  Buffer<float> error_;  // bound of each point's bf16 dot products
  std::vector<Scratch> scratch_;
};

// Offers all pairs to the candidates.
template <class T>
void search(const Problem& p, const Runtime& runtime, const SimdKernels<T>& simd,
            const Candidates<T>& candidates) {
  const bool symmetric = p.y == nullptr;
  const auto visit = [&](int, const Tile<T, T>& tile) {
    const int64_t n = tile.columns.size();
    const T* columns = symmetric ? candidates.thresholds() + tile.columns.begin : nullptr;
    for (int64_t i = 0; i < tile.rows.size(); ++i) {
      const T* row = tile.cosines + i * tile.stride;
      const int64_t x = tile.rows.begin + i;
      int64_t j = tile.diagonal ? i + 1 : 0;
      while ((j = simd.first_reaching(row, candidates.thresholds()[x], columns, j, n)) < n) {
        for (const int64_t end = std::min(j + kChunk, n); j < end; ++j) {
          candidates.offer(x, row[j], tile.columns.begin + j);
          if (symmetric) candidates.offer(tile.columns.begin + j, row[j], x);
        }
      }
    }
  };
  if constexpr (std::is_same_v<T, float>) {
    if (has_bf16_gemm()) {
      const Tiles<T> tiles(p, runtime, simd, Bf16Prefilter::scratch_bytes(p));
      return tiles.run(visit, Bf16Prefilter(p, runtime, simd, candidates, tiles.most_rows(),
                                            tiles.most_columns()));
    }
  }
  Tiles<T>(p, runtime, simd).run(visit);
}

// The k nearest of a row among candidates, by the cosines of double precision.
template <class T>
class Best {
 public:
  Best(const Pair<T>& pair, int64_t k) : pair_(pair), k_(k) {}

  void begin(int64_t row) {
    row_ = row;
    found_.clear();
  }
  void consider(int64_t j) {
    const double r2 = pair_.square(row_, j);
    const Neighbor<T> neighbor{T(1 - r2 / 2), j, r2};
    if (int64_t(found_.size()) == k_ && !(neighbor < found_.back())) return;
    if (int64_t(found_.size()) == k_) found_.pop_back();
    found_.insert(std::upper_bound(found_.begin(), found_.end(), neighbor), neighbor);
  }
  void write(const Neighbors& out) const {
    for (int64_t c = 0; c < k_; ++c) {
      out.square[row_ * k_ + c] = found_[c].square;
      out.index[row_ * k_ + c] = found_[c].index;
    }
  }

 private:
  const Pair<T>& pair_;
  int64_t k_, row_ = 0;
  std::vector<Neighbor<T>> found_;
};

// Memory limit of given-up rows searched together, copied and with their candidates; 16 at least.
constexpr int64_t kRetryBytes = int64_t(16) << 20;
// Candidates of a given-up row: a code of quadratic phases has hundreds of equally near points.
constexpr int64_t kRetryExtra = 1000;
// Rows of a block: few, so that all threads have one.
constexpr int64_t kRetryBlock = 24;

// Searches given-up rows again, by a GEMM in double: in a packing every point has hundreds of
// neighbors that are nearly equally near. Rows with still more are compared pair by pair.
template <class T>
void search_again(const Problem& p, const std::vector<int64_t>& rows, int64_t k,
                  const Runtime& runtime, const SimdKernels<T>& simd, const Neighbors& out) {
  const SimdKernels<double>& simd_double = SYNFACE_DISPATCH(simd_kernels<double>);
  const Points& y = p.y ? *p.y : p.x;
  const int64_t dim = p.x.rows.cols, others = y.rows.rows;
  const int64_t extra = std::min(kRetryExtra, others);
  const int64_t row_bytes = 8 * dim + 16 * (2 * k + extra);
  const int64_t together =  // enough for the GEMM, few enough to be copied
      std::min<int64_t>(std::max<int64_t>(kRetryBytes / row_bytes, 16), rows.size());
  // Neighbors are equal if their cosines round to one T.
  const double error = cosine_error<double>(dim) + double(std::numeric_limits<T>::epsilon()) / 2;
  Buffer<double> copies(together * dim), inverse(together);
  for (int64_t begin = 0; begin < int64_t(rows.size()); begin += together) {
    const int64_t n = std::min<int64_t>(together, rows.size() - begin);
    for_rows(runtime, n, [&](Range range) {
      const RowReader<T> reader(p.x.rows, simd.load);
      for (int64_t i = range.begin; i < range.end; ++i) {
        const T* row = reader.row(rows[begin + i]);
        std::copy_n(row, dim, copies.get() + i * dim);
        inverse[i] = p.x.inverse[rows[begin + i]];
      }
    });
    const Points chunk{
        .rows = {.data = copies.get(), .dtype = Dtype::f64, .rows = n, .cols = dim, .stride = dim},
        .inverse = inverse.get()};
    const Candidates<double> candidates(n, k, error, extra);
    const auto visit = [&](int, const Tile<double, double>& tile) {
      const int64_t columns = tile.columns.size();
      for (int64_t i = 0; i < tile.rows.size(); ++i) {
        const double* row = tile.cosines + i * tile.stride;
        const int64_t x = tile.rows.begin + i, own = p.y ? -1 : rows[begin + x];
        int64_t j = 0;
        while ((j = simd_double.first_reaching(row, candidates.thresholds()[x], nullptr, j,
                                               columns)) < columns) {
          for (const int64_t end = std::min(j + kChunk, columns); j < end; ++j) {
            if (tile.columns.begin + j != own) candidates.offer(x, row[j], tile.columns.begin + j);
          }
        }
      }
    };
    const Problem again{chunk, &y};
    Tiles<double>(again, runtime, simd_double, {}, kRetryBlock).run(visit);
    for_rows(runtime, n, [&](Range range) {
      const Pair<T> pair(p, simd);
      Best<T> best(pair, k);
      for (int64_t i = range.begin; i < range.end; ++i) {
        const int64_t row = rows[begin + i];
        best.begin(row);
        if (candidates.given_up(i)) {
          for (int64_t j = 0; j < others; ++j) {
            if (p.y || j != row) best.consider(j);
          }
        } else {
          for (int64_t c = 0; c < candidates.count(i); ++c) {
            best.consider(candidates.indices(i)[c]);
          }
        }
        best.write(out);
      }
    });
  }
}

}  // namespace

template <class T>
void nearest(const Problem& p, int64_t k, const Runtime& runtime, const Neighbors& out) {
  const SimdKernels<T>& simd = SYNFACE_DISPATCH(simd_kernels<T>);
  const int64_t n = p.x.rows.rows;
  if (n == 0) return;  // the greatest residual of no point is undefined
  const Candidates<T> candidates(n, k, cosine_error<T>(p.x.rows.cols));
  search(p, runtime, simd, candidates);
  for_rows(runtime, n, [&](Range range) {
    const Pair<T> pair(p, simd);
    Best<T> best(pair, k);
    for (int64_t i = range.begin; i < range.end; ++i) {
      if (candidates.given_up(i)) continue;
      best.begin(i);
      for (int64_t c = 0; c < candidates.count(i); ++c) best.consider(candidates.indices(i)[c]);
      best.write(out);
    }
  });
  std::vector<int64_t> given_up;
  for (int64_t i = 0; i < n; ++i) {
    if (candidates.given_up(i)) given_up.push_back(i);
  }
  search_again(p, given_up, k, runtime, simd, out);
}

template <class T>
void nearest_backward(const Problem& p, const NearestUpstream& from, const Runtime& runtime,
                      const Gradients<void>& to) {
  const SimdKernels<T>& simd = SYNFACE_DISPATCH(simd_kernels<T>);
  const int64_t n = p.x.rows.rows, dim = p.x.rows.cols, k = from.k;
  const int64_t* index = from.index;
  const Points& y = p.y ? *p.y : p.x;
  // Pairs in which a point is the neighbor, grouped by that point, in order.
  std::vector<int64_t> begin(y.rows.rows + 1, 0), chosen_by(n * k);
  for (int64_t pair = 0; pair < n * k; ++pair) ++begin[index[pair] + 1];
  for (int64_t j = 0; j < y.rows.rows; ++j) begin[j + 1] += begin[j];
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  for (int64_t pair = 0; pair < n * k; ++pair) chosen_by[next[index[pair]]++] = pair;

  const auto gradients = [&](const Points& points, bool as_x, bool as_y, void* out) {
    for_rows(runtime, points.rows.rows, [&](Range range) {
      const Pair<T> pair(p, simd);
      const RowReader<T> reader(points.rows, simd.load);
      Buffer<double> sum(dim);
      Buffer<T> result(dim);
      const auto add = [&](int64_t which, double sign) {
        if (from.grad_square[which] == 0) return;
        pair.apart(which / k, index[which], from.r_min);
        simd.add_double(sum.get(), 2 * sign * from.grad_square[which], pair.direction(), dim);
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
        simd.project_double(sum.get(), reader.row(i), inverse, inverse, result.get(), dim);
        simd.store(result.get(),
                   static_cast<char*>(out) + size_t(i * dim) * bytes(points.rows.dtype),
                   points.rows.dtype, dim);
      }
    });
  };
  if (to.x) gradients(p.x, true, p.y == nullptr, to.x);
  if (to.y) gradients(y, false, true, to.y);
}

}  // namespace synface::hypersphere_repulsion
