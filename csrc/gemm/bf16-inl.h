// The bfloat16 GEMM: as in cpu-inl.h, with pairs of neighbors along the depth in place of its
// elements. One instruction adds both products of a pair to a float32.

namespace synface {
namespace {
namespace isa_avx512_bf16 {

constexpr int kRows = 12, kVectors = 2, kLanes = 16;
constexpr int64_t kColumns = kVectors * kLanes;

inline __m512bh as_bf16(__m512i pairs) { return reinterpret_cast<__m512bh>(pairs); }

// Computes Rows × kColumns of C, of which `columns` exist. The last pair of an odd depth has one
// element.
template <int Rows>
void block(const uint16_t* a, int64_t a_row, const uint16_t* b, int64_t depth, float* c,
           int64_t c_row, int64_t columns, bool accumulate) {
  __m512 sums[Rows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      sums[i][v] = _mm512_setzero_ps();
      __builtin_prefetch(c + i * c_row + v * kLanes, 1);
    }
  }
  const auto add = [&](int64_t p, auto pair_of) __attribute__((always_inline)) {
    __m512bh right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      right[v] = as_bf16(_mm512_load_si512(b + p * kColumns + v * 2 * kLanes));
    }
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const __m512bh left = as_bf16(_mm512_set1_epi32(pair_of(a + i * a_row + p)));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sums[i][v] = _mm512_dpbf16_ps(sums[i][v], left, right[v]);
      }
    }
  };
  int64_t p = 0;
  for (; p + 2 <= depth; p += 2) {
    add(p, [](const uint16_t* at) __attribute__((always_inline)) {
      int32_t pair;
      std::memcpy(&pair, at, sizeof pair);
      return pair;
    });
  }
  if (p < depth) {
    add(p, [](const uint16_t* at) __attribute__((always_inline)) { return int32_t(*at); });
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* to = c + i * c_row + v * kLanes;
      const int64_t rest = std::clamp<int64_t>(columns - v * kLanes, 0, kLanes);
      const __mmask16 exist = __mmask16((1u << rest) - 1);
      const __m512 before = accumulate ? _mm512_maskz_loadu_ps(exist, to) : _mm512_setzero_ps();
      _mm512_mask_storeu_ps(to, exist, _mm512_add_ps(before, sums[i][v]));
    }
  }
}

template <int Rows = kRows>
void block_of(int64_t rows, const uint16_t* a, int64_t a_row, const uint16_t* b, int64_t depth,
              float* c, int64_t c_row, int64_t columns, bool accumulate) {
  if constexpr (Rows > 1) {
    if (rows < Rows) {
      return block_of<Rows - 1>(rows, a, a_row, b, depth, c, c_row, columns, accumulate);
    }
  }
  block<Rows>(a, a_row, b, depth, c, c_row, columns, accumulate);
}

void multiply(int64_t m, const uint16_t* a, int64_t a_row, const uint16_t* b, int64_t k, int64_t n,
              float* c, int64_t c_row, bool accumulate) {
  if (k == 0 && !accumulate) {
    for (int64_t i = 0; i < m; ++i) std::fill_n(c + i * c_row, n, 0.f);
  }
  const int64_t panels = ceil_div(n, kColumns);
  for (int64_t p = 0; p < k; p += kPairs * 2) {
    const int64_t depth = std::min(kPairs * 2, k - p), even = depth + depth % 2;
    for (int64_t i = 0; i < m; i += kRows) {
      for (int64_t j = 0; j < n; j += kColumns) {
        block_of(std::min<int64_t>(kRows, m - i), a + i * a_row + p, a_row,
                 b + p * panels * kColumns + j * even, depth, c + i * c_row + j, c_row,
                 std::min(kColumns, n - j), accumulate || p > 0);
      }
    }
  }
}

// Transposes 16 vectors of 16 pairs.
inline void transpose(__m512i (&rows)[16]) {
  // Each of four stages is a perfect shuffle of all elements.
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  __m512i next[16];
#pragma GCC unroll 4
  for (int stage = 0; stage < 4; ++stage) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      next[2 * i] = _mm512_permutex2var_epi32(rows[i], low, rows[i + 8]);
      next[2 * i + 1] = _mm512_permutex2var_epi32(rows[i], high, rows[i + 8]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) rows[i] = next[i];
  }
}

