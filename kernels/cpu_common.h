// What the CPU kernels share: number formats, instruction sets, threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#define ALWAYS_INLINE inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__GNUC__)
#define X86_DISPATCH 1
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,f16c")))
#define AVX2_INLINE AVX2 ALWAYS_INLINE
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define AVX512_FMA __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,f16c,fma,prefer-vector-width=512")))
#define AVX512_BF16 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,f16c,fma,prefer-vector-width=512")))
#define AVX512_BF16_INLINE AVX512_BF16 ALWAYS_INLINE
#endif

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
constexpr float kQuietNan = __builtin_nanf("");

// Every NaN becomes the one whose low half is zero, so that the conversions below need not treat it apart.
ALWAYS_INLINE uint32_t bits_with_one_nan(float value) { return bit_cast<uint32_t>(value == value ? value : kQuietNan); }

#ifdef X86_DISPATCH
// The same for sixteen: a NaN is so rare that a branch costs less than a select.
AVX2_INLINE void make_one_nan(__m256& a, __m256& b) {
  if (__builtin_expect(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_UNORD_Q)) != 0, 0)) {
    const __m256 nan = _mm256_set1_ps(kQuietNan);
    a = _mm256_blendv_ps(a, nan, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    b = _mm256_blendv_ps(b, nan, _mm256_cmp_ps(b, b, _CMP_UNORD_Q));
  }
}

AVX2_INLINE __m256i add(__m256i a, int b) { return _mm256_add_epi32(a, _mm256_set1_epi32(b)); }

AVX2_INLINE __m128i load_halves(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

AVX2_INLINE __m256i load_high_halves(const uint16_t* p) {
  return _mm256_slli_epi32(_mm256_cvtepu16_epi32(load_halves(p)), 16);
}

// Stores the low halves of 16 words whose high halves are zero.
AVX2_INLINE void store_low_halves(void* p, __m256i a, __m256i b) {
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8);
  _mm256_storeu_si256(static_cast<__m256i*>(p), packed);
}
#endif

// ---- number formats ----
// load and store convert one element, with selects and no branch, so that loops over them vectorise. load8 and store16
// are the same by hand for AVX2, because the compiler's widening and narrowing cost a fifth of the whole step.

struct Float32 {
  using Storage = float;
  static ALWAYS_INLINE float load(const float* p) { return *p; }
#ifdef X86_DISPATCH
  static AVX2_INLINE __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
#endif
};

struct BFloat16 {
  using Storage = uint16_t;
  static ALWAYS_INLINE float load(const uint16_t* p) { return bit_cast<float>(uint32_t(*p) << 16); }
  static ALWAYS_INLINE void store(uint16_t* p, float value) {
    const uint32_t bits = bits_with_one_nan(value);
    *p = uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
#ifdef X86_DISPATCH
  static AVX2_INLINE __m256 load8(const uint16_t* p) { return _mm256_castsi256_ps(load_high_halves(p)); }
  static AVX2_INLINE void store16(uint16_t* p, __m256 a, __m256 b) {
    make_one_nan(a, b);
    store_low_halves(p, round(_mm256_castps_si256(a)), round(_mm256_castps_si256(b)));
  }
  static AVX2_INLINE __m256i round(__m256i bits) {
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(add(_mm256_add_epi32(bits, odd), 0x7fff), 16);
  }
#endif
};

struct Float16 {
  using Storage = uint16_t;
  static ALWAYS_INLINE float load(const uint16_t* p) {
    const uint32_t half = *p;
    const uint32_t magnitude = (half & 0x7fffu) << 13;
    // Moves the exponent's bias from 15 to 127, and is exact for subnormal halves too.
    const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
    const uint32_t special = magnitude | kInfinity;
    return bit_cast<float>((magnitude >= 0x0f800000u ? special : finite) | ((half & 0x8000u) << 16));
  }
  static ALWAYS_INLINE void store(uint16_t* p, float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t magnitude = bits & ~kSign;
    const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 0.5 puts the last bit of a subnormal half at the last bit of the sum, whose rounding does the rest.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    const uint32_t special = magnitude > kInfinity ? 0x7e00u : 0x7c00u;
    *p = uint16_t((magnitude >= 0x477ff000u ? special : finite) | ((bits & kSign) >> 16));
  }
#ifdef X86_DISPATCH
  static AVX2_INLINE __m256 load8(const uint16_t* p) { return _mm256_cvtph_ps(load_halves(p)); }
  static AVX2_INLINE void store16(uint16_t* p, __m256 a, __m256 b) {
    auto* halves = reinterpret_cast<__m128i*>(p);
    _mm_storeu_si128(halves, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(halves + 1, _mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT));
  }
#endif
};

// The numbers that native.py passes for dtypes.
enum Dtype : int { kDtypeFloat32 = 0, kDtypeBFloat16 = 1, kDtypeFloat16 = 2 };

template <class Visitor>
void with_format(int dtype, Visitor visit) {
  switch (dtype) {
    case kDtypeFloat32: return visit(Float32{});
    case kDtypeBFloat16: return visit(BFloat16{});
    case kDtypeFloat16: return visit(Float16{});
  }
}

// ---- instruction sets and threads ----

enum Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

inline int best_isa() {
#ifdef X86_DISPATCH
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return __builtin_cpu_supports("avx512bf16") ? kAvx512Bf16 : kAvx512;
  if (__builtin_cpu_supports("avx2")) return kAvx2;  // every CPU that has it has F16C too
#endif
  return kBaseline;
}

// Structs of the same functions, compiled for one instruction set each: for the first ones of Isa, in its order.
template <class First, class... More>
struct IsaSets {
  // Calls visitor(set) with the one for `isa`, or where there is none, with the last.
  template <class Visitor>
  static void visit([[maybe_unused]] int isa, Visitor visitor) {
    if constexpr (sizeof...(More) > 0) {
      if (isa > kBaseline) return IsaSets<More...>::visit(isa - 1, visitor);
    }
    visitor(First{});
  }
};

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

}  // namespace
