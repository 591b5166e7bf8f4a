// GPTQ weights on the CPU: dequantised, and multiplied with few rows of activations. Plain C ABI, called by native.py.
//
// qweight is [word rows, N] with the codes of one input row spread over the columns, so every loop runs over columns:
// the weight streams through once, in order, and sums wait in the cache. No result depends on the number of threads,
// which cut the columns; it may depend on the instruction set.

// Unlike Adam's, these sums have no twin to be equal to, so products and sums may fuse where the target can.
#pragma GCC optimize("fp-contract=fast")

#include <type_traits>
#include <vector>

#include "cpu_common.h"

namespace {

struct Gptq {
  const uint32_t* qweight;  // [word rows, N]
  const void* scales;       // [G, N], float16 or float32
  const uint8_t* zeros;     // [G, N], or null: all are `middle`
  int64_t in_features, out_features, group_size;
  int bits;
  bool half_scales;
};

ALWAYS_INLINE float scale_at(const Gptq& w, int64_t at) {
  return w.half_scales ? Float16::load(static_cast<const uint16_t*>(w.scales) + at)
                       : static_cast<const float*>(w.scales)[at];
}

// ---- dequantise ----

constexpr int64_t kColumns = 512;  // of one row at a time: scales and zero-points of a group stay in the first cache

template <class Format>
ALWAYS_INLINE void store_value(typename Format::Storage* p, float value) {
  if constexpr (std::is_same_v<Format, Float32>) {
    *p = value;
  } else {
    Format::store(p, value);
  }
}

// Rows [first, last) as stored, columns [column, column + columns), to row perm[k] (or k) of out [K, columns].
template <class Format>
ALWAYS_INLINE void dequantize_loop(const Gptq& w, const int32_t* perm, void* out, int64_t column, int64_t columns,
                                   int64_t first, int64_t last) {
  alignas(64) float scale[kColumns];
  alignas(64) float zero[kColumns];
  const uint32_t mask = (1u << w.bits) - 1;
  for (int64_t left = 0; left < columns; left += kColumns) {
    const int64_t width = std::min(kColumns, columns - left);
    int64_t group = -1;
    for (int64_t k = first; k < last; ++k) {
      if (k / w.group_size != group) {
        group = k / w.group_size;
        const int64_t at = group * w.out_features + column + left;
        for (int64_t n = 0; n < width; ++n) scale[n] = scale_at(w, at + n);
        for (int64_t n = 0; n < width; ++n) zero[n] = w.zeros ? float(w.zeros[at + n]) : float(1 << (w.bits - 1));
      }
      const int shift = int(k * w.bits % 32);
      const uint32_t* low = w.qweight + k * w.bits / 32 * w.out_features + column + left;
      // A code that lies across two words has its upper bits in the lowest ones of the next.
      const bool across = shift + w.bits > 32;
      const uint32_t* high = across ? low + w.out_features : low;
      const int high_shift = across ? 32 - shift : 31;
      const uint32_t high_mask = across ? ~0u : 0u;
      auto* row = static_cast<typename Format::Storage*>(out) + (perm ? perm[k] : k) * columns + left;
#pragma omp simd
      for (int64_t n = 0; n < width; ++n) {
        const uint32_t code = (low[n] >> shift | (high[n] & high_mask) << high_shift) & mask;
        store_value<Format>(row + n, (float(int32_t(code)) - zero[n]) * scale[n]);
      }
    }
  }
}

// ---- multiply ----
// y[m][n] = sum over groups of scale * (sum of x * (code - middle) - (zero - middle) * sum of x): scale and zero-point
// stay out of the loop over codes. A way to multiply says what its codes' middle is, and into how many rows of what
// kind it splits one row of x.

struct Product {
  Gptq w;
  const float* x;       // [M, x_stride]: zeros beyond K, so that the last word needs no care
  const float* x_sums;  // [M, G]: of each group's x
  float* y;             // [M, N]
  int64_t rows, x_stride, groups;
  int x_terms;                    // upper halves of float32 that make up an x without loss
  std::vector<uint32_t> x_pairs;  // [M, x_terms, x_stride / 2], for PairProducts

