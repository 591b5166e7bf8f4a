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

// Vectors of kLanes float32, of which kMost are worked on together for one or two rows of x, and kFew for four: so many
// that the sums stay in registers. GCC's vector extension lowers them to what the target has.
template <int kLanesOfOne, int kMostTogether, int kFewTogether>
struct Vectors {
  static constexpr int kLanes = kLanesOfOne, kMost = kMostTogether, kFew = kFewTogether;
  typedef float Floats __attribute__((vector_size(4 * kLanes), aligned(4)));
  typedef int32_t Ints __attribute__((vector_size(4 * kLanes), aligned(4)));
  typedef uint32_t Words __attribute__((vector_size(4 * kLanes), aligned(4)));
};

// sums[m][n] = sum of x[m][k] * code[k][n] over the codes k of `count` word rows, for kVectors vectors of columns.
template <class V, int kBits, int kRows, int kVectors>
ALWAYS_INLINE void block_products(const uint32_t* words, int64_t words_stride, const float* x, int64_t x_stride,
                                  float* sums, int64_t sums_stride, int64_t count) {
  constexpr int kFields = 32 / kBits;
  constexpr int32_t kMask = (1 << kBits) - 1;
  typename V::Floats sum[kRows][kVectors] = {};
  for (int64_t word = 0; word < count; ++word, words += words_stride, x += kFields) {
    typename V::Words codes[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      codes[v] = *reinterpret_cast<const typename V::Words*>(words + v * V::kLanes);
      // The next block of this row: rows lie pages apart, where the processor does not look ahead. Harmless at the end.
      __builtin_prefetch(words + (kVectors + v) * V::kLanes);
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
      *reinterpret_cast<typename V::Floats*>(sums + m * sums_stride + v * V::kLanes) = sum[m][v];
}

// The same for fewer columns than a block has, and one row of x.
template <int kBits>
ALWAYS_INLINE void tail_products(const uint32_t* words, int64_t words_stride, const float* x, float* sums,
                                 int64_t columns, int64_t count) {
  constexpr int kFields = 32 / kBits;
  constexpr int32_t kMask = (1 << kBits) - 1;
  std::fill(sums, sums + columns, 0.0f);
  for (int64_t word = 0; word < count; ++word, words += words_stride, x += kFields)
    for (int j = 0; j < kFields; ++j)
      for (int64_t n = 0; n < columns; ++n) sums[n] += float(int32_t(words[n] >> (j * kBits)) & kMask) * x[j];
}

// The sums of one group, whose first word row is `words` and whose x starts at `x`: [rows, width].
template <class V, int kBits>
ALWAYS_INLINE void group_products(const uint32_t* words, int64_t words_stride, const float* x, int64_t x_stride,
                                  int64_t rows, float* sums, int64_t width, int64_t count) {
  constexpr int64_t kColumns = V::kLanes * V::kMost;
  const int64_t whole = width / kColumns * kColumns;
  for (int64_t n = 0; n < whole; n += kColumns) {
    int64_t m = 0;
    for (; m + 4 <= rows; m += 4)
      for (int64_t at = n; at < n + kColumns; at += V::kLanes * V::kFew)
        block_products<V, kBits, 4, V::kFew>(words + at, words_stride, x + m * x_stride, x_stride,
                                             sums + m * width + at, width, count);
    for (; m + 2 <= rows; m += 2)
      block_products<V, kBits, 2, V::kMost>(words + n, words_stride, x + m * x_stride, x_stride, sums + m * width + n,
                                            width, count);
    for (; m < rows; ++m)
      block_products<V, kBits, 1, V::kMost>(words + n, words_stride, x + m * x_stride, x_stride, sums + m * width + n,
                                            width, count);
  }
  if (whole < width)
    for (int64_t m = 0; m < rows; ++m)
      tail_products<kBits>(words + whole, words_stride, x + m * x_stride, sums + m * width + whole, width - whole,
                           count);
}

struct Product {
  Gptq w;
  const float* x;       // [M, x_stride]: zeros beyond K, so that the last word needs no care
  const float* x_sums;  // [M, G]: of each group's x
  float* y;             // [M, N]
  int64_t rows, x_stride, groups;
};

constexpr int64_t kWidth = 1024;  // columns at a time, whose sums stay in the cache

// y[m][n] = sum over groups of scale * (sum of x * code - zero * sum of x): scale and zero-point stay out of the loop
// over codes. Columns [first, last).
template <class V, int kBits>
ALWAYS_INLINE void multiply_loop(const Product& p, int64_t first, int64_t last) {
  constexpr int64_t kFields = 32 / kBits;
  const Gptq& w = p.w;
  std::vector<float> sums(size_t(p.rows * kWidth));
  for (int64_t left = first; left < last; left += kWidth) {
    const int64_t width = std::min(kWidth, last - left);
    for (int64_t group = 0; group < p.groups; ++group) {
      const int64_t word = group * w.group_size / kFields;
      const int64_t word_end = group + 1 < p.groups ? word + w.group_size / kFields : p.x_stride / kFields;
      group_products<V, kBits>(w.qweight + word * w.out_features + left, w.out_features, p.x + word * kFields,
                               p.x_stride, p.rows, sums.data(), width, word_end - word);
      const int64_t at = group * w.out_features + left;
      for (int64_t m = 0; m < p.rows; ++m) {
        const float x_sum = p.x_sums[m * p.groups + group];
        const float* sum = sums.data() + m * width;
        float* y = p.y + m * w.out_features + left;
#pragma omp simd
        for (int64_t n = 0; n < width; ++n) {
          const float zero = w.zeros ? float(w.zeros[at + n]) : float(1 << (kBits - 1));
          const float scaled = scale_at(w, at + n) * (sum[n] - zero * x_sum);
          y[n] = group == 0 ? scaled : y[n] + scaled;
        }
      }
    }
  }
}

// ---- instruction sets ----

#define FOR_ISA(name, target, vectors)                                                                        \
  struct name {                                                                                               \
    template <class Format>                                                                                   \
    static target void dequantize(const Gptq& w, const int32_t* perm, void* out, int64_t column,              \
                                  int64_t columns, int64_t first, int64_t last) {                             \
      dequantize_loop<Format>(w, perm, out, column, columns, first, last);                                    \
    }                                                                                                         \
    template <int kBits>                                                                                      \
    static target void multiply(const Product& p, int64_t first, int64_t last) {                              \
      multiply_loop<vectors, kBits>(p, first, last);                                                          \
    }                                                                                                         \
  };

using Vectors4 = Vectors<4, 4, 2>;
using Vectors8 = Vectors<8, 4, 2>;
using Vectors16 = Vectors<16, 4, 4>;

FOR_ISA(Baseline, , Vectors4)
#ifdef X86_DISPATCH
FOR_ISA(Avx2, __attribute__((target("avx2,f16c,fma"))), Vectors8)
FOR_ISA(Avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,f16c,fma,prefer-vector-width=512"))), Vectors16)
#endif

template <class Visitor>
void with_isa([[maybe_unused]] int isa, Visitor visit) {
#ifdef X86_DISPATCH
  if (isa == kAvx512) return visit(Avx512{});
  if (isa == kAvx2) return visit(Avx2{});
#endif
  visit(Baseline{});
}

}  // namespace

extern "C" {

// `out` is [K, columns] of `dtype`: the columns from `column` on. `perm` may be null.
void megalith_cpu_gptq_dequantize(int bits, const uint32_t* qweight, const void* scales, int half_scales,
                                  const uint8_t* zeros, const int32_t* perm, int64_t in_features, int64_t out_features,
                                  int64_t group_size, int dtype, void* out, int64_t column, int64_t columns, int isa,
                                  int threads) {
  const Gptq w{qweight, scales, zeros, in_features, out_features, group_size, bits, half_scales != 0};
  with_format(dtype, [&](auto format) {
    with_isa(isa, [&](auto set) {
      // Granules of 32 rows end where words do, whatever the bits.
      parallel_ranges(in_features, 32, threads, [&](int64_t first, int64_t last) {
        decltype(set)::template dequantize<decltype(format)>(w, perm, out, column, columns, first, last);
      });
    });
  });
}

// y [M, N] = x [M, K] times the weight, rows as stored. `bits` is 2, 4 or 8, and either there is one group, or whole
// words make up each.
void megalith_cpu_gptq_matmul(int bits, const uint32_t* qweight, const void* scales, int half_scales,
                              const uint8_t* zeros, int64_t in_features, int64_t out_features, int64_t group_size,
                              const float* x, float* y, int64_t rows, int isa, int threads) {
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
  const Product product{w, padded.data(), x_sums.data(), y, rows, x_stride, groups};
  with_isa(isa, [&](auto set) {
    using Set = decltype(set);
    const auto multiply = bits == 2 ? Set::template multiply<2> : bits == 4 ? Set::template multiply<4>
                                                                            : Set::template multiply<8>;
    parallel_ranges(out_features, 64, threads, [&](int64_t first, int64_t last) { multiply(product, first, last); });
  });
}

}  // extern "C"
