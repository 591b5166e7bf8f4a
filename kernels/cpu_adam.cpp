// Adam and the sum of squares on the CPU, each in one pass over memory. Plain C ABI, loaded with ctypes by native.py.
//
// The bits of every result are fixed by reference.py: the same operations in the same order, each rounded on its own
// (compile with -ffp-contract=off). They do not depend on the number of threads, on where a shard was cut, or on the
// instruction set, which is chosen at run time.

#include <cmath>
#include <cstdlib>
#include <vector>

#include "cpu_common.h"

namespace {

// ---- where the master weight lives ----

struct MasterIsWeight {
  float* weight;
  ALWAYS_INLINE MasterIsWeight from(int64_t i) const { return {weight + i}; }
  ALWAYS_INLINE float load(int64_t i) const { return weight[i]; }
  ALWAYS_INLINE void store(int64_t i, float value) const { weight[i] = value; }
#ifdef X86_DISPATCH
  AVX2_INLINE __m256 load8(int64_t i) const { return _mm256_loadu_ps(weight + i); }
  AVX2_INLINE void store16(int64_t i, __m256 a, __m256 b) const {
    _mm256_storeu_ps(weight + i, a);
    _mm256_storeu_ps(weight + i + 8, b);
  }
  ALWAYS_INLINE void prefetch(int64_t i) const { __builtin_prefetch(weight + i); }
#endif
};

struct SplitMaster {  // split_master.py has the format and its reasons
  uint16_t* high;
  int16_t* low;
  ALWAYS_INLINE SplitMaster from(int64_t i) const { return {high + i, low + i}; }
  ALWAYS_INLINE float load(int64_t i) const {
    return bit_cast<float>((uint32_t(high[i]) << 16) + uint32_t(int32_t(low[i])));
  }
  ALWAYS_INLINE void store(int64_t i, float value) const {
    const uint32_t bits = bits_with_one_nan(value);
    high[i] = uint16_t((bits + 0x8000u) >> 16);
    low[i] = int16_t(bits);
  }
#ifdef X86_DISPATCH
  AVX2_INLINE __m256 load8(int64_t i) const {
    const __m256i low_words = _mm256_cvtepi16_epi32(load_halves(low + i));
    return _mm256_castsi256_ps(_mm256_add_epi32(load_high_halves(high + i), low_words));
  }
  AVX2_INLINE void store16(int64_t i, __m256 a, __m256 b) const {
    make_one_nan(a, b);
    const __m256i bits_a = _mm256_castps_si256(a), bits_b = _mm256_castps_si256(b), zero = _mm256_setzero_si256();
    store_low_halves(high + i, _mm256_srli_epi32(add(bits_a, 0x8000), 16), _mm256_srli_epi32(add(bits_b, 0x8000), 16));
    store_low_halves(low + i, _mm256_blend_epi16(bits_a, zero, 0xaa), _mm256_blend_epi16(bits_b, zero, 0xaa));
  }
  ALWAYS_INLINE void prefetch(int64_t i) const {
    __builtin_prefetch(high + i);
    __builtin_prefetch(low + i);
  }
#endif
};

template <class Half>
struct SeparateMaster {
  float* master;
  uint16_t* weight;
  ALWAYS_INLINE SeparateMaster from(int64_t i) const { return {master + i, weight + i}; }
  ALWAYS_INLINE float load(int64_t i) const { return master[i]; }
  ALWAYS_INLINE void store(int64_t i, float value) const {
    master[i] = value;
    Half::store(weight + i, value);
  }
#ifdef X86_DISPATCH
  AVX2_INLINE __m256 load8(int64_t i) const { return _mm256_loadu_ps(master + i); }
  AVX2_INLINE void store16(int64_t i, __m256 a, __m256 b) const {
    _mm256_storeu_ps(master + i, a);
    _mm256_storeu_ps(master + i + 8, b);
    Half::store16(weight + i, a, b);
  }
  ALWAYS_INLINE void prefetch(int64_t i) const { __builtin_prefetch(master + i); }
#endif
};

// ---- Adam ----

struct Scalars {  // the fields and their order are AdamScalars' in adam_step.py; factor is appended
  float one_minus_beta1, beta2, one_minus_beta2, decay, step_size, inverse_sqrt_bias2, eps, factor;
};

template <class Weight, class Grad>
struct AdamArguments {
  Weight weight;
  const typename Grad::Storage* grad;
  float* exp_avg;
  float* exp_avg_sq;
  Scalars s;
};

template <bool kDecoupled, class Weight, class Grad>
ALWAYS_INLINE void adam_loop(const AdamArguments<Weight, Grad>& arguments, int64_t begin, int64_t end) {
  const Weight weight = arguments.weight;
  const typename Grad::Storage* const grad = arguments.grad;
  float* const exp_avg = arguments.exp_avg;
  float* const exp_avg_sq = arguments.exp_avg_sq;
  const Scalars s = arguments.s;
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    float w = weight.load(i);
    float g = Grad::load(grad + i) * s.factor;
    if (kDecoupled) {
      w = w * s.decay;
    } else {
      g = g + w * s.decay;
    }
    const float old_m = exp_avg[i];
    const float m = (old_m - old_m * s.one_minus_beta1) + g * s.one_minus_beta1;
    const float v = exp_avg_sq[i] * s.beta2 + (g * g) * s.one_minus_beta2;
    const float denominator = std::sqrt(v) * s.inverse_sqrt_bias2 + s.eps;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    weight.store(i, w - (m * s.step_size) / denominator);
  }
}