  const uint32_t* words(int64_t word, int64_t column) const { return w.qweight + word * w.out_features + column; }
};

// Vectors of kLanes float32, of which kMost are worked on together for one or two rows of x, and kFew for four: so many
// that the sums stay in registers. GCC's vector extension lowers them to what the target has.
template <int kLanesOfOne, int kMostTogether, int kFewTogether>
struct Vectors {
  static constexpr int kLanes = kLanesOfOne, kMost = kMostTogether, kFew = kFewTogether;
  typedef float Floats __attribute__((vector_size(4 * kLanes), aligned(4)));
  typedef int32_t Ints __attribute__((vector_size(4 * kLanes), aligned(4)));
  typedef uint32_t Words __attribute__((vector_size(4 * kLanes), aligned(4)));
};

// In float32.
template <class V>
struct VectorProducts {
  static constexpr int kLanes = V::kLanes, kColumns = V::kLanes * V::kMost;

  static int terms(const Product&) { return 1; }
  static constexpr int middle(int) { return 0; }
  template <int kBits>
  static void split(Product&) {}

  // sums[m][n] = sum of x[m][k] * code[k][n] over the codes k of `count` word rows, for kVectors vectors of columns.
  template <int kBits, int kRows, int kVectors>
  static ALWAYS_INLINE void block(const uint32_t* words, int64_t words_stride, const float* x, int64_t x_stride,
                                  float* sums, int64_t sums_stride, int64_t count) {
    constexpr int kFields = 32 / kBits;
    constexpr int32_t kMask = (1 << kBits) - 1;
    typename V::Floats sum[kRows][kVectors] = {};
    for (int64_t word = 0; word < count; ++word, words += words_stride, x += kFields) {
      typename V::Words codes[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        codes[v] = *reinterpret_cast<const typename V::Words*>(words + v * kLanes);
        // The next block of this row: rows lie pages apart, where the processor does not look ahead. May lie beyond
        // the end.
        __builtin_prefetch(words + (kVectors + v) * kLanes);
      }
#pragma GCC unroll 16
      for (int j = 0; j < kFields; ++j) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const auto code = (typename V::Ints)(codes[v] >> (j * kBits)) & kMask;
          const auto value = __builtin_convertvector(code, typename V::Floats);
#pragma GCC unroll 4
          for (int m = 0; m < kRows; ++m) sum[m][v] += value * x[m * x_stride + j];
        }
      }
    }
    for (int m = 0; m < kRows; ++m)
      for (int v = 0; v < kVectors; ++v)
        *reinterpret_cast<typename V::Floats*>(sums + m * sums_stride + v * kLanes) = sum[m][v];
  }

  // The same for fewer columns than a block has, and one row of x.
  template <int kBits>
  static ALWAYS_INLINE void tail(const uint32_t* words, int64_t words_stride, const float* x, float* sums,
                                 int64_t columns, int64_t count) {
    constexpr int kFields = 32 / kBits;
    constexpr int32_t kMask = (1 << kBits) - 1;
    std::fill(sums, sums + columns, 0.0f);
    for (int64_t word = 0; word < count; ++word, words += words_stride, x += kFields)
      for (int j = 0; j < kFields; ++j)
        for (int64_t n = 0; n < columns; ++n) sums[n] += float(int32_t(words[n] >> (j * kBits)) & kMask) * x[j];
  }

  // sums [M, width] over `count` word rows from `word` on, in the columns from `left` on.
  template <int kBits>
  static ALWAYS_INLINE void group(const Product& p, int64_t word, int64_t count, int64_t left, int64_t width,
                                  float* sums) {
    const int64_t stride = p.w.out_features, whole = width / kColumns * kColumns;
    const uint32_t* words = p.words(word, left);
    const float* x = p.x + word * (32 / kBits);
    for (int64_t n = 0; n < whole; n += kColumns) {
      int64_t m = 0;
      for (; m + 4 <= p.rows; m += 4)
        for (int64_t at = n; at < n + kColumns; at += kLanes * V::kFew)
          block<kBits, 4, V::kFew>(words + at, stride, x + m * p.x_stride, p.x_stride, sums + m * width + at, width,
                                count);
      for (; m + 2 <= p.rows; m += 2)
        block<kBits, 2, V::kMost>(words + n, stride, x + m * p.x_stride, p.x_stride, sums + m * width + n, width,
                                  count);
      for (; m < p.rows; ++m)
        block<kBits, 1, V::kMost>(words + n, stride, x + m * p.x_stride, p.x_stride, sums + m * width + n, width,
                                  count);
    }
    if (whole < width)
      for (int64_t m = 0; m < p.rows; ++m)
        tail<kBits>(words + whole, stride, x + m * p.x_stride, sums + m * width + whole, width - whole, count);
  }
};

