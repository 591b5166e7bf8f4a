// GPTQ's sequential loops over a block of rows, on the CPU. Plain C ABI, called by native.py.
//
// Columns do not depend on each other, and each is worked on by itself: its rows lie in one piece here, so that what a
// row does to those after it is a vector operation. Bits depend neither on threads nor on the instruction set, and are
// those of rounding_reference.py.

#include <cmath>
#include <utility>
#include <vector>

#include "cpu_common.h"

namespace {

constexpr float kLeastStep = 0.5f + 0x1p-12f;  // LEAST_STEP there

// To the nearest, ties to even, for |x| < 2^22.
ALWAYS_INLINE float round_even(float x) { return (x + 0x1.8p23f) - 0x1.8p23f; }

ALWAYS_INLINE float clamp(float x, float low, float high) { return std::min(std::max(x, low), high); }

struct Rounding {
  const float *weight, *factor, *scales, *zeros;  // [R, N], [R, R], [R, N], [R, N]
  uint8_t* codes;                                 // [R, N]
  float* errors;                                  // [R, N]
  int64_t rows, columns;
  float max_code;
  int beams;
};

struct Candidate {
  float cost, error;
  int parent;
  uint8_t code;
  bool operator<(const Candidate& other) const { return cost < other.cost; }
};

// Columns [first, last).
ALWAYS_INLINE void round_columns(const Rounding& p, int64_t first, int64_t last) {
  std::vector<float> left(size_t(p.beams * p.rows)), next(left.size());  // [B, R]: what the rows have come to
  std::vector<Candidate> candidates(size_t(2 * p.beams)), history(size_t(p.rows * p.beams));  // [R, B]
  std::vector<float> cost(size_t(p.beams));
  for (int64_t n = first; n < last; ++n) {
    for (int64_t k = 0; k < p.rows; ++k) left[k] = p.weight[k * p.columns + n];
    int live = 1;
    cost[0] = 0.0f;
    for (int64_t k = 0; k < p.rows; ++k) {
      const float* row = p.factor + k * p.rows;
      const float scale = p.scales[k * p.columns + n], zero = p.zeros[k * p.columns + n];
      int count = 0;
      const auto consider = [&](int beam, float code) {
        const float error = (left[beam * p.rows + k] - (code - zero) * scale) / row[k];
        candidates[count++] = {cost[beam] + error * error, error, beam, uint8_t(code)};
      };
      for (int beam = 0; beam < live; ++beam) {
        const float exact = left[beam * p.rows + k] / scale + zero;
        const float code = round_even(clamp(exact, -1.0f, p.max_code + 1.0f));
        const float inside = clamp(code, 0.0f, p.max_code);
        consider(beam, inside);
        if (p.beams > 1) {
          const float other = exact > inside ? inside + 1.0f : inside - 1.0f;
          consider(beam, other < 0.0f || other > p.max_code ? 2.0f * inside - other : other);
        }
      }
      if (count > p.beams) std::nth_element(candidates.begin(), candidates.begin() + p.beams, candidates.begin() + count);
      live = std::min(count, p.beams);
      for (int beam = 0; beam < live; ++beam) {
        const Candidate chosen = history[k * p.beams + beam] = candidates[beam];
        cost[beam] = chosen.cost;
        const float* from = left.data() + chosen.parent * p.rows;
        float* to = next.data() + beam * p.rows;
#pragma omp simd
        for (int64_t j = k + 1; j < p.rows; ++j) to[j] = from[j] - row[j] * chosen.error;
      }
      std::swap(left, next);
    }
    int beam = int(std::min_element(cost.begin(), cost.begin() + live) - cost.begin());
    for (int64_t k = p.rows - 1; k >= 0; --k) {
      const Candidate& chosen = history[k * p.beams + beam];
      p.codes[k * p.columns + n] = chosen.code;
      p.errors[k * p.columns + n] = chosen.error;
      beam = chosen.parent;
    }
  }
}

struct Descent {
  const float *gradient, *hessian, *scales;  // [R, N], [R, R], [R, N]
  uint8_t* codes;                            // [R, N]
  float* change;                             // [R, N]
  int64_t rows, columns;
  float max_code;
};

ALWAYS_INLINE void descend_columns(const Descent& p, int64_t first, int64_t last) {
  std::vector<float> left(size_t(p.rows));
  for (int64_t n = first; n < last; ++n) {
    for (int64_t k = 0; k < p.rows; ++k) left[k] = p.gradient[k * p.columns + n];
    for (int64_t k = 0; k < p.rows; ++k) {
      const int64_t at = k * p.columns + n;
      const float* row = p.hessian + k * p.rows;
      const float step = left[k] / (row[k] * p.scales[at]), code = float(p.codes[at]);
      p.change[at] = 0.0f;
      if (!(std::fabs(step) > kLeastStep)) continue;
      const float better = clamp(code + round_even(clamp(step, -1024.0f, 1024.0f)), 0.0f, p.max_code);
      const float change = (better - code) * p.scales[at];
      if (change == 0.0f) continue;
      p.codes[at] = uint8_t(better);
      p.change[at] = change;
#pragma omp simd
      for (int64_t j = k + 1; j < p.rows; ++j) left[j] -= row[j] * change;
    }
  }
}

#define FOR_ISA(name, target)                                                                                       \
  struct name {                                                                                                     \
    static target void round(const Rounding& p, int64_t first, int64_t last) { round_columns(p, first, last); }     \
    static target void descend(const Descent& p, int64_t first, int64_t last) { descend_columns(p, first, last); } \
  };

FOR_ISA(Baseline, )
#ifdef X86_DISPATCH
FOR_ISA(Avx2, __attribute__((target("avx2"))))
FOR_ISA(Avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))))
using Sets = IsaSets<Baseline, Avx2, Avx512>;
#else
using Sets = IsaSets<Baseline>;
#endif

}  // namespace

extern "C" {

void megalith_cpu_round_block(const float* weight, const float* factor, const float* scales, const float* zeros,
                              uint8_t* codes, float* errors, int64_t rows, int64_t columns, int max_code, int beams,
                              int isa, int threads) {
  const Rounding p{weight, factor, scales, zeros, codes, errors, rows, columns, float(max_code), beams};
  Sets::visit(isa, [&](auto set) {
    // 16 columns share the cache lines of each row.
    parallel_ranges(columns, 16, threads, [&](int64_t first, int64_t last) { decltype(set)::round(p, first, last); });
  });
}

void megalith_cpu_descend_block(const float* gradient, const float* hessian, const float* scales, uint8_t* codes,
                                float* change, int64_t rows, int64_t columns, int max_code, int isa, int threads) {
  const Descent p{gradient, hessian, scales, codes, change, rows, columns, float(max_code)};
  Sets::visit(isa, [&](auto set) {
    parallel_ranges(columns, 16, threads, [&](int64_t first, int64_t last) { decltype(set)::descend(p, first, last); });
  });
}

}  // extern "C"
