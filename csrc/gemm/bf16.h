// float32 matrices as operands of bfloat16 GEMMs: rounded, or as bf16 splits.
#pragma once

#include <algorithm>
#include <type_traits>

#include "gemm/gemm.h"

namespace synface {

// Types of a GEMM's operands: float or double, bfloat16 (uint16_t), or SplitBf16.
template <class Operand>
constexpr bool is_bf16 = std::is_same_v<Operand, uint16_t>;
template <class Operand>
constexpr bool is_split = std::is_same_v<Operand, SplitBf16>;

// Bytes of an operand's element.
template <class Operand>
constexpr int64_t operand_bytes = is_split<Operand> ? 4 : sizeof(Operand);

// Writes the bf16 split of a row: its rounding to bfloat16, and that of the remainder.
inline void split_row(const float* from, int64_t n, uint16_t* high, uint16_t* low) {
  const Float32Matrix row{.data = from, .rows = 1, .cols = n, .stride = n};
  narrow(row, {.data = high, .stride = n});
  narrow(row, {.data = low, .stride = n, .rest = true});
}

// Memory for a float32 tile, or its transpose, as a left operand of bfloat16 GEMMs. Empty where
// Operand is not of bfloat16: such GEMMs take the tile itself.
template <class Operand>
class RoundedTile {
 public:
  RoundedTile(int64_t rows, int64_t cols)
      : high_(rounds() ? room(rows, cols) : 0), low_(is_split<Operand> ? room(rows, cols) : 0) {}

  static constexpr bool rounds() { return is_bf16<Operand> || is_split<Operand>; }

  // The operand is valid until the next call.
  Left<Operand> operator()(const Float32Matrix& tile) const {
    const int64_t stride = padded<uint16_t>(tile.transposed ? tile.rows : tile.cols);
    narrow(tile, {.data = high_.get(), .stride = stride});
    if constexpr (is_split<Operand>) {
      narrow(tile, {.data = low_.get(), .stride = stride, .rest = true});
      return {SplitBf16{high_.get(), low_.get()}, stride};
    } else {
      return {high_.get(), stride};
    }
  }

 private:
  static int64_t room(int64_t rows, int64_t cols) {
    return std::max(rows * padded<uint16_t>(cols), cols * padded<uint16_t>(rows));
  }
  Buffer<uint16_t> high_, low_;
};

}  // namespace synface