#ifdef X86_DISPATCH
// By vectors of 16 sums of two products of bfloat16, for 2 and 4 bits. A word's halves have fields j and j + F / 2 at
// the same place, F = 32 / kBits: looking up the lowest five bits of each in a table of 32 makes both of them bfloat16
// numbers, without a mask, the middle already taken off. x is laid out in the same pairs. One that is more than a
// bfloat16 is the sum of two or three, each with a row of its own, so that nothing is lost.
struct PairProducts {
  using Words = Vectors<16, 4, 4>::Words;

  static int terms(const Product& p) { return p.x_terms; }
  static constexpr int middle(int bits) { return 1 << (bits - 1); }

  template <int kBits>
  static void split(Product& p) {
    constexpr int kHalf = 16 / kBits;
    p.x_pairs.resize(size_t(p.rows * p.x_terms * p.x_stride / 2));
    uint32_t* pair = p.x_pairs.data();
    for (int64_t m = 0; m < p.rows; ++m)
      for (int term = 0; term < p.x_terms; ++term)
        for (const float* x = p.x + m * p.x_stride; x < p.x + (m + 1) * p.x_stride; x += 2 * kHalf)
          for (int j = 0; j < kHalf; ++j) *pair++ = upper(x[j], term) >> 16 | upper(x[j + kHalf], term);
  }

  // The upper half of x, or of what `before` such terms leave of it.
  static ALWAYS_INLINE uint32_t upper(float x, int before) {
    constexpr uint32_t kUpper = 0xffff0000u;
    for (; before > 0; --before) x -= bit_cast<float>(bit_cast<uint32_t>(x) & kUpper);
    return bit_cast<uint32_t>(x) & kUpper;
  }

  // Where a block of columns begins; of its last vector, those in `last` belong to it.
  struct Block {
    const uint32_t* words;
    const uint32_t* ahead;  // what comes next: word rows lie pages apart, where the processor does not look ahead
    const uint32_t* x;      // of the rows that are left
    float* sums;
    __mmask16 last;
  };

  // As in VectorProducts, for kRows rows of x_pairs.
  template <int kBits, int kRows, int kVectors>
  AVX512_BF16_INLINE static void block(Block at, int64_t words_stride, int64_t x_stride, int64_t sums_stride,
                                       int64_t count, __m512i table) {
    constexpr int kHalf = 16 / kBits;
    __m512 sum[kRows][kVectors];
    for (int m = 0; m < kRows; ++m)
      for (int v = 0; v < kVectors; ++v) sum[m][v] = _mm512_setzero_ps();
    for (int64_t word = 0; word < count; ++word) {
      Words codes[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        codes[v] = (Words)_mm512_maskz_loadu_epi32(v + 1 < kVectors ? 0xffff : at.last, at.words + v * 16);
        __builtin_prefetch(at.ahead + v * 16);
      }
#pragma GCC unroll 8
      for (int j = 0; j < kHalf; ++j) {
        __m512bh value[kVectors];
        for (int v = 0; v < kVectors; ++v)
          value[v] = (__m512bh)_mm512_permutexvar_epi16((__m512i)(codes[v] >> (j * kBits)), table);
        for (int m = 0; m < kRows; ++m) {
          const auto pair = (__m512bh)_mm512_set1_epi32(int(at.x[m * x_stride + j]));
          for (int v = 0; v < kVectors; ++v) sum[m][v] = _mm512_dpbf16_ps(sum[m][v], value[v], pair);
        }
      }
      at.words += words_stride;
      at.ahead += words_stride;
      at.x += kHalf;
    }
    for (int m = 0; m < kRows; ++m)
      for (int v = 0; v < kVectors; ++v)
        _mm512_mask_storeu_ps(at.sums + m * sums_stride + v * 16, v + 1 < kVectors ? 0xffff : at.last, sum[m][v]);
  }

  template <int kBits, int kVectors>
  AVX512_BF16_INLINE static void all_rows(const Product& p, Block at, int64_t sums_stride, int64_t count,
                                          __m512i table) {
    const int64_t stride = p.w.out_features, x_stride = p.x_stride / 2;
    for (int64_t left = p.rows * p.x_terms; left > 0; left -= 4) {
      if (left >= 4)
        block<kBits, 4, kVectors>(at, stride, x_stride, sums_stride, count, table);
      else if (left == 3)
        block<kBits, 3, kVectors>(at, stride, x_stride, sums_stride, count, table);
      else if (left == 2)
        block<kBits, 2, kVectors>(at, stride, x_stride, sums_stride, count, table);
      else
        block<kBits, 1, kVectors>(at, stride, x_stride, sums_stride, count, table);
      at.x += 4 * x_stride;
      at.sums += 4 * sums_stride;
    }
  }

