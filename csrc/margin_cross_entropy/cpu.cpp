#include "margin_cross_entropy/cpu.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "gemm/gemm.h"
#include "memory.h"
#include "simd/scalar.h"

namespace synface::margin_cross_entropy {
namespace {

// A number as a sum of two.
template <class T>
struct Parts {
  explicit Parts(double x) : high(T(x)), low(T(x - double(high))) {}
  T high, low;
};

template <class T>
struct Loops {
  T (*dot)(const T* a, const T* b, int64_t n);
  double (*dot_double)(const T* a, const T* b, int64_t n);
  void (*axpy_scale)(T* y, T a, const T* x, T scale, int64_t n);
  void (*add_tangent)(T* y, double g, const T* a, double along, const T* b, int64_t n);
  void (*scale_each)(T* values, const T* high, const T* low, int64_t n);
  void (*cosines)(T* values, Parts<T> inverse, int64_t n);
  void (*greatest)(const T* values, T* most, int64_t n);
  void (*keep_greatest)(T* values, int64_t stride, int64_t sub_centers, T* best, int64_t n);
  void (*filter)(T* values, T limit, T* count, int64_t n);
  void (*add_scaled)(double* sum, double factor, const T* row, int64_t n);
  void (*exponentials)(T* values, T factor, T scale, const T* shift, T* sum, int64_t n);
  void (*probabilities)(const T* cosines, T scale, const T* lse, const T* coefficient, T* values,
                        int64_t n);
  void (*load)(const void* from, Dtype dtype, T* to, int64_t n);
  void (*store)(const T* from, void* to, Dtype dtype, int64_t n);
};

}  // namespace
}  // namespace synface::margin_cross_entropy

#define SYNFACE_ISA_SOURCE "margin_cross_entropy/cpu-inl.h"
#include "simd/foreach_isa.h"

namespace synface::margin_cross_entropy {
namespace {

// A tile of classes × a block of rows: large enough that the products run at full speed, small
// enough that their cosines stay in a core's cache. A class is a row of the tile: then the centers
// and the cosines are read as they lie, and the embeddings, packed once, serve every tile.
constexpr int64_t kTile = 512;
constexpr int64_t kBlock = 512;
// Rows of a tile whose exponentials are added up before the sum goes into a double.
constexpr int64_t kSummands = 16;
// What all threads' partial mean centers may take together.
constexpr int64_t kPartialBytes = int64_t(32) << 20;
constexpr int64_t kTasksPerThread = 4;
// Multiply-adds that are worth a task of their own, some tens of microseconds.
constexpr int64_t kTaskWork = int64_t(1) << 21;
constexpr double kNormMin = 1e-12;  // as in reference.py

// Centers are counted through the classes that take part: center c is of class c / M.
const void* center_at(const Problem& p, int64_t c) {
  const int64_t m = p.sub_centers;
  return row_at(p.weight, p.class_ids ? p.class_ids[c / m] * m + c % m : c);
}

// The width of a tile in classes.
int64_t tile_classes(const Problem& p, Range classes) {
  return std::min(std::max<int64_t>(1, kTile / p.sub_centers), classes.size());
}

// Before anything is read through them.
void check(const Problem& p) {
  const int64_t all = p.weight.rows / p.sub_centers;
  for (int64_t j = 0; p.class_ids && j < p.classes; ++j) {
    const int64_t id = p.class_ids[j];
    if (id < 0 || id >= all || (j > 0 && id <= p.class_ids[j - 1])) {
      throw std::out_of_range("class_ids must rise strictly in [0, " + std::to_string(all) +
                              "), got " + std::to_string(id) + " at " + std::to_string(j));
    }
  }
  for (int64_t i = 0; i < p.input.rows * p.labels_per_row; ++i) {
    if (p.labels[i] < -2 || p.labels[i] >= p.classes) {
      throw std::out_of_range("labels must be in [-2, " + std::to_string(p.classes) + "), got " +
                              std::to_string(p.labels[i]) + " in row " +
                              std::to_string(i / p.labels_per_row));
    }
  }
}

int64_t task_count(const Runtime& runtime, int64_t work) {
  return std::clamp<int64_t>(work / kTaskWork, 1, kTasksPerThread * runtime.threads);
}

// 1/norm from a sum of squares; 0 for a row that counts as zero, NaN for one that is not finite. In
// double: an error here would scale a whole row of cosines, but not its labels', which are computed
// apart.
double inverse_norm(double square) {
  const double norm = std::sqrt(square);
  if (norm <= kNormMin) return 0;
  return std::isfinite(norm) ? 1 / norm : std::numeric_limits<double>::quiet_NaN();
}

// Whether a row's squares, its products or, in float, its inverse norm may leave T's range.
bool is_long(double square) { return square > 0x1p200; }

// Multiplies a long row by a power of two, which is returned: 1 for one that is not finite.
template <class T>
double shorten(T* values, int64_t n) {
  double most = 0;
  for (int64_t i = 0; i < n; ++i) most = std::max(most, std::abs(double(values[i])));
  if (!std::isfinite(most)) return 1;
  const double shrink = std::ldexp(1.0, -std::min(std::ilogb(most), 1000));  // no subnormal
  for (int64_t i = 0; i < n; ++i) values[i] = T(values[i] * shrink);
  return shrink;
}

// The sum of squares of a row that is shortened first where it is long, by a factor that is set.
template <class T>
double square_norm(const Loops<T>& loops, T* values, int64_t n, double& shrink) {
  shrink = 1;
  const double square = loops.dot_double(values, values, n);
  if (!is_long(square)) return square;
  shrink = shorten(values, n);
  return loops.dot_double(values, values, n);
}

// Products are of T, or, where both matrices are bfloat16 and the CPU has instructions for it, of
// bfloat16 (uint16_t), with sums in float32. Then nothing is rounded before the product: the
// centers are what they are, and embeddings are scaled by powers of two.
bool multiplies_bf16(const Problem& p) {
  return p.input.dtype == Dtype::bf16 && p.weight.dtype == Dtype::bf16 && has_bf16_products();
}

// What products take: T, bfloat16 (uint16_t) with what a factor of T makes of it, or Halves.
template <class Operand>
constexpr bool is_bf16 = std::is_same_v<Operand, uint16_t>;
template <class Operand>
constexpr bool is_halves = std::is_same_v<Operand, Halves>;

// The rows that count, normalized, and where they came from. For products of bfloat16 also as
// `bits`, of which a unit vector is high + low times as much; for those of halves, as bits and
// rest.
template <class T>
struct Embeddings {
  template <class Operand>
  Embeddings(const Problem& p, const Loops<T>& loops, std::type_identity<Operand>)
      : dim(p.input.cols), unit(0), inverse(0), bits(0), rest(0), high(0), low(0) {
    const int64_t k = p.labels_per_row;
    for (int64_t i = 0; i < p.input.rows; ++i) {
      const int64_t* labels = p.labels + i * k;
      if (std::any_of(labels, labels + k, [](int64_t l) { return l != -1; })) source.push_back(i);
    }
    unit = Buffer<T>(count() * dim);
    inverse = Buffer<T>(count());
    constexpr bool bf16 = is_bf16<Operand>;
    if (bf16 || is_halves<Operand>) bits = Buffer<uint16_t>(count() * dim);
    if (is_halves<Operand>) rest = Buffer<uint16_t>(count() * dim);
    if (bf16) {
      high = Buffer<T>(count());
      low = Buffer<T>(count());
    }
    for (int64_t i = 0; i < count(); ++i) {
      T* to = unit.get() + i * dim;
      loops.load(row_at(p.input, source[i]), p.input.dtype, to, dim);
      double shrink;
      const double scale = inverse_norm(square_norm(loops, to, dim, shrink));
      if (bf16) set_bits(i, to, scale);
      for (int64_t d = 0; d < dim; ++d) to[d] = T(to[d] * scale);
      inverse[i] = T(scale * shrink);
      if constexpr (is_halves<Operand>) set_halves(i);
    }
  }
  int64_t count() const { return int64_t(source.size()); }
  const T* row(int64_t i) const { return unit.get() + i * dim; }
  template <class Operand>
  auto operand(int64_t i) const {
    if constexpr (is_halves<Operand>)
      return Halves{bits.get() + i * dim, rest.get() + i * dim};
    else if constexpr (is_bf16<Operand>)
      return static_cast<const uint16_t*>(bits.get() + i * dim);
    else
      return row(i);
  }
  void clear(int64_t i) const {
    std::fill_n(unit.get() + i * dim, dim, T(0));
    if (bits.get()) std::fill_n(bits.get() + i * dim, dim, uint16_t(0));
    if (rest.get()) std::fill_n(rest.get() + i * dim, dim, uint16_t(0));
    if (high.get()) high[i] = low[i] = T(0);
  }

