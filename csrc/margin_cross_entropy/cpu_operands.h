// Operands of the GEMMs: normalized embeddings, tiles of centers. A part of cpu.cpp.
#pragma once

#include "gemm/bf16.h"

namespace synface::margin_cross_entropy {
namespace {

// Classes of a tile: as kBlock of embeddings, large enough that GEMMs run at full speed, small
// enough that the tile's cosines stay in a core's cache. A class is a row of the tile: then centers
// and cosines are read contiguously, and the embeddings are packed once for all tiles.
constexpr int64_t kTile = 512;
// Rows of a tile whose exponentials are summed in T before they are added to a double.
constexpr int64_t kSummands = 16;
// Memory limit of all threads' partial mean centers together.
constexpr int64_t kPartialBytes = int64_t(32) << 20;
// Multiply-adds of the smallest task, some tens of microseconds.
constexpr int64_t kTaskWork = int64_t(1) << 21;

// Row of the weight for center c, which belongs to the (c / M)-th class of class_ids.
const void* center_at(const Problem& p, int64_t c) {
  const int64_t m = p.sub_centers;
  return row_at(p.weight, p.class_ids ? p.class_ids[c / m] * m + c % m : c);
}

// Width of a tile in classes.
int64_t tile_classes(const Problem& p, Range classes) {
  return std::min(std::max<int64_t>(1, kTile / p.sub_centers), classes.size());
}

// Throws std::out_of_range for class_ids or labels out of range, before anything is read by them.
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

// 1/norm from a sum of squares; 0 for a norm of at most kNormMin, NaN for a row that is not finite.
// In double: an error here would scale a whole row of cosines but not its labels', which are
// computed separately.
double inverse_norm(double square) {
  const double norm = std::sqrt(square);
  if (norm <= kNormMin) return 0;
  return std::isfinite(norm) ? 1 / norm : std::numeric_limits<double>::quiet_NaN();
}

// Whether a row's squares, dot products or, in float, inverse norm may overflow or underflow T.
bool is_long(double square) { return square > 0x1p200; }

// Scales a long row by a power of two and returns the factor; 1 for a row that is not finite.
template <class T>
double shorten(T* values, int64_t n) {
  double most = 0;
  for (int64_t i = 0; i < n; ++i) most = std::max(most, std::abs(double(values[i])));
  if (!std::isfinite(most)) return 1;
  const double shrink = std::ldexp(1.0, -std::min(std::ilogb(most), 1000));  // no subnormal
  for (int64_t i = 0; i < n; ++i) values[i] = T(values[i] * shrink);
  return shrink;
}

// Sum of squares of a row; a long one is shortened first, and `shrink` is set to the factor.
template <class T>
double square_norm(const SimdKernels<T>& simd, T* values, int64_t n, double& shrink) {
  shrink = 1;
  const double square = simd.dot_double(values, values, n);
  if (!is_long(square)) return square;
  shrink = shorten(values, n);
  return simd.dot_double(values, values, n);
}

// Whether a matrix is normalized and rounded before the GEMM.
bool is_rounded(const Problem& p, const Rows& rows) {
  return p.gemm_dtype && rows.dtype != *p.gemm_dtype;
}

// GEMM operands are of T or, where both matrices are bfloat16 and the CPU has instructions for it,
// or where they are to be rounded to it and that is faster, of bfloat16 with sums in float32.
// A matrix that is bfloat16 is not rounded before the GEMM: centers are taken as they are, and
// embeddings are scaled by powers of two.
bool uses_bf16_gemm(const Problem& p) {
  if (is_rounded(p, p.input) || is_rounded(p, p.weight)) {
    return *p.gemm_dtype == Dtype::bf16 && prefers_bf16();
  }
  return p.input.dtype == Dtype::bf16 && p.weight.dtype == Dtype::bf16 && has_bf16_gemm();
}

// A row rounded to a 16-bit dtype, as T.
template <class T>
void round_row(const SimdKernels<T>& simd, const T* from, int64_t n, Dtype dtype, uint16_t* bits,
               T* to) {
  simd.store(from, bits, dtype, n);
  simd.load(bits, dtype, to, n);
}

// Valid rows of the input, normalized, with their row numbers in the input. A bfloat16 GEMM takes
// `bits` instead, and a unit vector is (high + low)·bits, or is rounded to bits; a GEMM of bf16
// splits takes `bits` (the high part) and `rest` (the low part); one of T `rounded`, if not empty.
template <class T>
struct Embeddings {
  template <class Operand>
  Embeddings(const Problem& p, const SimdKernels<T>& simd, std::type_identity<Operand>)
      : dim(p.input.cols), unit(0), inverse(0), rounded(0), bits(0), rest(0), high(0), low(0) {
    const int64_t k = p.labels_per_row;
    for (int64_t i = 0; i < p.input.rows; ++i) {
      const int64_t* labels = p.labels + i * k;
      if (std::any_of(labels, labels + k, [](int64_t l) { return l != -1; })) source.push_back(i);
    }
    unit = Buffer<T>(count() * dim);
    inverse = Buffer<T>(count());
    constexpr bool bf16 = is_bf16<Operand>;
    const bool rounds = is_rounded(p, p.input), scales = bf16 && !rounds;
    if (bf16 || is_split<Operand>) bits = Buffer<uint16_t>(count() * dim);
    if (is_split<Operand>) rest = Buffer<uint16_t>(count() * dim);
    if (rounds && !bf16) rounded = Buffer<T>(count() * dim);
    Buffer<uint16_t> half(rounds && !bf16 ? dim : 0);
    if (scales) {
      high = Buffer<T>(count());
      low = Buffer<T>(count());
    }
    for (int64_t i = 0; i < count(); ++i) {
      T* to = unit.get() + i * dim;
      simd.load(row_at(p.input, source[i]), p.input.dtype, to, dim);
      double shrink;
      const double scale = inverse_norm(square_norm(simd, to, dim, shrink));
      if (scales) set_bits(i, to, scale);
      simd.normalize(to, scale, to, dim);
      inverse[i] = T(scale * shrink);
      if constexpr (is_split<Operand>) set_split(i);
      if (rounds && bf16) simd.store(to, bits.get() + i * dim, Dtype::bf16, dim);
      if (rounds && !bf16) {
        round_row(simd, to, dim, *p.gemm_dtype, half.get(), rounded.get() + i * dim);
      }
    }
  }
  int64_t count() const { return int64_t(source.size()); }
  const T* row(int64_t i) const { return unit.get() + i * dim; }
  template <class Operand>
  auto operand(int64_t i) const {
    if constexpr (is_split<Operand>)
      return SplitBf16{bits.get() + i * dim, rest.get() + i * dim};
    else if constexpr (is_bf16<Operand>)
      return static_cast<const uint16_t*>(bits.get() + i * dim);
    else
      return rounded.get() ? static_cast<const T*>(rounded.get() + i * dim) : row(i);
  }
  // Sets the row and its operands to zero.
  void clear(int64_t i) const {
    std::fill_n(unit.get() + i * dim, dim, T(0));
    if (rounded.get()) std::fill_n(rounded.get() + i * dim, dim, T(0));
    if (bits.get()) std::fill_n(bits.get() + i * dim, dim, uint16_t(0));
    if (rest.get()) std::fill_n(rest.get() + i * dim, dim, uint16_t(0));
    if (high.get()) high[i] = low[i] = T(0);
  }

