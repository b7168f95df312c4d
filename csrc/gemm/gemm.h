// Matrix products of one thread on tiles that lie in its cache, where a vendor's product would
// spend much of its time on packing what the caller could pack once, or keep as it is.
#pragma once

#include <cstdint>

#include "memory.h"

namespace synface {

template <class T>
struct Kernel;  // an instruction set's version

// The right operand of products, (k × n), in panels as wide as the registers take. T is float or
// double, or uint16_t: the bits of bfloat16, where has_bf16_products().
template <class T>
class Packed {
 public:
  Packed(int64_t k, int64_t n);
  // Element (p, j) is from[p·row + j·column].
  void fill(const T* from, int64_t k, int64_t n, int64_t row, int64_t column);

  const T* data() const { return data_.get(); }
  int64_t k() const { return k_; }
  int64_t n() const { return n_; }
  const Kernel<T>& kernel() const { return *kernel_; }

 private:
  int64_t k_, n_;
  const Kernel<T>* kernel_;
  Buffer<T> data_;
};

// A left operand: element (i, p) is data[i·row + p·column], with one of the strides 1.
template <class T>
struct Left {
  const T* data;
  int64_t row, column;
};

// Row-major C (m × n) = A·B, or C += it; k and n are B's.
template <class T>
void multiply(int64_t m, Left<T> a, const Packed<T>& b, T* c, int64_t c_row, bool accumulate);

// Whether the CPU has instructions for products of bfloat16, which are faster than of float32, and
// SYNFACE_CPU_ISA lets us use them. Numbers below 2^-126 count as 0 there.
bool has_bf16_products();

// The same of bfloat16, A's rows contiguous and a_row apart, with sums in float32.
void multiply(int64_t m, const uint16_t* a, int64_t a_row, const Packed<uint16_t>& b, float* c,
              int64_t c_row, bool accumulate);

// Matrices of float32, each element as the sum of two bfloat16: its own rounding, and that of what
// it takes off. Their products leave out low·low, which is no more than 2^-18 of high·high, as
// rounding twice takes 2^-18 off each factor.
struct Halves {
  const uint16_t *high, *low;
};
template <>
class Packed<Halves> {
 public:
  Packed(int64_t k, int64_t n) : high_(k, n), low_(k, n) {}
  void fill(Halves from, int64_t k, int64_t n, int64_t row, int64_t column) {
    high_.fill(from.high, k, n, row, column);
    low_.fill(from.low, k, n, row, column);
  }
  const Packed<uint16_t>& high() const { return high_; }
  const Packed<uint16_t>& low() const { return low_; }
  int64_t k() const { return high_.k(); }
  int64_t n() const { return high_.n(); }

 private:
  Packed<uint16_t> high_, low_;
};
void multiply(int64_t m, Halves a, int64_t a_row, const Packed<Halves>& b, float* c, int64_t c_row,
              bool accumulate);

// oneDNN's product of bfloat16, which torch brings, for Isa::onednn_bf16. B's rows stand in pairs,
// an element of one beside that of the next: b_row pairs from one pair of rows to the next. k is
// even.
using Brgemm = void (*)(int64_t m, int64_t n, int64_t k, int64_t a_row, int64_t b_row,
                        int64_t c_row, bool accumulate, const uint16_t* a, const uint16_t* b,
                        float* c);
void set_brgemm(Brgemm brgemm);

// float32 (m × n) to bfloat16, as it lies or transposed, for such products; or what that rounding
// takes off, to bfloat16.
void narrow(const float* from, int64_t m, int64_t n, int64_t from_row, bool transposed,
            uint16_t* to, int64_t to_row, bool rest = false);

// A row stride of at least n for a tile that is read by columns: no power of two, which would put a
// column's elements into the same few sets of the cache.
template <class T>
constexpr int64_t padded(int64_t n) {
  constexpr int64_t line = 64 / sizeof(T);
  return (n + 2 * line - 1) / (2 * line) * (2 * line) + line;
}

}  // namespace synface