  int64_t dim;
  std::vector<int64_t> source;
  Buffer<T> unit, inverse;
  Buffer<uint16_t> bits, rest;
  Buffer<T> high, low;

 private:
  void set_halves(int64_t i) const {
    for (const auto& [to, off] : {std::pair(bits.get(), false), std::pair(rest.get(), true)}) {
      narrow(row(i), 1, dim, dim, false, to + i * dim, dim, off);
    }
  }

  // With a norm in [½, 1). Zeros where the inverse norm is 0 or NaN, which `high` passes on.
  void set_bits(int64_t i, const T* values, double inverse) const {
    int exponent = 0;
    const bool counts = inverse > 0;
    if (counts) std::frexp(1 / inverse, &exponent);
    const double shrink = std::ldexp(1.0, -exponent);
    for (int64_t d = 0; d < dim; ++d) {
      bits[i * dim + d] = counts ? to_bf16(float(values[d] * shrink)) : 0;
    }
    const Parts<T> factor(std::ldexp(inverse, exponent));
    high[i] = factor.high;
    low[i] = counts ? factor.low : T(0);
  }
};

// Embeddings as right operands of products, a block of rows each.
template <class Operand, class T>
std::vector<Packed<Operand>> pack_blocks(const Embeddings<T>& x, Range rows, bool transposed) {
  std::vector<Packed<Operand>> blocks;
  for (int64_t r = rows.begin; r < rows.end; r += kBlock) {
    const int64_t n = std::min(kBlock, rows.end - r);
    const auto from = x.template operand<Operand>(r);
    blocks.push_back(transposed ? Packed<Operand>(x.dim, n) : Packed<Operand>(n, x.dim));
    if (transposed) {
      blocks.back().fill(from, x.dim, n, 1, x.dim);
    } else {
      blocks.back().fill(from, n, x.dim, x.dim, 1);
    }
  }
  return blocks;
}

// A tile of centers as T, with their inverse norms, and as operands: as they came, or normalized
// where these are halves. Centers that are T already, one after the other, are not copied, but in a
// tile where one of them is long: then it is shortened.
template <class T, class Operand>
class Centers {
 public:
  Centers(const Problem& p, const Loops<T>& loops, int64_t most)
      : p_(p),
        loops_(loops),
        most_(most),
        gathers_(p.class_ids || p.weight.dtype != dtype_of<T>),
        copy_(gathers_ ? most * p.weight.cols : 0),
        bits_copy_(is_halves<Operand> || (p.class_ids && is_bf16<Operand>) ? most * p.weight.cols
                                                                           : 0),
        rest_copy_(is_halves<Operand> ? most * p.weight.cols : 0),
        unit_(is_halves<Operand> ? p.weight.cols : 0),
        inverse_(most) {}