#ifdef X86_DISPATCH
struct Scalars8 {
  __m256 one_minus_beta1, beta2, one_minus_beta2, decay, step_size, inverse_sqrt_bias2, eps, factor;
};

AVX2_INLINE Scalars8 broadcast(const Scalars& s) {
  return {_mm256_set1_ps(s.one_minus_beta1), _mm256_set1_ps(s.beta2),     _mm256_set1_ps(s.one_minus_beta2),
          _mm256_set1_ps(s.decay),           _mm256_set1_ps(s.step_size), _mm256_set1_ps(s.inverse_sqrt_bias2),
          _mm256_set1_ps(s.eps),             _mm256_set1_ps(s.factor)};
}

// adam_loop's body for elements i to i + 7; the new master is returned.
template <bool kDecoupled, class Weight, class Grad>
AVX2_INLINE __m256 adam8(const AdamArguments<Weight, Grad>& arguments, const Scalars8& s, int64_t i) {
  __m256 w = arguments.weight.load8(i);
  __m256 g = Grad::load8(arguments.grad + i) * s.factor;
  if (kDecoupled) {
    w = w * s.decay;
  } else {
    g = g + w * s.decay;
  }
  const __m256 old_m = _mm256_loadu_ps(arguments.exp_avg + i);
  const __m256 m = (old_m - old_m * s.one_minus_beta1) + g * s.one_minus_beta1;
  const __m256 v = _mm256_loadu_ps(arguments.exp_avg_sq + i) * s.beta2 + (g * g) * s.one_minus_beta2;
  const __m256 denominator = _mm256_sqrt_ps(v) * s.inverse_sqrt_bias2 + s.eps;
  _mm256_storeu_ps(arguments.exp_avg + i, m);
  _mm256_storeu_ps(arguments.exp_avg_sq + i, v);
  return w - (m * s.step_size) / denominator;
}

template <bool kDecoupled, class Weight, class Grad>
AVX2 void adam_loop_avx2(const AdamArguments<Weight, Grad>& arguments, int64_t begin, int64_t end) {
  const AdamArguments<Weight, Grad> local = arguments;
  const Scalars8 s = broadcast(local.s);
  // The processor's own prefetching stops at every page of every stream; a hint past the end of a tensor is harmless.
  constexpr int64_t kAhead = 256;
  int64_t i = begin;
  for (; i + 16 <= end; i += 16) {
    local.weight.prefetch(i + kAhead);
    __builtin_prefetch(local.grad + i + kAhead);
    __builtin_prefetch(local.exp_avg + i + kAhead);
    __builtin_prefetch(local.exp_avg_sq + i + kAhead);
    const __m256 a = adam8<kDecoupled>(local, s, i);
    const __m256 b = adam8<kDecoupled>(local, s, i + 8);
    local.weight.store16(i, a, b);
  }
  adam_loop<kDecoupled>(local, i, end);
}
#endif

