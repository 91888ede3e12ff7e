// exp2 and tanh on sixteen lanes: our own, so that no library's version or instruction set reaches
// a bit.
#pragma once

#include "csrc/cpu/simd.h"

namespace fa::cpu::FA_ISA {

// 2^x for x <= 128, to 0.7 ulp; exactly 1 at 0; zero from -126.5 down; NaN stays NaN.
//
// x = n + f with |f| <= 1/2. Adding 1.5 * 2^23 + 127 rounds x to n and leaves the biased exponent
// of 2^n in the low bits, ready to be shifted into place. The polynomial is a minimax fit of degree
// 6 to (2^f - 1) / f in relative error 2e-9 with the constant 1 held. A product (not an integer
// addition) applies 2^n, so a NaN cannot be turned finite.
FA_INLINE Vec exp2_of(Vec x) {
  Vec const shift = broadcast(12583039.0f);
  Vec const clamped = maximum(broadcast(-127.0f), x);
  Vec const shifted = clamped + shift;
  Vec const f = clamped - (shifted - shift);
  Vec p = broadcast(0x1.41fbbap-13f);
  p = multiply_add(p, f, broadcast(0x1.5f3e54p-10f));
  p = multiply_add(p, f, broadcast(0x1.3b2d4cp-7f));
  p = multiply_add(p, f, broadcast(0x1.c6aee8p-5f));
  p = multiply_add(p, f, broadcast(0x1.ebfbdcp-3f));
  p = multiply_add(p, f, broadcast(0x1.62e430p-1f));
  p = multiply_add(p, f, broadcast(1.0f));
  return p * shift_left_23(shifted);
}

// tanh(x). Below 5/8 an odd minimax polynomial of relative error 4e-9; above, 1 - 2 / (e^2|x| + 1)
// with x's sign.
FA_INLINE Vec tanh_of(Vec x) {
  Vec const magnitude = absolute(x);
  Vec const square = x * x;
  Vec q = broadcast(-0.005717037f);
  q = multiply_add(q, square, broadcast(0.020650579f));
  q = multiply_add(q, square, broadcast(-0.053743497f));
  q = multiply_add(q, square, broadcast(0.13331491f));
  q = multiply_add(q, square, broadcast(-0.33333284f));
  Vec const near = multiply_add(q * square, x, x);

  Vec const one = broadcast(1.0f);
  // exp2(-2|x| log2 e) lies in (0, 1]; (1 - e) / (1 + e) keeps NaN and saturates at 1.
  Vec const e = exp2_of(magnitude * broadcast(-2.885390081777927f));
  Vec const far = (one - e) / (one + e);
  Vec const signed_far = select_less(x, broadcast(0.0f), broadcast(0.0f) - far, far);
  return select_less(magnitude, broadcast(0.625f), near, signed_far);
}

}  // namespace fa::cpu::FA_ISA