  void read(Range centers) {
    const int64_t dim = p_.weight.cols;
    size_ = centers.size();
    copied_ = gathers_;
    if (copied_) copy(centers);
    data_ = copied_ ? copy_.get() : static_cast<const T*>(center_at(p_, centers.begin));
    bool any_long = false;
    for (int64_t j = 0; j < size_; ++j) {
      const double square = loops_.dot_double(row(j), row(j), dim);
      inverse_[j] = inverse_norm(square);
      any_long |= is_long(square);
    }
    shrink_.assign(any_long ? size_ : 0, 1.0);
    if (any_long) shorten_long(centers);
    if constexpr (is_bf16<Operand>) {
      const bool copies = p_.class_ids || any_long;
      if (copies && !bits_copy_.get()) bits_copy_ = Buffer<uint16_t>(most_ * dim);
      for (int64_t j = 0; copies && j < size_; ++j) {
        uint16_t* to = bits_copy_.get() + j * dim;
        if (any_long) {
          for (int64_t d = 0; d < dim; ++d) to[d] = to_bf16(float(row(j)[d]));
        } else {
          std::memcpy(to, center_at(p_, centers.begin + j), dim * sizeof(uint16_t));
        }
      }
      bits_ =
          copies ? bits_copy_.get() : static_cast<const uint16_t*>(center_at(p_, centers.begin));
      bits_stride_ = copies ? dim : p_.weight.stride;
    }
    if constexpr (is_halves<Operand>) {
      for (int64_t j = 0; j < size_; ++j) {
        for (int64_t d = 0; d < dim; ++d) unit_[d] = T(row(j)[d] * inverse_[j]);
        narrow(unit_.get(), 1, dim, dim, false, bits_copy_.get() + j * dim, dim);
        narrow(unit_.get(), 1, dim, dim, false, rest_copy_.get() + j * dim, dim, true);
      }
    }
  }
  int64_t size() const { return size_; }
  int64_t stride() const { return copied_ ? p_.weight.cols : p_.weight.stride; }
  const T* row(int64_t j) const { return data_ + j * stride(); }
  double inverse(int64_t j) const { return inverse_[j]; }
  // What a row here is of the center as it came: 1 but for a long one.
  double shrink(int64_t j) const { return shrink_.empty() ? 1 : shrink_[j]; }
  auto operands() const {
    if constexpr (is_halves<Operand>)
      return Halves{bits_copy_.get(), rest_copy_.get()};
    else if constexpr (is_bf16<Operand>)
      return bits_;
    else
      return data_;
  }
  int64_t operand_stride() const {
    if constexpr (is_halves<Operand>)
      return p_.weight.cols;
    else if constexpr (is_bf16<Operand>)
      return bits_stride_;
    else
      return stride();
  }
  // What normalizes an operand.
  double factor(int64_t j) const { return is_halves<Operand> ? 1 : inverse_[j]; }

 private:
  void copy(Range centers) {
    const int64_t dim = p_.weight.cols;
    for (int64_t j = 0; j < size_; ++j) {
      loops_.load(center_at(p_, centers.begin + j), p_.weight.dtype, copy_.get() + j * dim, dim);
    }
  }
  void shorten_long(Range centers) {
    const int64_t dim = p_.weight.cols;
    if (!copied_) {
      if (!copy_.get()) copy_ = Buffer<T>(most_ * dim);
      copy(centers);
      copied_ = true;
      data_ = copy_.get();
    }
    for (int64_t j = 0; j < size_; ++j) {
      inverse_[j] = inverse_norm(square_norm(loops_, copy_.get() + j * dim, dim, shrink_[j]));
    }
  }

  const Problem& p_;
  const Loops<T>& loops_;
  int64_t most_;
  bool gathers_, copied_ = false;
  Buffer<T> copy_;
  Buffer<uint16_t> bits_copy_, rest_copy_;
  Buffer<T> unit_;
  Buffer<double> inverse_;
  const T* data_ = nullptr;
  const uint16_t* bits_ = nullptr;
  int64_t size_ = 0, bits_stride_ = 0;
  std::vector<double> shrink_;  // empty where no center is long
};

// The products of a tile of n centers × a block of `count` embeddings, by operands of T, of
// bfloat16, to which probabilities are rounded, or of halves.
template <class T, class Operand>
class Products {
 public:
  // The most centers and embeddings that there are in a tile.
  Products(const Embeddings<T>& x, const Loops<T>& loops, int64_t centers, int64_t embeddings)
      : x_(x), loops_(loops), bits_(0), rest_(0) {
    const int64_t room =
        std::max(centers * padded<uint16_t>(embeddings), embeddings * padded<uint16_t>(centers));
    if (kRounds) bits_ = Buffer<uint16_t>(room);
    if (is_halves<Operand>) rest_ = Buffer<uint16_t>(room);
  }