// ---- moments in codes: moment_codes.py has the form and its reasons ----

constexpr int64_t kCodeBlock = 256;

struct Codes {
  int8_t* exp_avg;
  uint8_t* exp_avg_sq;
  float* scales;  // two a block
};

ALWAYS_INLINE float scale_of(const float* values, int64_t numel) {
  uint32_t most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < numel; ++i) most = std::max(most, bit_cast<uint32_t>(values[i]) & ~kSign);
  return bit_cast<float>(most);
}

ALWAYS_INLINE float fraction_of(float value, float divisor) {
  const float fraction = std::fabs(value) / divisor;
  return fraction <= 1.0f ? fraction : 1.0f;
}

// One block of at most kCodeBlock elements: decode, update with `loop`, encode.
template <class Weight, class Grad, class Loop>
ALWAYS_INLINE void adam_block(const AdamArguments<Weight, Grad>& arguments, const Codes& codes, int64_t begin,
                              int64_t numel, Loop loop) {
  alignas(64) float exp_avg[kCodeBlock];
  alignas(64) float exp_avg_sq[kCodeBlock];
  int8_t* const m_codes = codes.exp_avg + begin;
  uint8_t* const v_codes = codes.exp_avg_sq + begin;
  float* const scales = codes.scales + begin / kCodeBlock * 2;
  const float m_scale = scales[0], v_scale = scales[1];
#pragma omp simd
  for (int64_t i = 0; i < numel; ++i) {
    const float m = float(std::abs(int(m_codes[i]))) * float(1.0 / 127);
    const float v = float(int(v_codes[i])) * float(1.0 / 255);
    const float magnitude = (m * m) * m_scale;
    exp_avg[i] = m_codes[i] < 0 ? -magnitude : magnitude;
    exp_avg_sq[i] = ((v * v) * (v * v)) * v_scale;
  }
  loop({arguments.weight.from(begin), arguments.grad + begin, exp_avg, exp_avg_sq, arguments.s}, 0, numel);
  scales[0] = scale_of(exp_avg, numel);
  scales[1] = scale_of(exp_avg_sq, numel);
  const float m_divisor = scales[0] == 0.0f ? 1.0f : scales[0], v_divisor = scales[1] == 0.0f ? 1.0f : scales[1];
#pragma omp simd
  for (int64_t i = 0; i < numel; ++i) {
    const int m = int(std::sqrt(fraction_of(exp_avg[i], m_divisor)) * 127.0f + 0.5f);
    const int v = int(std::sqrt(std::sqrt(fraction_of(exp_avg_sq[i], v_divisor))) * 255.0f + 0.5f);
    m_codes[i] = int8_t(exp_avg[i] < 0.0f ? -m : m);
    v_codes[i] = uint8_t(exp_avg_sq[i] > 0.0f ? std::max(v, 1) : v);
  }
}

// `begin` is a multiple of kCodeBlock.
template <class Weight, class Grad, class Loop>
ALWAYS_INLINE void adam_blocks(const AdamArguments<Weight, Grad>& arguments, const Codes& codes, int64_t begin,
                               int64_t end, Loop loop) {
  for (; begin < end; begin += kCodeBlock)
    adam_block(arguments, codes, begin, std::min(kCodeBlock, end - begin), loop);
}

// ---- sum of squares ----

constexpr int64_t kLanes = 1024;
constexpr int64_t kBlockNumel = 16 * kLanes;

template <class Format>
struct Square {
  const typename Format::Storage* x;
  ALWAYS_INLINE double term(int64_t i) const {
    const double value = Format::load(x + i);
    return value * value;
  }
};