  // sums [M * terms, width] over `count` word rows from `word` on, in the columns from `left` on.
  template <int kBits>
  AVX512_BF16 static void group(const Product& p, int64_t word, int64_t count, int64_t left, int64_t width,
                                float* sums) {
    alignas(64) uint16_t values[32];
    for (int i = 0; i < 32; ++i)
      values[i] = uint16_t(bit_cast<uint32_t>(float((i & ((1 << kBits) - 1)) - middle(kBits))) >> 16);
    const __m512i table = _mm512_load_si512(values);
    const uint32_t* x = p.x_pairs.data() + word * (16 / kBits);
    const uint32_t* next_group = p.words(word + count, left);  // may lie beyond the end, which a prefetch may
    int64_t n = 0;
    for (; n + 64 <= width; n += 64) {
      const uint32_t* ahead = n + 64 < width ? p.words(word, left + n + 64) : next_group;
      all_rows<kBits, 4>(p, {p.words(word, left + n), ahead, x, sums + n, 0xffff}, width, count, table);
    }
    for (; n < width; n += 16) {
      const auto last = __mmask16(width - n >= 16 ? 0xffff : (1 << (width - n)) - 1);
      all_rows<kBits, 1>(p, {p.words(word, left + n), next_group, x, sums + n, last}, width, count, table);
    }
  }
};
#endif

constexpr int64_t kWidth = 2048;  // columns at a time, whose sums stay in the cache

// Columns [first, last) of y.
template <class Products, int kBits>
ALWAYS_INLINE void multiply_loop(const Product& p, int64_t first, int64_t last) {
  constexpr int64_t kFields = 32 / kBits;
  const Gptq& w = p.w;
  const int64_t terms = Products::terms(p);
  std::vector<float> sums(size_t(p.rows * terms * kWidth));
  alignas(64) float scale[kWidth];
  alignas(64) float zero[kWidth];
  for (int64_t left = first; left < last; left += kWidth) {
    const int64_t width = std::min(kWidth, last - left);
    for (int64_t group = 0; group < p.groups; ++group) {
      const int64_t word = group * w.group_size / kFields;
      const int64_t word_end = group + 1 < p.groups ? word + w.group_size / kFields : p.x_stride / kFields;
      Products::template group<kBits>(p, word, word_end - word, left, width, sums.data());
      const int64_t at = group * w.out_features + left;
      constexpr int kMiddle = Products::middle(kBits);
      for (int64_t n = 0; n < width; ++n) scale[n] = scale_at(w, at + n);
      for (int64_t n = 0; n < width; ++n) zero[n] = float((w.zeros ? w.zeros[at + n] : 1 << (kBits - 1)) - kMiddle);
      for (int64_t m = 0; m < p.rows; ++m) {
        const float x_sum = p.x_sums[m * p.groups + group];
        float* sum = sums.data() + m * terms * width;
        for (int64_t term = 1; term < terms; ++term)
          for (int64_t n = 0; n < width; ++n) sum[n] += sum[term * width + n];
        float* y = p.y + m * w.out_features + left;
#pragma omp simd
        for (int64_t n = 0; n < width; ++n) {
          const float scaled = scale[n] * (sum[n] - zero[n] * x_sum);
          y[n] = group == 0 ? scaled : y[n] + scaled;
        }
      }
    }
  }
}

// ---- instruction sets ----

#define FOR_ISA(name, target, FewBits, ManyBits)                                                              \
  struct name {                                                                                               \
    template <int kBits>                                                                                      \
    using Products = std::conditional_t<(kBits < 8), FewBits, ManyBits>;                                      \
    template <class Format>                                                                                   \
    static target void dequantize(const Gptq& w, const int32_t* perm, void* out, int64_t column,              \
                                  int64_t columns, int64_t first, int64_t last) {                             \
      dequantize_loop<Format>(w, perm, out, column, columns, first, last);                                    \
    }                                                                                                         \
    template <int kBits>                                                                                      \
    static target void multiply(const Product& p, int64_t first, int64_t last) {                              \
      multiply_loop<Products<kBits>, kBits>(p, first, last);                                                  \
    }                                                                                                         \
  };