  void fill(const Centers<T, Operand>& centers, Packed<Operand>& packed) const {
    packed.fill(centers.operands(), centers.size(), x_.dim, centers.operand_stride(), 1);
  }

  // tile = centers × unit embeddings, from the r0-th on
  void of_centers(const Centers<T, Operand>& centers, const Packed<Operand>& embeddings, int64_t r0,
                  T* tile, int64_t stride) const {
    const int64_t n = centers.size();
    if constexpr (kRounds) {
      multiply(n, centers.operands(), centers.operand_stride(), embeddings, tile, stride, false);
      for (int64_t j = 0; is_bf16<Operand> && j < n; ++j) {
        loops_.scale_each(tile + j * stride, x_.high.get() + r0, x_.low.get() + r0, embeddings.n());
      }
    } else {
      multiply(n, Left<T>{centers.row(0), centers.stride(), 1}, embeddings, tile, stride, false);
    }
  }

  // sums += tileᵀ × packed centers
  void add_transposed(const T* tile, int64_t stride, int64_t count, const Packed<Operand>& packed,
                      T* sums) const {
    if constexpr (kRounds) {
      const int64_t row = padded<uint16_t>(packed.k());
      multiply(count, rounded(tile, packed.k(), count, stride, true, row), row, packed, sums,
               x_.dim, true);
    } else {
      multiply(count, Left<T>{tile, 1, stride}, packed, sums, x_.dim, true);
    }
  }

  // sums (+)= tile × packed embeddings
  void add(const T* tile, int64_t stride, int64_t n, const Packed<Operand>& packed, T* sums,
           bool accumulate) const {
    if constexpr (kRounds) {
      const int64_t row = padded<uint16_t>(packed.k());
      multiply(n, rounded(tile, n, packed.k(), stride, false, row), row, packed, sums, x_.dim,
               accumulate);
    } else {
      multiply(n, Left<T>{tile, stride, 1}, packed, sums, x_.dim, accumulate);
    }
  }

 private:
  static constexpr bool kRounds = !std::is_same_v<T, Operand>;

  auto rounded(const T* tile, int64_t m, int64_t n, int64_t stride, bool transposed,
               int64_t row) const {
    narrow(tile, m, n, stride, transposed, bits_.get(), row);
    if constexpr (is_halves<Operand>) {
      narrow(tile, m, n, stride, transposed, rest_.get(), row, true);
      return Halves{bits_.get(), rest_.get()};
    } else {
      return static_cast<const uint16_t*>(bits_.get());
    }
  }

  const Embeddings<T>& x_;
  const Loops<T>& loops_;
  Buffer<uint16_t> bits_, rest_;
};

// The classes of a tile that are labels of a row: position in the tile and in the row's labels.
template <class F>
void for_labels_in(const int64_t* labels, int64_t k, Range classes, F&& visit) {
  for (int64_t l = 0; l < k; ++l) {
    if (labels[l] >= classes.begin && labels[l] < classes.end) visit(labels[l] - classes.begin, l);
  }
}

// A tile of cosines, a row for each center and a column for each embedding: −∞ where the center is
// no negative of the embedding. So is a label's, one that another of its class outdoes, and one
// over the limit; whoever reads a tile knows nothing of these.
template <class T, class Operand>
class Negatives {
 public:
  Negatives(const Problem& p, const Loops<T>& loops, const Embeddings<T>& x,
            const Products<T, Operand>& products, int64_t centers, int64_t rows)
      : p_(p),
        loops_(loops),
        x_(x),
        products_(products),
        stride_(padded<T>(rows)),
        tile_(centers * stride_),
        best_(stride_),
        filtered_(stride_) {}

  void fill(const Centers<T, Operand>& centers, Range classes, const Packed<Operand>& block,
            Range rows) {
    const int64_t count = rows.size(), m = p_.sub_centers, k = p_.labels_per_row;
    products_.of_centers(centers, block, rows.begin, tile_.get(), stride_);
    for (int64_t j = 0; j < centers.size(); ++j) {
      loops_.cosines(row(j), Parts<T>(centers.factor(j)), count);
    }
    for (int64_t j = 0; m > 1 && j < centers.size(); j += m) {
      loops_.keep_greatest(row(j), stride_, m, best_.get(), count);
    }
    for (int64_t i = 0; i < count; ++i) {
      for_labels_in(p_.labels + x_.source[rows.begin + i] * k, k, classes, [&](int64_t j, int64_t) {
        for (int64_t s = 0; s < m; ++s) row(j * m + s)[i] = -std::numeric_limits<T>::infinity();
      });
    }
    if (p_.limit == std::numeric_limits<double>::infinity()) return;
    std::fill_n(filtered_.get(), count, T(0));
    for (int64_t j = 0; j < centers.size(); ++j) {
      loops_.filter(row(j), T(p_.limit), filtered_.get(), count);
    }
  }
  int64_t stride() const { return stride_; }
  T* row(int64_t j) const { return tile_.get() + j * stride_; }
  const T* filtered() const { return filtered_.get(); }