struct Plain {
  const double* x;
  ALWAYS_INLINE double term(int64_t i) const { return x[i]; }
};

// Lane j of a block adds elements j, j + kLanes, j + 2 * kLanes, ... in order; then the lanes are folded in halves.
template <class Terms>
ALWAYS_INLINE void block_sums_loop(Terms terms, int64_t numel, double* sums, int64_t first_block, int64_t last_block) {
  alignas(64) double lanes[kLanes];
  for (int64_t block = first_block; block < last_block; ++block) {
    std::fill(lanes, lanes + kLanes, 0.0);
    int64_t row = block * kBlockNumel;
    const int64_t end = std::min(numel, row + kBlockNumel);
    for (; row < end; row += kLanes) {
      const int64_t row_numel = std::min(kLanes, end - row);
#pragma omp simd
      for (int64_t j = 0; j < row_numel; ++j) lanes[j] += terms.term(row + j);
    }
    for (int64_t half = kLanes / 2; half > 0; half /= 2) {
#pragma omp simd
      for (int64_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
    }
    sums[block] = lanes[0];
  }
}

// ---- instruction sets ----

// One struct a set: the same loops in functions that differ in what they may use.
struct Baseline {
  template <bool kDecoupled, class Weight, class Grad>
  static void adam(const AdamArguments<Weight, Grad>& arguments, int64_t begin, int64_t end) {
    adam_loop<kDecoupled>(arguments, begin, end);
  }
  template <bool kDecoupled, class Weight, class Grad>
  static void adam_codes(const AdamArguments<Weight, Grad>& arguments, const Codes& codes, int64_t begin,
                         int64_t end) {
    adam_blocks(arguments, codes, begin, end, adam<kDecoupled, Weight, Grad>);
  }
  template <class Terms>
  static void block_sums(Terms terms, int64_t numel, double* sums, int64_t first, int64_t last) {
    block_sums_loop(terms, numel, sums, first, last);
  }
};

#ifdef X86_DISPATCH
struct Avx2 {
  template <bool kDecoupled, class Weight, class Grad>
  static AVX2 void adam(const AdamArguments<Weight, Grad>& arguments, int64_t begin, int64_t end) {
    adam_loop_avx2<kDecoupled>(arguments, begin, end);
  }
  template <bool kDecoupled, class Weight, class Grad>
  static AVX2 void adam_codes(const AdamArguments<Weight, Grad>& arguments, const Codes& codes, int64_t begin,
                         int64_t end) {
    adam_blocks(arguments, codes, begin, end, adam<kDecoupled, Weight, Grad>);
  }
  template <class Terms>
  static AVX2 void block_sums(Terms terms, int64_t numel, double* sums, int64_t first, int64_t last) {
    block_sums_loop(terms, numel, sums, first, last);
  }
};

// The compiler vectorises the same loops as for the baseline.
struct Avx512 {
  template <bool kDecoupled, class Weight, class Grad>
  static AVX512 void adam(const AdamArguments<Weight, Grad>& arguments, int64_t begin, int64_t end) {
    adam_loop<kDecoupled>(arguments, begin, end);
  }
  template <bool kDecoupled, class Weight, class Grad>
  static AVX512 void adam_codes(const AdamArguments<Weight, Grad>& arguments, const Codes& codes, int64_t begin,
                         int64_t end) {
    adam_blocks(arguments, codes, begin, end, adam<kDecoupled, Weight, Grad>);
  }
  template <class Terms>
  static AVX512 void block_sums(Terms terms, int64_t numel, double* sums, int64_t first, int64_t last) {
    block_sums_loop(terms, numel, sums, first, last);
  }
};
using Sets = IsaSets<Baseline, Avx2, Avx512>;
#else
using Sets = IsaSets<Baseline>;
#endif

// Below this a second thread costs more than it saves.
constexpr int64_t kAdamGranule = 16384;

template <class Weight, class Grad>
void run_adam(Weight weight, const void* grad, void* exp_avg, void* exp_avg_sq, float* scales, const Scalars& scalars,
              int64_t numel, bool decoupled, int isa, int threads) {
  const auto* grad_values = static_cast<const typename Grad::Storage*>(grad);
  Sets::visit(isa, [&](auto set) {
    using Set = decltype(set);
    if (scales) {
      const AdamArguments<Weight, Grad> arguments{weight, grad_values, nullptr, nullptr, scalars};
      const Codes codes{static_cast<int8_t*>(exp_avg), static_cast<uint8_t*>(exp_avg_sq), scales};
      const auto range =
          decoupled ? Set::template adam_codes<true, Weight, Grad> : Set::template adam_codes<false, Weight, Grad>;
      static_assert(kAdamGranule % kCodeBlock == 0, "threads share no block");
      parallel_ranges(numel, kAdamGranule, threads,
                      [&](int64_t begin, int64_t end) { range(arguments, codes, begin, end); });
      return;
    }
    const AdamArguments<Weight, Grad> arguments{weight, grad_values, static_cast<float*>(exp_avg),
                                                static_cast<float*>(exp_avg_sq), scalars};
    const auto range = decoupled ? Set::template adam<true, Weight, Grad> : Set::template adam<false, Weight, Grad>;
    parallel_ranges(numel, kAdamGranule, threads, [&](int64_t begin, int64_t end) { range(arguments, begin, end); });
  });
}

template <class Terms>
std::vector<double> block_sums(Terms terms, int64_t numel, int isa, int threads) {
  std::vector<double> sums((numel + kBlockNumel - 1) / kBlockNumel);
  Sets::visit(isa, [&](auto set) {
    parallel_ranges(int64_t(sums.size()), 1, threads, [&](int64_t first, int64_t last) {
      decltype(set)::template block_sums<Terms>(terms, numel, sums.data(), first, last);
    });
  });
  return sums;
}

template <class Format>
double sum_of_squares(const void* x, int64_t numel, int isa, int threads) {
  auto sums = block_sums(Square<Format>{static_cast<const typename Format::Storage*>(x)}, numel, isa, threads);
  while (sums.size() > 1) sums = block_sums(Plain{sums.data()}, int64_t(sums.size()), isa, threads);
  return sums[0];
}

// The numbers that native.py passes, which checks them.
enum Form : int { kFloat32 = 0, kSplit = 1, kMasterBFloat16 = 2, kMasterFloat16 = 3 };

}  // namespace

