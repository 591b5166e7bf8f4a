// Adam and the sum of squares on the CPU, each in one pass over memory. Plain C ABI, loaded with ctypes by native.py.
//
// The bits of every result are fixed by reference.py: the same operations in the same order, each rounded on its own
// (compile with -ffp-contract=off). They do not depend on the number of threads, on where a shard was cut, or on the
// instruction set, which is chosen at run time.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define X86_DISPATCH 1
#endif
#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace {

template <class To, class From>
ALWAYS_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

constexpr uint32_t kSign = 0x80000000u;
constexpr uint32_t kInfinity = 0x7f800000u;
ALWAYS_INLINE bool is_nan(uint32_t bits) { return (bits & ~kSign) > kInfinity; }

// ---- number formats: load and store element i; written with selects, so that loops over them vectorise ----

struct Float32 {
  using Storage = float;
  static ALWAYS_INLINE float load(const float* p, int64_t i) { return p[i]; }
};

struct BFloat16 {
  using Storage = uint16_t;
  static ALWAYS_INLINE float load(const uint16_t* p, int64_t i) { return bit_cast<float>(uint32_t(p[i]) << 16); }
  static ALWAYS_INLINE void store(uint16_t* p, int64_t i, float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    p[i] = uint16_t(is_nan(bits) ? 0x7fc0u : nearest_even);
  }
};

struct Float16 {
  using Storage = uint16_t;
  static ALWAYS_INLINE float load(const uint16_t* p, int64_t i) {
    const uint32_t half = p[i];
    const uint32_t magnitude = (half & 0x7fffu) << 13;
    // Moves the exponent's bias from 15 to 127, and is exact for subnormal halves too.
    const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
    const uint32_t special = magnitude | kInfinity;
    return bit_cast<float>((magnitude >= 0x0f800000u ? special : finite) | ((half & 0x8000u) << 16));
  }
  static ALWAYS_INLINE void store(uint16_t* p, int64_t i, float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t magnitude = bits & ~kSign;
    const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 0.5 puts the last bit of a subnormal half at the last bit of the sum, whose rounding does the rest.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    const uint32_t special = magnitude > kInfinity ? 0x7e00u : 0x7c00u;
    p[i] = uint16_t((magnitude >= 0x477ff000u ? special : finite) | ((bits & kSign) >> 16));
  }
};

// ---- where the master weight lives ----

struct MasterIsWeight {
  float* weight;
  ALWAYS_INLINE float load(int64_t i) const { return weight[i]; }
  ALWAYS_INLINE void store(int64_t i, float value) const { weight[i] = value; }
};

struct SplitMaster {  // split_master.py has the format and its reasons
  uint16_t* high;
  int16_t* low;
  ALWAYS_INLINE float load(int64_t i) const {
    return bit_cast<float>((uint32_t(high[i]) << 16) + uint32_t(int32_t(low[i])));
  }
  ALWAYS_INLINE void store(int64_t i, float value) const {
    const uint32_t bits = bit_cast<uint32_t>(value);
    const bool nan = is_nan(bits);
    high[i] = uint16_t(nan ? 0x7fc0u : (bits + 0x8000u) >> 16);
    low[i] = int16_t(nan ? 0u : bits & 0xffffu);
  }
};

template <class Half>
struct SeparateMaster {
  float* master;
  uint16_t* weight;
  ALWAYS_INLINE float load(int64_t i) const { return master[i]; }
  ALWAYS_INLINE void store(int64_t i, float value) const {
    master[i] = value;
    Half::store(weight, i, value);
  }
};

// ---- Adam ----

struct Scalars {  // the fields and their order are AdamScalars' in adam_hyper.py; factor is appended
  float beta1, one_minus_beta1, beta2, one_minus_beta2, decay, step_size, inverse_sqrt_bias2, eps, factor;
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
    float g = Grad::load(grad, i) * s.factor;
    if (kDecoupled) {
      w = w * s.decay;
    } else {
      g = g + w * s.decay;
    }
    const float m = exp_avg[i] * s.beta1 + g * s.one_minus_beta1;
    const float v = exp_avg_sq[i] * s.beta2 + (g * g) * s.one_minus_beta2;
    const float denominator = std::sqrt(v) * s.inverse_sqrt_bias2 + s.eps;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    weight.store(i, w - (m / denominator) * s.step_size);
  }
}

// ---- sum of squares ----

constexpr int64_t kLanes = 1024;
constexpr int64_t kBlockNumel = 16 * kLanes;