 private:
  const Problem& p_;
  const Loops<T>& loops_;
  const Embeddings<T>& x_;
  const Products<T, Operand>& products_;
  int64_t stride_;
  Buffer<T> tile_, best_, filtered_;
};

// What one thread knows of its rows after its classes: the greatest cosine, Σ e^{s·(cos − max)},
// Σ e^{…}·ŵ, how many classes were filtered; and Σ ŵ.
template <class T>
struct Partial {
  Partial(int64_t rows, int64_t dim, bool centers, bool filters, bool sums)
      : most(rows, -std::numeric_limits<T>::infinity()),
        sum(rows, 0.0),
        mean(0),
        filtered(filters ? rows : 0, 0.0),
        center_sum(sums ? dim : 0, 0.0) {
    if (centers) {
      mean = Buffer<T>(rows * dim);
      std::fill_n(mean.get(), rows * dim, T(0));
    }
  }
  std::vector<T> most;
  std::vector<double> sum;
  Buffer<T> mean;
  std::vector<double> filtered, center_sum;
};

template <class T, class Operand>
void scan_classes(const Problem& p, const Loops<T>& loops, const Embeddings<T>& x, Range rows,
                  const std::vector<Packed<Operand>>& blocks, Range classes, const Kept<T>& kept,
                  Partial<T>& partial) {
  const int64_t dim = x.dim, m = p.sub_centers;
  const T scale = T(p.scale), infinity = std::numeric_limits<T>::infinity();
  const int64_t width = tile_classes(p, classes);
  const int64_t height = std::min(kBlock, rows.size());
  const Products<T, Operand> products(x, loops, width * m, height);
  Negatives<T, Operand> tile(p, loops, x, products, width * m, height);
  const int64_t stride = tile.stride();
  Buffer<T> most(stride), shift(stride), sum(stride);
  Centers<T, Operand> centers(p, loops, width * m);
  Packed<Operand> packed(partial.mean.get() ? width * m : 0, dim);
  for (int64_t c0 = classes.begin; c0 < classes.end; c0 += width) {
    const Range own{c0, std::min(c0 + width, classes.end)};
    centers.read({own.begin * m, own.end * m});
    const int64_t n = centers.size();
    if (partial.mean.get()) products.fill(centers, packed);
    for (int64_t j = 0; !partial.center_sum.empty() && j < n; ++j) {
      loops.add_scaled(partial.center_sum.data(), centers.inverse(j), centers.row(j), dim);
    }
    for (int64_t r0 = rows.begin, block = 0; r0 < rows.end; r0 += kBlock, ++block) {
      const int64_t count = std::min(kBlock, rows.end - r0), at = r0 - rows.begin;
      tile.fill(centers, own, blocks[block], {r0, r0 + count});
      for (int64_t j = 0; j < std::min(n, (kept.classes - c0) * m); ++j) {
        std::copy_n(tile.row(j), count, kept.cosines + (c0 * m + j) * p.input.rows + r0);
      }
      std::fill_n(most.get(), count, -infinity);
      for (int64_t j = 0; j < n; ++j) loops.greatest(tile.row(j), most.get(), count);
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
        // Where there are no negatives so far, or nothing but NaN, which stays.
        shift[i] = greatest == -infinity ? T(0) : greatest;
      }
      for (int64_t j0 = 0; j0 < n; j0 += kSummands) {
        std::fill_n(sum.get(), count, T(0));
        for (int64_t j = j0; j < std::min(j0 + kSummands, n); ++j) {
          loops.exponentials(tile.row(j), T(centers.factor(j)), scale, shift.get(), sum.get(),
                             count);
        }
        for (int64_t i = 0; i < count; ++i) partial.sum[at + i] += sum[i];
      }
      if (partial.mean.get()) {
        products.add_transposed(tile.row(0), stride, count, packed, partial.mean.get() + at * dim);
      }
    }
  }
}

// A row's own labels, one at a time, in double: its own embedding x and the label's center w, as
// they came, or shortened. visit(c, l, ⟨x, w⟩, ‖x‖, ‖w‖), c in the range; zero vectors are passed
// over.
template <class T>
class Targets {
 public:
  Targets(const Problem& p, const Loops<T>& loops)
      : p_(p),
        loops_(loops),
        embedding_(p.input.cols),
        center_(p.input.cols),
        other_(p.sub_centers > 1 ? p.input.cols : 0) {}

  const T* embedding() const { return embedding_.get(); }
  const T* center() const { return center_.get(); }
  // What they are of what came.
  double embedding_shrink() const { return embedding_shrink_; }
  double center_shrink() const { return center_shrink_; }

  template <class F>
  void visit(int64_t source, Range classes, F&& visit) {
    const int64_t dim = p_.input.cols, k = p_.labels_per_row, m = p_.sub_centers;
    double x = -1;  // not loaded yet
    for_labels_in(p_.labels + source * k, k, classes, [&](int64_t j, int64_t l) {
      if (x == -1) {
        loops_.load(row_at(p_.input, source), p_.input.dtype, embedding_.get(), dim);
        x = std::sqrt(square_norm(loops_, embedding_.get(), dim, embedding_shrink_));
      }
      if (x <= kNormMin) return;
      Product best = load(center_, (classes.begin + j) * m);
      int64_t nearest = 0;
      for (int64_t s = 1; s < m; ++s) {
        const Product next = load(other_, (classes.begin + j) * m + s);
        if (next.cosine() > best.cosine() || std::isnan(next.w)) {
          std::swap(center_, other_);
          best = next;
          nearest = s;
        }
      }
      center_shrink_ = best.shrink;
      if (best.w > kNormMin || std::isnan(best.w)) visit(j * m + nearest, l, best.xw, x, best.w);
    });
  }

