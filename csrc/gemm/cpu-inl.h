// The register-blocked GEMM. Included once per instruction set by simd/foreach_isa.h.
//
// A block of kRows × kColumns sums stays in registers while p runs over the depth; each step loads
// a row of B's panel and one element of A per row of the block. Tiles in the L2 cache still keep
// the multipliers busy: a step's loads are few against its kRows·kVectors multiplications.

namespace synface {
namespace {
namespace SYNFACE_ISA_NAMESPACE {

template <class T>
struct Vectors {
  typedef T type __attribute__((vector_size(SYNFACE_VECTOR_BYTES)));
  using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Integer integer __attribute__((vector_size(SYNFACE_VECTOR_BYTES)));
  static constexpr int lanes = SYNFACE_VECTOR_BYTES / sizeof(T);
};
template <class T>
using Vector = typename Vectors<T>::type;

// 12·2 sums of 32 registers, or 6·2 of 16, leave room for the row of B and an element of A.
constexpr int kRows = SYNFACE_VECTOR_BYTES == 64 ? 12 : 6;
constexpr int kVectors = 2;
template <class T>
constexpr int64_t kColumns = kVectors * Vectors<T>::lanes;

// sum += a·b
#if SYNFACE_FMA && SYNFACE_VECTOR_BYTES == 64
inline void multiply_add(Vector<float>& sum, float a, Vector<float> b) {
  sum = _mm512_fmadd_ps(_mm512_set1_ps(a), b, sum);
}
inline void multiply_add(Vector<double>& sum, double a, Vector<double> b) {
  sum = _mm512_fmadd_pd(_mm512_set1_pd(a), b, sum);
}
#elif SYNFACE_FMA && SYNFACE_VECTOR_BYTES == 32
inline void multiply_add(Vector<float>& sum, float a, Vector<float> b) {
  sum = _mm256_fmadd_ps(_mm256_set1_ps(a), b, sum);
}
inline void multiply_add(Vector<double>& sum, double a, Vector<double> b) {
  sum = _mm256_fmadd_pd(_mm256_set1_pd(a), b, sum);
}
#else
template <class T>
inline void multiply_add(Vector<T>& sum, T a, Vector<T> b) {
  sum += a * b;
}
#endif

// Computes Rows × kColumns of C, of which `columns` exist.
template <class T, int Rows, bool Unit>
void block(Left<T> a, const T* b, int64_t depth, T* c, int64_t c_row, int64_t columns,
           bool accumulate) {
  constexpr int lanes = Vectors<T>::lanes;
  Vector<T> sums[Rows][kVectors] = {};
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {  // prefetched while the sums are computed
    for (int v = 0; v < kVectors; ++v) __builtin_prefetch(c + i * c_row + v * lanes, 1);
  }
  // One of the two strides is known, which spares the address arithmetic.
  const int64_t row = Unit ? a.row : 1, column = Unit ? 1 : a.column;
  for (int64_t p = 0; p < depth; ++p) {
    Vector<T> right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      right[v] = *reinterpret_cast<const Vector<T>*>(b + p * kColumns<T> + v * lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const T left = a.data[i * row + p * column];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) multiply_add(sums[i][v], left, right[v]);
    }
  }
  if (columns == kColumns<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        T* to = c + i * c_row + v * lanes;  // of any alignment
        Vector<T> before = {};
        if (accumulate) std::memcpy(&before, to, sizeof before);
        const Vector<T> after = before + sums[i][v];
        std::memcpy(to, &after, sizeof after);
      }
    }
    return;
  }
  for (int i = 0; i < Rows; ++i) {
    T* to = c + i * c_row;
    for (int64_t j = 0; j < columns; ++j) {
      const T sum = sums[i][j / lanes][j % lanes];
      to[j] = accumulate ? to[j] + sum : sum;
    }
  }
}

// Computes a block whose number of rows is known only at run time.
template <class T, bool Unit, int Rows = kRows>
void block_of(int64_t rows, Left<T> a, const T* b, int64_t depth, T* c, int64_t c_row,
              int64_t columns, bool accumulate) {
  if constexpr (Rows > 1) {
    if (rows < Rows) {
      return block_of<T, Unit, Rows - 1>(rows, a, b, depth, c, c_row, columns, accumulate);
    }
  }
  block<T, Rows, Unit>(a, b, depth, c, c_row, columns, accumulate);
}