template <class Format>
struct Square {
  const typename Format::Storage* x;
  ALWAYS_INLINE double term(int64_t i) const {
    const double value = Format::load(x, i);
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
    // Four rows a turn, so that the lanes travel between registers and the cache a quarter as often.
    for (; row + 4 * kLanes <= end; row += 4 * kLanes) {
#pragma omp simd
      for (int64_t j = 0; j < kLanes; ++j) {
        double lane = lanes[j] + terms.term(row + j);
        lane += terms.term(row + j + kLanes);
        lane += terms.term(row + j + 2 * kLanes);
        lanes[j] = lane + terms.term(row + j + 3 * kLanes);
      }
    }
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

// ---- instruction sets and threads ----

enum Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// The loops are inlined into functions that differ only in what the compiler may use to vectorise them.
#define DEFINE_ISA(Name, TARGET)                                                                        \
  struct Name {                                                                                         \
    template <bool kDecoupled, class Weight, class Grad>                                                \
    TARGET static void adam(const AdamArguments<Weight, Grad>& arguments, int64_t begin, int64_t end) { \
      adam_loop<kDecoupled>(arguments, begin, end);                                                     \
    }                                                                                                   \
    template <class Terms>                                                                              \
    TARGET static void block_sums(Terms terms, int64_t numel, double* sums, int64_t first, int64_t last) { \
      block_sums_loop(terms, numel, sums, first, last);                                                 \
    }                                                                                                   \
  };
DEFINE_ISA(Baseline, )
#ifdef X86_DISPATCH
DEFINE_ISA(Avx2, __attribute__((target("avx2"))))
DEFINE_ISA(Avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))))
#endif

int best_isa() {
#ifdef X86_DISPATCH
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return kAvx512;
  if (__builtin_cpu_supports("avx2")) return kAvx2;
#endif
  return kBaseline;
}

template <class Visitor>
void with_isa(int isa, Visitor visit) {
#ifdef X86_DISPATCH
  if (isa == kAvx512) return visit(Avx512{});
  if (isa == kAvx2) return visit(Avx2{});
#endif
  visit(Baseline{});
}

// Calls range(begin, end) over contiguous parts of [0, count) whose inner borders are multiples of `granule`.
template <class Range>
void parallel_ranges(int64_t count, int64_t granule, int threads, Range range) {
  const int64_t granules = (count + granule - 1) / granule;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, granules));
#pragma omp parallel for num_threads(int(parts)) schedule(static, 1)
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = granules * part / parts * granule;
    const int64_t end = std::min(count, granules * (part + 1) / parts * granule);
    range(begin, end);
  }
}

// Below this a second thread costs more than it saves.
constexpr int64_t kAdamGranule = 16384;

template <class Weight, class Grad>
void run_adam(Weight weight, const void* grad, float* exp_avg, float* exp_avg_sq, const Scalars& scalars,
              int64_t numel, bool decoupled, int isa, int threads) {
  const AdamArguments<Weight, Grad> arguments{weight, static_cast<const typename Grad::Storage*>(grad), exp_avg,
                                              exp_avg_sq, scalars};
  with_isa(isa, [&](auto set) {
    using Set = decltype(set);
    const auto range = decoupled ? Set::template adam<true, Weight, Grad> : Set::template adam<false, Weight, Grad>;
    parallel_ranges(numel, kAdamGranule, threads, [&](int64_t begin, int64_t end) { range(arguments, begin, end); });
  });
}

template <class Terms>
std::vector<double> block_sums(Terms terms, int64_t numel, int isa, int threads) {
  std::vector<double> sums((numel + kBlockNumel - 1) / kBlockNumel);
  with_isa(isa, [&](auto set) {
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
enum Dtype : int { kDtypeFloat32 = 0, kDtypeBFloat16 = 1, kDtypeFloat16 = 2 };

template <class Visitor>
void with_format(int dtype, Visitor visit) {
  switch (dtype) {
    case kDtypeFloat32: return visit(Float32{});
    case kDtypeBFloat16: return visit(BFloat16{});
    case kDtypeFloat16: return visit(Float16{});
  }
}

}  // namespace

extern "C" {

// Raised with every change of the functions below, so that a stale build is refused instead of crashing.
int megalith_cpu_abi() { return 1; }

int megalith_cpu_isa() { return best_isa(); }

// `remainder` is used only by kSplit, `master` only by the two master forms.
void megalith_cpu_adam(int form, int grad_dtype, void* weight, const void* grad, float* exp_avg, float* exp_avg_sq,
                       int16_t* remainder, float* master, int64_t numel, const Scalars* scalars, int decoupled, int isa,
                       int threads) {
  const auto run = [&](auto placed) {
    with_format(grad_dtype, [&](auto format) {
      run_adam<decltype(placed), decltype(format)>(placed, grad, exp_avg, exp_avg_sq, *scalars, numel, decoupled != 0,
                                                   isa, threads);
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