using Vectors4 = VectorProducts<Vectors<4, 4, 2>>;
using Vectors8 = VectorProducts<Vectors<8, 4, 2>>;
using Vectors16 = VectorProducts<Vectors<16, 4, 4>>;

FOR_ISA(Baseline, , Vectors4, Vectors4)
#ifdef X86_DISPATCH
FOR_ISA(Avx2, __attribute__((target("avx2,f16c,fma"))), Vectors8, Vectors8)
FOR_ISA(Avx512, AVX512_FMA, Vectors16, Vectors16)
FOR_ISA(Avx512Bf16, AVX512_BF16, PairProducts, Vectors16)
using Sets = IsaSets<Baseline, Avx2, Avx512, Avx512Bf16>;
#else
using Sets = IsaSets<Baseline>;
#endif

}  // namespace

extern "C" {

// `out` is [K, columns] of `dtype`: the columns from `column` on. `perm` may be null.
void megalith_cpu_gptq_dequantize(int bits, const uint32_t* qweight, const void* scales, int half_scales,
                                  const uint8_t* zeros, const int32_t* perm, int64_t in_features, int64_t out_features,
                                  int64_t group_size, int dtype, void* out, int64_t column, int64_t columns, int isa,
                                  int threads) {
  const Gptq w{qweight, scales, zeros, in_features, out_features, group_size, bits, half_scales != 0};
  with_format(dtype, [&](auto format) {
    Sets::visit(isa, [&](auto set) {
      // Granules of 32 rows end where words do, whatever the bits.
      parallel_ranges(in_features, 32, threads, [&](int64_t first, int64_t last) {
        decltype(set)::template dequantize<decltype(format)>(w, perm, out, column, columns, first, last);
      });
    });
  });
}

// y [M, N] = x [M, K] times the weight, rows as stored. `bits` is 2, 4 or 8, and either there is one group, or whole
// words make up each. x holds numbers of `dtype`, and two or three of bfloat16 make up a float16 or float32.
void megalith_cpu_gptq_matmul(int bits, const uint32_t* qweight, const void* scales, int half_scales,
                              const uint8_t* zeros, int64_t in_features, int64_t out_features, int64_t group_size,
                              const float* x, int dtype, float* y, int64_t rows, int isa, int threads) {
  const int64_t fields = 32 / bits, x_stride = (in_features + fields - 1) / fields * fields;
  const int64_t groups = (in_features + group_size - 1) / group_size;
  std::vector<float> padded(size_t(rows * x_stride)), x_sums(size_t(rows * groups));
  for (int64_t m = 0; m < rows; ++m) {
    std::copy(x + m * in_features, x + (m + 1) * in_features, padded.begin() + m * x_stride);
    for (int64_t group = 0; group < groups; ++group) {
      double sum = 0.0;
      const int64_t end = std::min(in_features, (group + 1) * group_size);
      for (int64_t k = group * group_size; k < end; ++k) sum += x[m * in_features + k];
      x_sums[m * groups + group] = float(sum);
    }
  }
  const Gptq w{qweight, scales, zeros, in_features, out_features, group_size, bits, half_scales != 0};
  const int x_terms = dtype == kDtypeBFloat16 ? 1 : dtype == kDtypeFloat16 ? 2 : 3;
  Product product{w, padded.data(), x_sums.data(), y, rows, x_stride, groups, x_terms, {}};
  // Three rows where float32 has one pay only while the weight's bytes take longer than the sums.
  const bool in_float32 = dtype == kDtypeFloat32 && rows > 1;
  Sets::visit(in_float32 ? std::min<int>(isa, kAvx512) : isa, [&](auto set) {
    using Set = decltype(set);
    const auto run = [&](auto number) {
      constexpr int kBits = decltype(number)::value;
      Set::template Products<kBits>::template split<kBits>(product);
      parallel_ranges(out_features, 64, threads, [&](int64_t first, int64_t last) {
        Set::template multiply<kBits>(product, first, last);
      });
    };
    if (bits == 2) run(std::integral_constant<int, 2>{});
    if (bits == 4) run(std::integral_constant<int, 4>{});
    if (bits == 8) run(std::integral_constant<int, 8>{});
  });
}

}  // extern "C"