template <class T, bool Unit>
void multiply_as(int64_t m, Left<T> a, const T* b, int64_t k, int64_t n, T* c, int64_t c_row,
                 bool accumulate) {
  const int64_t panels = (n + kColumns<T> - 1) / kColumns<T>;
  for (int64_t p = 0; p < k; p += kDepth) {
    const int64_t depth = std::min(kDepth, k - p);
    const T* slice = b + p * panels * kColumns<T>;
    for (int64_t i = 0; i < m; i += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, m - i);
      const Left<T> left{a.data + i * a.row + p * a.column, a.row, a.column};
      for (int64_t j = 0; j < n; j += kColumns<T>) {
        block_of<T, Unit>(rows, left, slice + j * depth, depth, c + i * c_row + j, c_row,
                          std::min(kColumns<T>, n - j), accumulate || p > 0);
      }
    }
  }
}

template <class T>
void multiply(int64_t m, Left<T> a, const T* b, int64_t k, int64_t n, T* c, int64_t c_row,
              bool accumulate) {
  if (k == 0 && !accumulate) {
    for (int64_t i = 0; i < m; ++i) std::fill_n(c + i * c_row, n, T(0));
  }
  (a.column == 1 ? multiply_as<T, true> : multiply_as<T, false>)(m, a, b, k, n, c, c_row,
                                                                 accumulate);
}

// Element l of the result is element which[l] of a and b concatenated.
template <class T>
Vector<T> shuffle(Vector<T> a, Vector<T> b, typename Vectors<T>::integer which) {
#ifdef __clang__  // its shuffle takes only constants
  Vector<T> picked;
  constexpr int lanes = Vectors<T>::lanes;
  for (int l = 0; l < lanes; ++l) picked[l] = which[l] < lanes ? a[which[l]] : b[which[l] - lanes];
  return picked;
#else
  return __builtin_shuffle(a, b, which);
#endif
}

// Transposes a square as wide as a vector: `lanes` rows at `from` into `lanes` rows at `to`.
template <class T>
void transpose(const T* from, int64_t from_row, T* to, int64_t to_row) {
  constexpr int lanes = Vectors<T>::lanes;
  typename Vectors<T>::integer low, high;  // of two vectors, interleaved
  for (int l = 0; l < lanes; ++l) {
    low[l] = l / 2 + l % 2 * lanes;
    high[l] = low[l] + lanes / 2;
  }
  Vector<T> rows[lanes], next[lanes];
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) std::memcpy(&rows[i], from + i * from_row, sizeof rows[i]);
#pragma GCC unroll 4
  for (int stage = 1; stage < lanes; stage *= 2) {  // each a perfect shuffle of all elements
#pragma GCC unroll 8
    for (int i = 0; i < lanes / 2; ++i) {
      next[2 * i] = shuffle<T>(rows[i], rows[i + lanes / 2], low);
      next[2 * i + 1] = shuffle<T>(rows[i], rows[i + lanes / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) rows[i] = next[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) std::memcpy(to + i * to_row, &rows[i], sizeof rows[i]);
}

// Packs slices of kDepth rows, each in panels of kColumns columns; the last panel is padded with 0.
template <class T>
void fill(const T* from, int64_t k, int64_t n, int64_t row, int64_t column, T* to) {
  constexpr int64_t width = kColumns<T>, lanes = Vectors<T>::lanes;
  for (int64_t p = 0; p < k; p += kDepth) {
    const int64_t depth = std::min(kDepth, k - p);
    for (int64_t j = 0; j < n; j += width, to += depth * width) {
      const int64_t columns = std::min(width, n - j);
      int64_t q = 0;
      if (row == 1 && columns == width) {
        for (; q + lanes <= depth; q += lanes) {
          for (int64_t l = 0; l < width; l += lanes) {
            transpose(from + (p + q) + (j + l) * column, column, to + q * width + l, width);
          }
        }
      }
      for (; q < depth; ++q) {
        const T* at = from + (p + q) * row + j * column;
        if (column == 1 && columns == width) {
          std::memcpy(to + q * width, at, width * sizeof(T));
          continue;
        }
        for (int64_t l = 0; l < columns; ++l) to[q * width + l] = at[l * column];
        std::fill(to + q * width + columns, to + (q + 1) * width, T(0));
      }
    }
  }
}

template <class T>
constexpr Kernel<T> kernel{kColumns<T>, fill<T>, multiply<T>};

}  // namespace SYNFACE_ISA_NAMESPACE
}  // namespace
}  // namespace synface