 private:
  struct Product {
    double xw, w, shrink;                                         // ⟨x, w⟩, ‖w‖
    double cosine() const { return w <= kNormMin ? 0 : xw / w; }  // times ‖x‖
  };
  Product load(const Buffer<T>& to, int64_t c) {
    const int64_t dim = p_.input.cols;
    loops_.load(center_at(p_, c), p_.weight.dtype, to.get(), dim);
    double shrink;
    const double w = std::sqrt(square_norm(loops_, to.get(), dim, shrink));
    return {loops_.dot_double(embedding(), to.get(), dim), w, shrink};
  }

  const Problem& p_;
  const Loops<T>& loops_;
  Buffer<T> embedding_, center_, other_;
  double embedding_shrink_ = 1, center_shrink_ = 1;
};

template <class Operand, class T>
void forward_by(const Problem& p, const Runtime& runtime, const Statistics<T>& out) {
  check(p);
  const Loops<T>& loops = SYNFACE_PICK(loops<T>);
  const int64_t n = p.input.rows, k = p.labels_per_row, dim = p.input.cols;
  const int64_t centers = p.classes * p.sub_centers;
  std::fill_n(out.negative_lse, n, 0.0);
  std::fill_n(out.negative_max, n, T(0));
  std::fill_n(out.target_cosine, n * k, 0.0);
  if (out.filtered) std::fill_n(out.filtered, n, 0.0);
  if (out.mean_center) std::fill_n(out.mean_center, n * dim, T(0));
  if (out.center_sum) {
    std::fill_n(out.cosine_sum, n, 0.0);
    std::fill_n(out.center_sum, dim, 0.0);
  }
  const Embeddings<T> x(p, loops, std::type_identity<Operand>());
  for (int64_t c = 0; x.count() < n && c < out.kept.classes * p.sub_centers; ++c) {
    std::fill_n(out.kept.cosines + c * n + x.count(), n - x.count(), T(0));
  }
  if (x.count() == 0) return;

  // A grid of row groups × class groups. Several tasks a thread, so that a core shared with other
  // programs (data-loader workers) holds nobody up. Each class group needs partial results for its
  // rows; each row group reads all centers: so there are as many class groups as memory allows.
  const int64_t partial_bytes = x.count() * dim * int64_t(sizeof(T));
  const int64_t most_groups =
      out.mean_center ? std::max<int64_t>(1, kPartialBytes / partial_bytes) : p.classes;
  const int64_t class_groups = std::min({task_count(runtime, x.count() * centers * dim),
                                         most_groups, p.classes, ceil_div(centers, kTile / 8)});
  const int64_t row_groups =
      std::clamp<int64_t>(runtime.threads / class_groups, 1, ceil_div(x.count(), kBlock / 8));
  std::vector<std::vector<Packed<Operand>>> blocks(static_cast<size_t>(row_groups));
  runtime.parallel(int(row_groups), [&](int group) {
    blocks[group] = pack_blocks<Operand>(x, part_of(x.count(), row_groups, group), true);
  });
  std::vector<std::unique_ptr<Partial<T>>> partials(size_t(class_groups * row_groups));
  runtime.parallel(int(partials.size()), [&](int task) {
    const int64_t group = task / class_groups;
    const Range rows = part_of(x.count(), row_groups, group);
    const Range classes = part_of(p.classes, class_groups, task % class_groups);
    partials[task] =
        std::make_unique<Partial<T>>(rows.size(), dim, out.mean_center != nullptr,
                                     out.filtered != nullptr, out.center_sum && group == 0);
    scan_classes(p, loops, x, rows, blocks[group], classes, out.kept, *partials[task]);
  });

  // Merge in the order of the classes, so that the answer depends on the number of threads alone.
  for (int64_t g = 0; out.center_sum && g < class_groups; ++g) {
    for (int64_t d = 0; d < dim; ++d) out.center_sum[d] += partials[g]->center_sum[d];
  }
  const int64_t tasks = std::min(task_count(runtime, x.count() * (k + 1) * dim * 16), x.count());
  runtime.parallel(int(tasks), [&](int task) {
    Targets<T> targets(p, loops);
    const Range mine = part_of(x.count(), tasks, task);
    for (int64_t group = 0; group < row_groups; ++group) {
      const Range rows = part_of(x.count(), row_groups, group);
      for (int64_t i = std::max(rows.begin, mine.begin); i < std::min(rows.end, mine.end); ++i) {
        const int64_t at = i - rows.begin, to = x.source[i];
        T most = -std::numeric_limits<T>::infinity();
        double sum = 0;
        const auto* parts = &partials[group * class_groups];
        for (int64_t g = 0; g < class_groups; ++g) most = std::max(most, parts[g]->most[at]);
        std::vector<double> factor(class_groups, 1);
        for (int64_t g = 0; g < class_groups; ++g) {
          if (parts[g]->most[at] < most) {
            factor[g] = std::exp(p.scale * (double(parts[g]->most[at]) - most));
          }
          sum += factor[g] * parts[g]->sum[at];
          if (out.filtered) out.filtered[to] += parts[g]->filtered[at];
        }
        out.negative_max[to] = most;
        out.negative_lse[to] = sum == 0 ? double(most) : p.scale * most + std::log(sum);
        targets.visit(to, {0, p.classes}, [&](int64_t, int64_t l, double xw, double x, double w) {
          out.target_cosine[to * k + l] = xw / (x * w);  // exactly ±1 for parallels where D = 1
        });
        for (int64_t d = 0; out.center_sum && d < dim; ++d) {
          out.cosine_sum[to] += x.row(i)[d] * out.center_sum[d];
        }
        if (!out.mean_center || sum == 0) continue;
        T* mean = out.mean_center + to * dim;
        for (int64_t g = 0; g < class_groups; ++g) {
          const T* from = parts[g]->mean.get() + at * dim;
          const T share = T(factor[g] / sum);
          for (int64_t d = 0; d < dim; ++d) mean[d] += share * from[d];
        }
      }
    }
  });
}

template <class T>
double cosine_sum_gradient(const Upstream<T>& from, int64_t row) {
  return from.grad_cosine_sum ? from.grad_cosine_sum[row] : 0;
}

template <class T>
void input_gradient(const Problem& p, const Loops<T>& loops, const Embeddings<T>& x, int64_t i,
                    const Upstream<T>& from, T* gradient, Targets<T>& targets, void* grad_input) {
  const int64_t dim = x.dim, row = x.source[i], k = p.labels_per_row;
  const T spread = T(p.scale * from.grad_negative_lse[row]),
          all = T(cosine_sum_gradient(from, row));
  const double* grad_cosine = from.grad_target_cosine + row * k;
  if (spread == 0 && all == 0 &&
      std::all_of(grad_cosine, grad_cosine + k, [](double g) { return g == 0; })) {
    return;  // nothing is asked, and the row may hold NaN
  }
  for (int64_t d = 0; d < dim; ++d) gradient[d] = spread * from.mean_center[row * dim + d];
  for (int64_t d = 0; from.grad_cosine_sum && d < dim; ++d) {
    gradient[d] += all * T(from.center_sum[d]);
  }
  loops.axpy_scale(gradient, -loops.dot(gradient, x.row(i), dim), x.row(i), x.inverse[i], dim);
  targets.visit(row, {0, p.classes}, [&](int64_t, int64_t l, double xw, double x, double w) {
    const double g = grad_cosine[l] / (x * w) * targets.embedding_shrink();
    loops.add_tangent(gradient, g, targets.center(), xw / (x * x), targets.embedding(), dim);
  });
  loops.store(gradient, static_cast<char*>(grad_input) + size_t(row * dim) * bytes(p.input.dtype),
              p.input.dtype, dim);
}

// What the gradient of every center needs of the rows that count, one element each; and the part
// of it that is the same for all centers, from the sum of cosines, or nothing.
template <class T>
struct Softmax {
  Softmax(const Problem& p, const Embeddings<T>& x, const Upstream<T>& from)
      : lse(x.count()), spread(x.count()), common(from.grad_cosine_sum ? x.dim : 0, T(0)) {
    for (int64_t i = 0; i < x.count(); ++i) {
      const double exact = from.negative_lse[x.source[i]];
      const double grad = from.grad_negative_lse[x.source[i]];
      // Without negatives, where it is −∞, no class has a share; unasked for, it may be NaN.
      const bool counts = grad != 0 && exact != -std::numeric_limits<double>::infinity();
      lse[i] = counts ? T(exact) : T(0);
      // What rounding takes off the log-sum-exp goes into the factor.
      spread[i] = counts ? T(p.scale * grad * std::exp(double(lse[i]) - exact)) : T(0);
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

template <class T, class Operand>
void weight_gradient(const Problem& p, const Loops<T>& loops, const Embeddings<T>& x,
                     const std::vector<Packed<Operand>>& blocks,
                     const std::vector<Packed<Operand>>& transposed, const Softmax<T>& softmax,
                     Range classes, const Upstream<T>& from, void* grad_rows,
                     const TakeRows& take) {
  const int64_t dim = x.dim, k = p.labels_per_row, m = p.sub_centers;
  const int64_t width = tile_classes(p, classes);
  const bool direct = p.weight.dtype == dtype_of<T>;
  const int64_t height = std::min(kBlock, x.count());
  const Products<T, Operand> products(x, loops, width * m, height);
  Negatives<T, Operand> tile(p, loops, x, products, width * m, height);
  const int64_t row_bytes = dim * int64_t(bytes(p.weight.dtype));
  Buffer<T> scratch(direct ? 0 : width * m * dim);
  Buffer<char> taken(take ? width * m * row_bytes : 0);
  Centers<T, Operand> centers(p, loops, width * m);
  Targets<T> targets(p, loops);
  for (int64_t c0 = classes.begin; c0 < classes.end; c0 += width) {
    const Range own{c0, std::min(c0 + width, classes.end)};
    char* out = take ? taken.get() : static_cast<char*>(grad_rows) + c0 * m * row_bytes;
    T* gradient = direct ? reinterpret_cast<T*>(out) : scratch.get();
    centers.read({own.begin * m, own.end * m});
    const int64_t n = centers.size();
    const bool kept = own.end <= from.kept.classes;
    for (int64_t r0 = 0, block = 0; r0 < x.count(); r0 += kBlock, ++block) {
      const int64_t count = std::min(kBlock, x.count() - r0);
      if (!kept) tile.fill(centers, own, transposed[block], {r0, r0 + count});
      for (int64_t j = 0; j < n; ++j) {
        const T* cosines =
            kept ? from.kept.cosines + (c0 * m + j) * p.input.rows + r0 : tile.row(j);
        loops.probabilities(cosines, T(p.scale), softmax.lse.get() + r0, softmax.spread.get() + r0,
                            tile.row(j), count);
      }
      products.add(tile.row(0), tile.stride(), n, blocks[block], gradient, r0 > 0);
    }
    for (int64_t j = 0; j < n; ++j) {
      T* g = gradient + j * dim;
      const T inverse = T(centers.inverse(j));
      for (size_t d = 0; d < softmax.common.size(); ++d) g[d] += softmax.common[d];
      const T along = loops.dot(g, centers.row(j), dim) * inverse * inverse;
      loops.axpy_scale(g, -along, centers.row(j), T(centers.inverse(j) * centers.shrink(j)), dim);
    }
    for (const int64_t row : x.source) {
      targets.visit(row, own, [&](int64_t c, int64_t l, double xw, double x, double w) {
        if (from.grad_target_cosine[row * k + l] == 0) return;
        const double g = from.grad_target_cosine[row * k + l] / (x * w) * targets.center_shrink();
        loops.add_tangent(gradient + c * dim, g, targets.embedding(), xw / (w * w),
                          targets.center(), dim);
      });
    }
    if (!direct) loops.store(gradient, out, p.weight.dtype, n * dim);
    if (take) take(own, out);
  }
}

// Of no rows.
void zero_weight_gradient(const Problem& p, void* grad_rows, const TakeRows& take) {
  const int64_t row_bytes = p.sub_centers * p.input.cols * int64_t(bytes(p.weight.dtype));
  if (!take) {
    std::fill_n(static_cast<char*>(grad_rows), p.classes * row_bytes, char(0));
    return;
  }
  const int64_t width = tile_classes(p, {0, p.classes});
  const std::vector<char> zeros(width * row_bytes);
  for (int64_t c0 = 0; c0 < p.classes; c0 += width) {
    take({c0, std::min(c0 + width, p.classes)}, zeros.data());
  }
}

template <class Operand, class T>
void backward_by(const Problem& p, const Runtime& runtime, const Upstream<T>& from,
                 void* grad_input, void* grad_rows, const TakeRows& take) {
  check(p);
  const Loops<T>& loops = SYNFACE_PICK(loops<T>);
  const int64_t dim = p.input.cols, centers = p.classes * p.sub_centers;
  const Embeddings<T> x(p, loops, std::type_identity<Operand>());
  if (grad_input) {
    std::fill_n(static_cast<char*>(grad_input), size_t(p.input.rows * dim) * bytes(p.input.dtype),
                char(0));
    const int64_t tasks =
        std::min(task_count(runtime, x.count() * (p.labels_per_row + 1) * dim * 16), x.count());
    runtime.parallel(int(tasks), [&](int task) {
      Buffer<T> gradient(dim);
      Targets<T> targets(p, loops);
      const Range rows = part_of(x.count(), tasks, task);
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        input_gradient(p, loops, x, i, from, gradient.get(), targets, grad_input);
      }
    });
  }
  if (grad_rows || take) {
    if (x.count() == 0) return zero_weight_gradient(p, grad_rows, take);
    const int64_t tasks = std::min(
        {task_count(runtime, x.count() * centers * dim), p.classes, ceil_div(centers, kTile / 8)});
    const Softmax<T> softmax(p, x, from);
    for (int64_t i = 0; i < x.count(); ++i) {  // a row without a gradient may hold NaN
      if (softmax.spread[i] == 0) x.clear(i);
      // What the gradient's product takes are not unit vectors.
      if (is_bf16<Operand>) softmax.spread[i] *= x.high[i];
    }
    const Range rows{0, x.count()};
    const std::vector<Packed<Operand>> blocks = pack_blocks<Operand>(x, rows, false),
                                       transposed = pack_blocks<Operand>(x, rows, true);
    runtime.parallel(int(tasks), [&](int task) {
      weight_gradient(p, loops, x, blocks, transposed, softmax, part_of(p.classes, tasks, task),
                      from, grad_rows, take);
    });
  }
}

// run(std::type_identity<Operand>())
template <class T, class F>
void with_operand(const Problem& p, F&& run) {
  if constexpr (std::is_same_v<T, float>) {
    if (multiplies_bf16(p)) return run(std::type_identity<uint16_t>());
    if (p.halves && prefers_bf16()) return run(std::type_identity<Halves>());
  }
  run(std::type_identity<T>());
}

}  // namespace

template <class T>
void forward(const Problem& p, const Runtime& runtime, const Statistics<T>& out) {
  with_operand<T>(
      p, [&](auto operand) { forward_by<typename decltype(operand)::type>(p, runtime, out); });
}

template <class T>
void backward(const Problem& p, const Runtime& runtime, const Upstream<T>& from, void* grad_input,
              void* grad_rows, const TakeRows& take) {
  with_operand<T>(p, [&](auto operand) {
    backward_by<typename decltype(operand)::type>(p, runtime, from, grad_input, grad_rows, take);
  });
}

#define SYNFACE_INSTANTIATE(T)                                                                \
  template void forward<T>(const Problem&, const Runtime&, const Statistics<T>&);             \
  template void backward<T>(const Problem&, const Runtime&, const Upstream<T>&, void*, void*, \
                            const TakeRows&);
SYNFACE_INSTANTIATE(float)
SYNFACE_INSTANTIATE(double)

}  // namespace synface::margin_cross_entropy
