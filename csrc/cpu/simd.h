// Sixteen fp32 lanes, the same on every machine: one AVX-512 register, two AVX2 registers, or a
// plain array.
//
// The number of lanes is part of the contract (it decides which keys share a running sum), the
// width of the machine's registers is not. Every operation is IEEE and rounds once; multiply_add is
// fused by definition. Included once per instruction set with FA_ISA naming the namespace, so that
// the linker cannot mix the variants. For the same reason <cmath> is named by builtins: its inline
// functions would be shared.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "csrc/cpu/convert.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define FA_INLINE static inline __attribute__((always_inline))

namespace fa::cpu::FA_ISA {

constexpr int kLanes = 16;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

#if defined(__AVX512F__)

constexpr int kTileVectors = 4;  // 6 rows x 4 vectors: 24 of 32 registers accumulate
struct Vec {
  __m512 x;
};
FA_INLINE Vec load(float const* p) { return {_mm512_loadu_ps(p)}; }
FA_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.x); }
FA_INLINE Vec broadcast(float a) { return {_mm512_set1_ps(a)}; }
FA_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.x, b.x)}; }
FA_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.x, b.x)}; }
FA_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.x, b.x)}; }
FA_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.x, b.x)}; }
FA_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }
// a > b ? a : b, so a NaN in b comes through and one in a does not.
FA_INLINE Vec maximum(Vec a, Vec b) { return {_mm512_max_ps(a.x, b.x)}; }
FA_INLINE Vec absolute(Vec a) { return {_mm512_abs_ps(a.x)}; }
FA_INLINE Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.x, b.x, _CMP_LT_OQ), no.x, yes.x)};
}
FA_INLINE Vec shift_left_23(Vec a) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.x), 23))};
}
// Lanes [begin, end) of a, the others of fill; 0 <= begin, end <= 16.
FA_INLINE Vec keep_lanes(Vec a, int begin, int end, Vec fill) {
  uint32_t const mask = begin < end ? ((1u << end) - 1u) & ~((1u << begin) - 1u) : 0u;
  return {_mm512_mask_blend_ps(static_cast<__mmask16>(mask), fill.x, a.x)};
}
FA_INLINE float max_of_lanes(Vec a) { return _mm512_reduce_max_ps(a.x); }

FA_INLINE Vec load_half(uint16_t const* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<__m256i const*>(p)))};
}
FA_INLINE Vec load_bfloat(uint16_t const* p) {
  __m512i const wide =
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<__m256i const*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}

// rows[i] lane j <-> rows[j] lane i.
FA_INLINE void transpose(Vec (&rows)[kLanes]) {
  __m512 t[16], u[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(rows[i].x, rows[i + 1].x);
    t[i + 1] = _mm512_unpackhi_ps(rows[i].x, rows[i + 1].x);
  }
  for (int i = 0; i < 16; i += 4) {
    __m512d const a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 1]);
    __m512d const c = _mm512_castps_pd(t[i + 2]), e = _mm512_castps_pd(t[i + 3]);
    u[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    u[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    u[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, e));
    u[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, e));
  }
  // u[4g + c] holds, in 128-bit lane l, column 4l + c of rows 4g .. 4g + 3.
  for (int c = 0; c < 4; ++c) {
    __m512 const low = _mm512_shuffle_f32x4(u[c], u[4 + c], 0x88),
                 high = _mm512_shuffle_f32x4(u[c], u[4 + c], 0xdd);
    __m512 const low2 = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0x88);
    __m512 const high2 = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0xdd);
    rows[c].x = _mm512_shuffle_f32x4(low, low2, 0x88);
    rows[8 + c].x = _mm512_shuffle_f32x4(low, low2, 0xdd);
    rows[4 + c].x = _mm512_shuffle_f32x4(high, high2, 0x88);
    rows[12 + c].x = _mm512_shuffle_f32x4(high, high2, 0xdd);
  }
}

#elif defined(__AVX2__)

constexpr int kTileVectors =
    1;  // 6 rows x 1 vector of two registers: 12 of 16 registers accumulate
struct Vec {
  __m256 lo, hi;
};
FA_INLINE Vec load(float const* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
FA_INLINE void store(float* p, Vec a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
FA_INLINE Vec broadcast(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
FA_INLINE Vec operator+(Vec a, Vec b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
FA_INLINE Vec operator-(Vec a, Vec b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
FA_INLINE Vec operator*(Vec a, Vec b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
FA_INLINE Vec operator/(Vec a, Vec b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
FA_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
FA_INLINE Vec maximum(Vec a, Vec b) {
  return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
FA_INLINE Vec absolute(Vec a) {
  __m256 const sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
FA_INLINE Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(no.hi, yes.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
FA_INLINE Vec shift_left_23(Vec a) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.lo), 23)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.hi), 23))};
}
FA_INLINE Vec keep_lanes(Vec a, int begin, int end, Vec fill) {
  __m256i const lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
                lane_hi = _mm256_add_epi32(lane, _mm256_set1_epi32(8));
  __m256i const first = _mm256_set1_epi32(begin - 1), last = _mm256_set1_epi32(end);
  auto const inside = [&](__m256i i) {
    return _mm256_castsi256_ps(
        _mm256_and_si256(_mm256_cmpgt_epi32(i, first), _mm256_cmpgt_epi32(last, i)));
  };
  return {_mm256_blendv_ps(fill.lo, a.lo, inside(lane)),
          _mm256_blendv_ps(fill.hi, a.hi, inside(lane_hi))};
}
FA_INLINE float max_of_lanes(Vec a) {
  __m256 const m = _mm256_max_ps(a.lo, a.hi);
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
}

FA_INLINE Vec load_half(uint16_t const* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<__m128i const*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<__m128i const*>(p + 8)))};
}
FA_INLINE Vec load_bfloat(uint16_t const* p) {
  auto const widen = [](uint16_t const* from) {
    __m256i const wide =
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<__m128i const*>(from)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  };
  return {widen(p), widen(p + 8)};
}