// Rounds to bfloat16, in the lower 16 of each 32 bits; with Rest, the remainder likewise.
template <bool Rest>
inline __m512i rounded(__m512 values) {
  const __m512i bits = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
  if constexpr (!Rest) return bits;
  return rounded<false>(_mm512_sub_ps(values, _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))));
}

template <bool Rest>
void narrow(const float* from, int64_t m, int64_t n, int64_t from_row, uint16_t* to,
            int64_t to_row) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; j += 16) {
      const auto exist = __mmask16((1u << std::min<int64_t>(16, n - j)) - 1);
      const __m512 values = _mm512_maskz_loadu_ps(exist, from + i * from_row + j);
      _mm512_mask_cvtepi32_storeu_epi16(to + i * to_row + j, exist, rounded<Rest>(values));
    }
  }
}

// Rounds the transpose: two rows of `from` become a row of pairs.
template <bool Rest>
void narrow_transposed(const float* from, int64_t m, int64_t n, int64_t from_row, uint16_t* to,
                       int64_t to_row) {
  for (int64_t j = 0; j < n; j += 16) {
    const auto columns = __mmask16((1u << std::min<int64_t>(16, n - j)) - 1);
    for (int64_t i = 0; i < m; i += 32) {
      const auto row = [&](int64_t which) __attribute__((always_inline)) {
        return which < m
                   ? rounded<Rest>(_mm512_maskz_loadu_ps(columns, from + which * from_row + j))
                   : _mm512_setzero_si512();
      };
      __m512i pairs[16];
#pragma GCC unroll 16
      for (int p = 0; p < 16; ++p) {
        pairs[p] = _mm512_or_si512(row(i + 2 * p), _mm512_slli_epi32(row(i + 2 * p + 1), 16));
      }
      transpose(pairs);
      const auto rows = __mmask32((uint64_t(1) << std::min<int64_t>(32, m - i)) - 1);
      for (int64_t l = 0; l < std::min<int64_t>(16, n - j); ++l) {
        _mm512_mask_storeu_epi16(to + (j + l) * to_row + i, rows, pairs[l]);
      }
    }
  }
}

// Packs slices of kPairs pairs of rows, each in panels of kColumns columns, or in one panel with
// OnePanel; columns to a multiple of kColumns, and the last pair of an odd depth, are padded with
// 0.
template <bool OnePanel>
void fill(const uint16_t* from, int64_t k, int64_t n, int64_t row, int64_t column, uint16_t* to) {
  const int64_t width = OnePanel ? ceil_div(n, kColumns) * kColumns : kColumns;
  for (int64_t p = 0; p < k; p += kPairs * 2) {
    const int64_t depth = std::min(kPairs * 2, k - p), even = depth + depth % 2;
    uint16_t* slice = to + p * ceil_div(n, kColumns) * kColumns;
    for (int64_t j = 0; j < n; j += kColumns) {
      const int64_t columns = std::min(kColumns, n - j);
      uint16_t* panel = slice + (OnePanel ? 2 * j : even * j);
      int64_t q = 0;
      if (row == 1 && columns == kColumns) {
        for (; q + 2 * kLanes <= depth; q += 2 * kLanes) {
          for (int64_t l = 0; l < kColumns; l += kLanes) {
            const uint16_t* corner = from + (p + q) + (j + l) * column;
            __m512i pairs[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) pairs[i] = _mm512_loadu_si512(corner + i * column);
            transpose(pairs);
            uint16_t* at = panel + q * width + 2 * l;
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) _mm512_store_si512(at + i * 2 * width, pairs[i]);
          }
        }
      }
      for (; q < depth; q += 2) {
        const uint16_t* first = from + (p + q) * row + j * column;
        const uint16_t* second = q + 1 < depth ? first + row : nullptr;
        uint16_t* pairs = panel + q * width;
        if (column == 1 && second) {
#pragma omp simd
          for (int64_t l = 0; l < columns; ++l) {
            pairs[2 * l] = first[l];
            pairs[2 * l + 1] = second[l];
          }
        } else {
          for (int64_t l = 0; l < columns; ++l) {
            pairs[2 * l] = first[l * column];
            pairs[2 * l + 1] = second ? second[l * column] : 0;
          }
        }
        std::fill(pairs + 2 * columns, pairs + 2 * kColumns, 0);
      }
    }
  }
}

}  // namespace isa_avx512_bf16
}  // namespace
}  // namespace synface