extern "C" {

// Raised with every change of a function that native.py calls, so that a stale build is refused instead of crashing.
int megalith_cpu_abi() { return 6; }

int megalith_cpu_isa() { return best_isa(); }

// `remainder` is used only by kSplit, `master` only by the two master forms. With `scales` the moments are codes.
void megalith_cpu_adam(int form, int grad_dtype, void* weight, const void* grad, void* exp_avg, void* exp_avg_sq,
                       int16_t* remainder, float* master, float* scales, int64_t numel, const Scalars* scalars,
                       int decoupled, int isa, int threads) {
  const auto run = [&](auto placed) {
    with_format(grad_dtype, [&](auto format) {
      run_adam<decltype(placed), decltype(format)>(placed, grad, exp_avg, exp_avg_sq, scales, *scalars, numel,
                                                   decoupled != 0, isa, threads);
    });
  };
  switch (form) {
    case kFloat32: return run(MasterIsWeight{static_cast<float*>(weight)});
    case kSplit: return run(SplitMaster{static_cast<uint16_t*>(weight), remainder});
    case kMasterBFloat16: return run(SeparateMaster<BFloat16>{master, static_cast<uint16_t*>(weight)});
    case kMasterFloat16: return run(SeparateMaster<Float16>{master, static_cast<uint16_t*>(weight)});
  }
}

// `numel` is at least 1.
void megalith_cpu_sum_of_squares(int dtype, const void* x, int64_t numel, double* out, int isa, int threads) {
  with_format(dtype, [&](auto format) { *out = sum_of_squares<decltype(format)>(x, numel, isa, threads); });
}

}  // extern "C"