FA_INLINE void transpose_8x8(__m256 (&r)[8]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    r[c] = _mm256_permute2f128_ps(u[c], u[4 + c], 0x20);
    r[4 + c] = _mm256_permute2f128_ps(u[c], u[4 + c], 0x31);
  }
}
FA_INLINE void transpose(Vec (&rows)[kLanes]) {
  __m256 a[8], b[8], c[8], e[8];  // quarters: top left, top right, bottom left, bottom right
  for (int i = 0; i < 8; ++i) {
    a[i] = rows[i].lo, b[i] = rows[i].hi, c[i] = rows[8 + i].lo, e[i] = rows[8 + i].hi;
  }
  transpose_8x8(a), transpose_8x8(b), transpose_8x8(c), transpose_8x8(e);
  for (int i = 0; i < 8; ++i) rows[i] = {a[i], c[i]}, rows[8 + i] = {b[i], e[i]};
}

#else

constexpr int kTileVectors = 1;
struct Vec {
  float x[kLanes];
};
#define FA_EACH_LANE(expression)                          \
  Vec r;                                                  \
  for (int i = 0; i < kLanes; ++i) r.x[i] = (expression); \
  return r
FA_INLINE Vec load(float const* p) { FA_EACH_LANE(p[i]); }
FA_INLINE void store(float* p, Vec a) { std::memcpy(p, a.x, sizeof(a.x)); }
FA_INLINE Vec broadcast(float a) { FA_EACH_LANE(a); }
FA_INLINE Vec operator+(Vec a, Vec b) { FA_EACH_LANE(a.x[i] + b.x[i]); }
FA_INLINE Vec operator-(Vec a, Vec b) { FA_EACH_LANE(a.x[i] - b.x[i]); }
FA_INLINE Vec operator*(Vec a, Vec b) { FA_EACH_LANE(a.x[i] * b.x[i]); }
FA_INLINE Vec operator/(Vec a, Vec b) { FA_EACH_LANE(a.x[i] / b.x[i]); }
FA_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
  FA_EACH_LANE(__builtin_fmaf(a.x[i], b.x[i], c.x[i]));
}
FA_INLINE Vec maximum(Vec a, Vec b) { FA_EACH_LANE(a.x[i] > b.x[i] ? a.x[i] : b.x[i]); }
FA_INLINE Vec absolute(Vec a) { FA_EACH_LANE(__builtin_fabsf(a.x[i])); }
FA_INLINE Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
  FA_EACH_LANE(a.x[i] < b.x[i] ? yes.x[i] : no.x[i]);
}
FA_INLINE Vec shift_left_23(Vec a) {
  uint32_t bits[kLanes];
  std::memcpy(bits, a.x, sizeof(bits));
  for (int i = 0; i < kLanes; ++i) bits[i] <<= 23;
  std::memcpy(a.x, bits, sizeof(bits));
  return a;
}
FA_INLINE Vec keep_lanes(Vec a, int begin, int end, Vec fill) {
  FA_EACH_LANE(i >= begin && i < end ? a.x[i] : fill.x[i]);
}
FA_INLINE float max_of_lanes(Vec a) {
  float m = a.x[0];
  for (int i = 1; i < kLanes; ++i) m = a.x[i] > m ? a.x[i] : m;
  return m;
}
FA_INLINE Vec load_half(uint16_t const* p) { FA_EACH_LANE(half_to_float(p[i])); }
FA_INLINE Vec load_bfloat(uint16_t const* p) { FA_EACH_LANE(bfloat_to_float(p[i])); }
FA_INLINE void transpose(Vec (&rows)[kLanes]) {
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < i; ++j) {
      float const x = rows[i].x[j];
      rows[i].x[j] = rows[j].x[i];
      rows[j].x[i] = x;
    }
}
#undef FA_EACH_LANE

#endif

// The sum of the lanes as a fixed tree: i + (i + 8), then + 4, + 2, + 1.
FA_INLINE float sum_of_lanes(Vec a) {
  float x[kLanes];
  store(x, a);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] = x[i] + x[i + half];
  return x[0];
}

}  // namespace fa::cpu::FA_ISA