  int64_t dim;
  std::vector<int64_t> source;  // row numbers in the input
  Buffer<T> unit, inverse, rounded;
  Buffer<uint16_t> bits, rest;
  Buffer<T> high, low;  // empty where operands are unit vectors

 private:
  void set_split(int64_t i) const {
    split_row(row(i), dim, bits.get() + i * dim, rest.get() + i * dim);
  }

  // Scales the row to a norm in [½, 1); zeros where the inverse norm is 0 or NaN, which `high`
  // passes on.
  void set_bits(int64_t i, const T* values, double inverse) const {
    int exponent = 0;
    const bool nonzero = inverse > 0;
    if (nonzero) std::frexp(1 / inverse, &exponent);
    const double shrink = std::ldexp(1.0, -exponent);
    for (int64_t d = 0; d < dim; ++d) {
      bits[i * dim + d] = nonzero ? to_bf16(float(values[d] * shrink)) : 0;
    }
    const Parts<T> factor(std::ldexp(inverse, exponent));
    high[i] = factor.high;
    low[i] = nonzero ? factor.low : T(0);
  }
};

// Inputs shared by all tasks of a pass.
template <class T>
struct Context {
  const Problem& p;
  const SimdKernels<T>& simd;
  const Embeddings<T>& x;
};

// Embeddings packed as right operands of GEMMs, a block of rows each, without the first `skipped`.
template <class Operand, class T>
std::vector<Packed<Operand>> pack_blocks(const Embeddings<T>& x, Range rows, bool transposed,
                                         int64_t skipped = 0) {
  std::vector<Packed<Operand>> blocks;
  for (int64_t r0 = rows.begin; r0 < rows.end; r0 += kBlock) {
    const int64_t end = std::min(r0 + kBlock, rows.end), r = std::clamp(skipped, r0, end),
                  n = end - r;
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

// A tile of centers as T with their inverse norms, and as GEMM operands: as they came, or
// normalized where the operands are bf16 splits or rounded. Centers that are contiguous and of T
// already are not copied, except in a tile that holds a long one, which is shortened there.
template <class T, class Operand>
class Centers {
 public:
  Centers(const Problem& p, const SimdKernels<T>& simd, int64_t most)
      : p_(p),
        simd_(simd),
        most_(most),
        gathers_(p.class_ids || p.weight.dtype != dtype_of<T>),
        rounds_(is_rounded(p, p.weight)),
        copy_(gathers_ ? most * p.weight.cols : 0),
        bits_copy_(is_split<Operand> || (is_bf16<Operand> && (p.class_ids || rounds_))
                       ? most * p.weight.cols
                       : 0),
        rest_copy_(is_split<Operand> ? most * p.weight.cols : 0),
        rounded_(std::is_same_v<T, Operand> && rounds_ ? most * p.weight.cols : 0),
        unit_(normalizes() ? p.weight.cols : 0),
        half_(std::is_same_v<T, Operand> && rounds_ ? p.weight.cols : 0),
        inverse_(most) {}

  void read(Range centers) {
    const int64_t dim = p_.weight.cols;
    size_ = centers.size();
    copied_ = gathers_;
    if (copied_) copy(centers);
    data_ = copied_ ? copy_.get() : static_cast<const T*>(center_at(p_, centers.begin));
    bool any_long = false;
    for (int64_t j = 0; j < size_; ++j) {
      const double square = simd_.dot_double(row(j), row(j), dim);
      inverse_[j] = inverse_norm(square);
      any_long |= is_long(square);
    }
    shrink_.assign(any_long ? size_ : 0, 1.0);
    if (any_long) shorten_long(centers);
    if (normalizes()) {
      for (int64_t j = 0; j < size_; ++j) normalize(j);
    } else if constexpr (is_bf16<Operand>) {
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
  }
  int64_t size() const { return size_; }
  int64_t stride() const { return copied_ ? p_.weight.cols : p_.weight.stride; }
  const T* row(int64_t j) const { return data_ + j * stride(); }
  double inverse(int64_t j) const { return inverse_[j]; }
  // Factor by which a long center was scaled; 1 for others.
  double shrink(int64_t j) const { return shrink_.empty() ? 1 : shrink_[j]; }
  auto operands() const {
    if constexpr (is_split<Operand>)
      return SplitBf16{bits_copy_.get(), rest_copy_.get()};
    else if constexpr (is_bf16<Operand>)
      return rounds_ ? static_cast<const uint16_t*>(bits_copy_.get()) : bits_;
    else
      return rounds_ ? static_cast<const T*>(rounded_.get()) : data_;
  }
  int64_t operand_stride() const {
    if (normalizes()) return p_.weight.cols;
    return is_bf16<Operand> ? bits_stride_ : stride();
  }
  // Whether operands are unit vectors; else `factor` normalizes them.
  bool normalizes() const { return is_split<Operand> || rounds_; }
  double factor(int64_t j) const { return normalizes() ? 1 : inverse_[j]; }

 private:
  void normalize(int64_t j) {
    const int64_t dim = p_.weight.cols, at = j * dim;
    simd_.normalize(row(j), inverse_[j], unit_.get(), dim);
    if constexpr (is_split<Operand>)
      split_row(unit_.get(), dim, bits_copy_.get() + at, rest_copy_.get() + at);
    else if constexpr (is_bf16<Operand>)
      simd_.store(unit_.get(), bits_copy_.get() + at, Dtype::bf16, dim);
    else
      round_row(simd_, unit_.get(), dim, *p_.gemm_dtype, half_.get(), rounded_.get() + at);
  }
  void copy(Range centers) {
    const int64_t dim = p_.weight.cols;
    for (int64_t j = 0; j < size_; ++j) {
      simd_.load(center_at(p_, centers.begin + j), p_.weight.dtype, copy_.get() + j * dim, dim);
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
      inverse_[j] = inverse_norm(square_norm(simd_, copy_.get() + j * dim, dim, shrink_[j]));
    }
  }

  const Problem& p_;
  const SimdKernels<T>& simd_;
  int64_t most_;
  bool gathers_, rounds_, copied_ = false;
  Buffer<T> copy_;
  Buffer<uint16_t> bits_copy_, rest_copy_;
  Buffer<T> rounded_, unit_;
  Buffer<uint16_t> half_;
  Buffer<double> inverse_;
  const T* data_ = nullptr;
  const uint16_t* bits_ = nullptr;
  int64_t size_ = 0, bits_stride_ = 0;
  std::vector<double> shrink_;  // empty where no center is long
};

// GEMMs of a tile of n centers with a block of `count` embeddings. Their operands are of T, of
// bfloat16, to which softmax terms are rounded, or bf16 splits.
template <class T, class Operand>
class TileGemms {
 public:
  // Tiles hold at most this many centers and embeddings.
  TileGemms(const Embeddings<T>& x, const SimdKernels<T>& simd, int64_t centers, int64_t embeddings)
      : x_(x), simd_(simd), rounded_(centers, embeddings) {}

  void pack(const Centers<T, Operand>& centers, Packed<Operand>& packed) const {
    packed.fill(centers.operands(), centers.size(), x_.dim, centers.operand_stride(), 1);
  }

  // The logits GEMM: tile = centers × unit embeddings, from the r0-th on.
  void logits(const Centers<T, Operand>& centers, const Packed<Operand>& embeddings, int64_t r0,
              T* tile, int64_t stride) const {
    const int64_t n = centers.size();
    multiply(n, left(centers.operands(), centers.operand_stride()), embeddings,
             {.data = tile, .stride = stride});
    for (int64_t j = 0; x_.high.get() && j < n; ++j) {
      simd_.scale_each(tile + j * stride, x_.high.get() + r0, x_.low.get() + r0, embeddings.n());
    }
  }

  // sums += tileᵀ × packed centers
  void add_transposed(const T* tile, int64_t stride, int64_t count, const Packed<Operand>& packed,
                      T* sums) const {
    const Output<T> to{.data = sums, .stride = x_.dim, .accumulate = true};
    if constexpr (RoundedTile<Operand>::rounds()) {
      multiply(count,
               rounded_({.data = tile,
                         .rows = packed.k(),
                         .cols = count,
                         .stride = stride,
                         .transposed = true}),
               packed, to);
    } else {
      multiply(count, Left<T>{tile, 1, stride}, packed, to);
    }
  }

  // sums (+)= tile × packed embeddings
  void add(const T* tile, int64_t stride, int64_t n, const Packed<Operand>& packed, T* sums,
           bool accumulate) const {
    const Output<T> to{.data = sums, .stride = x_.dim, .accumulate = accumulate};
    if constexpr (RoundedTile<Operand>::rounds()) {
      multiply(n, rounded_({.data = tile, .rows = n, .cols = packed.k(), .stride = stride}), packed,
               to);
    } else {
      multiply(n, Left<T>{tile, stride, 1}, packed, to);
    }
  }

 private:
  static Left<Operand> left(auto data, int64_t stride) { return {data, stride, 1}; }

  const Embeddings<T>& x_;
  const SimdKernels<T>& simd_;
  RoundedTile<Operand> rounded_;
};

}  // namespace
}  // namespace synface::margin_cross_entropy
