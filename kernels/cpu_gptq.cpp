// GPTQ weights on the CPU: dequantised, and multiplied with few rows of activations. Plain C ABI, called by native.py.
//
// qweight is [word rows, N] with the codes of one input row spread over the columns, so every loop runs over columns:
// the weight streams through once, in order, and sums wait in the cache. No result depends on the number of threads,
// which cut the columns. The sums of AVX2 and AVX-512 use fused multiply-adds, the baseline's do not.

#include <cmath>
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

template <bool kFused>
ALWAYS_INLINE float multiply_add(float a, float b, float c) {
  return kFused ? __builtin_fmaf(a, b, c) : a * b + c;
}

// sums[m][n] += x[m][k] * code[k][n] over the codes k of the word rows [first, last). x is [kRows, x_stride], padded to
// whole words; sums is [kRows, width].
template <bool kFused, int kBits, int kRows>
ALWAYS_INLINE void add_products(const uint32_t* qweight, int64_t out_features, const float* x, int64_t x_stride,
                                float* sums, int64_t width, int64_t first, int64_t last) {
  constexpr int kFields = 32 / kBits;
  constexpr int32_t kMask = (1 << kBits) - 1;
  for (int64_t word = first; word < last; ++word) {
    const uint32_t* words = qweight + word * out_features;
    const float* x_word = x + word * kFields;
#pragma omp simd
    for (int64_t n = 0; n < width; ++n) {
      const uint32_t codes = words[n];
      float sum[kRows];
      for (int m = 0; m < kRows; ++m) sum[m] = sums[m * width + n];
#pragma GCC unroll 16
      for (int j = 0; j < kFields; ++j) {
        const float code = float(int32_t(codes >> (j * kBits)) & kMask);
        for (int m = 0; m < kRows; ++m) sum[m] = multiply_add<kFused>(code, x_word[m * x_stride + j], sum[m]);
      }
      for (int m = 0; m < kRows; ++m) sums[m * width + n] = sum[m];
    }
  }
}

struct Product {
  Gptq w;
  const float* x;       // [M, x_stride]: zeros beyond K, so that the last word needs no care
  const float* x_sums;  // [M, G]: of each group's x
  float* y;             // [M, N]
  int64_t rows, x_stride, groups, width;
};

// y[m][n] = sum over groups of scale * (sum of x * code - zero * sum of x): scale and zero-point stay out of the loop
// over codes. Columns [first, last).
template <bool kFused, int kBits>
ALWAYS_INLINE void multiply_loop(const Product& p, int64_t first, int64_t last) {
  constexpr int64_t kFields = 32 / kBits;
  const Gptq& w = p.w;
  const int64_t word_rows = p.x_stride / kFields;
  std::vector<float> sums(size_t(p.rows * p.width));
  for (int64_t left = first; left < last; left += p.width) {
    const int64_t width = std::min(p.width, last - left);
    for (int64_t group = 0; group < p.groups; ++group) {
      const int64_t word = group * w.group_size / kFields;
      const int64_t word_end = group + 1 < p.groups ? word + w.group_size / kFields : word_rows;
      const int64_t at = group * w.out_features + left;
      std::fill(sums.begin(), sums.end(), 0.0f);
      int64_t m = 0;
      for (; m + 4 <= p.rows; m += 4)
        add_products<kFused, kBits, 4>(w.qweight + left, w.out_features, p.x + m * p.x_stride, p.x_stride,
                                       sums.data() + m * width, width, word, word_end);
      for (; m < p.rows; ++m)
        add_products<kFused, kBits, 1>(w.qweight + left, w.out_features, p.x + m * p.x_stride, p.x_stride,
                                       sums.data() + m * width, width, word, word_end);
      for (m = 0; m < p.rows; ++m) {
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

#define FOR_ISA(name, target, fused)                                                                          \
  struct name {                                                                                               \
    template <class Format>                                                                                   \
    static target void dequantize(const Gptq& w, const int32_t* perm, void* out, int64_t column,              \
                                  int64_t columns, int64_t first, int64_t last) {                             \
      dequantize_loop<Format>(w, perm, out, column, columns, first, last);                                    \
    }                                                                                                         \
    template <int kBits>                                                                                      \
    static target void multiply(const Product& p, int64_t first, int64_t last) {                              \
      multiply_loop<fused, kBits>(p, first, last);                                                            \
    }                                                                                                         \
  };

FOR_ISA(Baseline, , false)
#ifdef X86_DISPATCH
FOR_ISA(Avx2, __attribute__((target("avx2,f16c,fma"))), true)
FOR_ISA(Avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,f16c,fma,prefer-vector-width=512"))), true)
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
                              const float* x, float* y, int64_t rows, int64_t width, int isa, int threads) {
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
  const Product product{w, padded.data(), x_sums.data(), y, rows, x_stride, groups, width};
  with_isa(isa, [&](auto set) {
    using Set = decltype(set);
    const auto multiply = bits == 2 ? Set::template multiply<2> : bits == 4 ? Set::template multiply<4>
                                                                            : Set::template multiply<8>;
    parallel_ranges(out_features, 64, threads, [&](int64_t first, int64_t last) { multiply(product, first, last); });
  });
}

}  // extern "C"
