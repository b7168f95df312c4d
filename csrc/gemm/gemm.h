// Single-threaded GEMMs on tiles that fit in the thread's cache. A vendor's GEMM would spend much
// of its time packing operands that the caller can pack once or use unpacked.
#pragma once

#include <cstdint>

#include "common/memory.h"

namespace synface {

template <class T>
struct Kernel;  // an instruction set's version

// Right operand of a GEMM, (k × n), in panels as wide as the registers take. T is float or double,
// or uint16_t: the bits of bfloat16, if has_bf16_gemm().
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

// Left operand: element (i, p) is data[i·row + p·column], with one of the strides 1.
template <class T>
struct Left {
  const T* data;
  int64_t row, column = 1;
};

// Row-major result C; with `accumulate`, the GEMM is added to it.
template <class T>
struct Output {
  T* data;
  int64_t stride;
  bool accumulate = false;
};

// C (m × n) = A·B; k and n are B's.
template <class T>
void multiply(int64_t m, Left<T> a, const Packed<T>& b, const Output<T>& c);

// Whether the CPU has bfloat16 GEMM instructions, which are faster than float32's, and
// SYNFACE_CPU_ISA lets us use them. They treat numbers below 2^-126 as 0.
bool has_bf16_gemm();

// The same for bfloat16 with sums in float32; A's rows are contiguous.
void multiply(int64_t m, Left<uint16_t> a, const Packed<uint16_t>& b, const Output<float>& c);

// A float32 matrix as the sum of two of bfloat16: `high` is its rounding, `low` that of the
// remainder. GEMMs of splits leave out low·low, which is at most 2^-18 of high·high, as rounding
// twice leaves 2^-18 of each factor.
struct SplitBf16 {
  const uint16_t *high, *low;
};
template <>
struct Left<SplitBf16> {
  SplitBf16 data;
  int64_t row, column = 1;
};
template <>
class Packed<SplitBf16> {
 public:
  Packed(int64_t k, int64_t n) : high_(k, n), low_(k, n) {}
  void fill(SplitBf16 from, int64_t k, int64_t n, int64_t row, int64_t column) {
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
void multiply(int64_t m, Left<SplitBf16> a, const Packed<SplitBf16>& b, const Output<float>& c);

// oneDNN's bfloat16 GEMM, which torch ships, for Isa::onednn_bf16. B's rows are interleaved in
// pairs, an element of one beside that of the next: b_row is the number of pairs from one pair of
// rows to the next. k is even.
using Brgemm = void (*)(int64_t m, int64_t n, int64_t k, int64_t a_row, int64_t b_row,
                        int64_t c_row, bool accumulate, const uint16_t* a, const uint16_t* b,
                        float* c);
void set_brgemm(Brgemm brgemm);

// Conversion of float32 to bfloat16 operands, as stored or transposed; with `rest`, of what that
// rounding leaves.
struct Float32Matrix {
  const float* data;
  int64_t rows, cols, stride;
  bool transposed = false;
};
struct Bf16Matrix {
  uint16_t* data;
  int64_t stride;
  bool rest = false;
};
void narrow(const Float32Matrix& from, const Bf16Matrix& to);

// Row stride of at least n for a tile that is read by columns: not a power of two, which would map
// a column's elements to the same few cache sets.
template <class T>
constexpr int64_t padded(int64_t n) {
  constexpr int64_t line = 64 / sizeof(T);
  return (n + 2 * line - 1) / (2 * line) * (2 * line) + line;
}

}  // namespace synface
