// The activations of activation.h on vectors: the same definitions, with tanh, exp and the normal distribution as
// polynomials.
#pragma once
#include "activation.h"
#include "cpu/simd/vec.h"

namespace rkl::cpu::RKL_ISA {

inline Vec smaller(Vec a, Vec b) { return select(a < b, a, b); }  // b where a is NaN
inline Vec larger(Vec a, Vec b) { return select(a > b, a, b); }

// e^x within 1 ulp for -87 <= x <= 88: 2^n e^r with |r| <= log(2) / 2, e^r by a polynomial fitted at Chebyshev nodes.
inline Vec exp_in_range(Vec x) {
  const Vec shift = broadcast(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the lowest bits
  const Vec rounded = x * 1.44269504f + shift;
  const Vec n = rounded - shift;
  const Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;  // log(2) in two parts: the first product is exact
  const Vec tail = ((((r * 0.00139261761f + 0.00836317307f) * r + 0.0416665547f) * r + 0.16666577f) * r + 0.5f);
  const Vec scale = (Vec)((((VecInt)rounded - (VecInt)shift) << 23) + 0x3f800000);
  return (r * r * tail + r + 1.f) * scale;
}

inline Vec vexp(Vec x) {
  const Vec y = exp_in_range(larger(smaller(x, broadcast(88.f)), broadcast(-87.f)));
  return select(x == x, y, x);
}

// tanh within 2 ulp over all floats: near zero an odd polynomial, exact for denormals; elsewhere 1 - 2 / (e^2a + 1),
// whose fraction is below 1/2, so that its error stays below half of the result's. Above 9.02 the result is 1.
inline Vec vtanh(Vec x) {
  const VecInt sign = (VecInt)x & int32_t(0x80000000);
  const Vec a = (Vec)((VecInt)x ^ sign), u = a * a;
  const Vec p = ((((u * 0.0022149028f - 0.0082724569f) * u + 0.021746187f) * u - 0.053956348f) * u + 0.13333291f) * u -
                0.33333334f;
  const Vec near = a + a * (u * p);
  const Vec far = 1.f - 2.f / (exp_in_range(smaller(a + a, broadcast(18.1f))) + 1.f);
  const Vec y = (Vec)((VecInt)select(a < 0.65f, near, far) | sign);
  return select(x == x, y, x);
}

// For results of 16 bits, in half the time: tanh of x <= 0 as x P(x^2) / Q(x^2), fitted to 1.2e-6 of the value (a unit
// of fp16 is 400 times as much). Below -4.6 both types round to -1.
inline Vec vtanh_16_bits(Vec x) {
  const Vec a = select(x < -4.6f, broadcast(-4.6f), x), u = a * a;
  const Vec p = (u * 0.00169075226f + 0.117353191f) * u + 1.f;
  const Vec q = ((u * 6.82594987e-05f + 0.018595106f) * u + 0.450680106f) * u + 1.f;
  return a * p / q;
}

// T: the type that the result is rounded to.
template <class T>
inline Vec vtrelu(Vec x, T) {
  return select(x > 0.f, x, sizeof(T) == 2 ? vtanh_16_bits(x) : vtanh(x));
}

// Zero below -88, where vexp no longer grows: x * sigmoid(x) must vanish there, and be NaN at -inf as in PyTorch.
inline Vec vsigmoid(Vec x) { return select(x < -88.f, Vec{}, 1.f / (1.f + vexp(-x))); }

// The normal distribution at x: its density, and the probability below x, which is gelu's factor.
struct Normal {
  Vec density, below;
};

// The probability is 1/2 plus an odd polynomial near zero. Elsewhere the tail is the density times a polynomial in (a -
// 2.5) / (a + 2.5), fitted to 7e-8 of its value. So gelu keeps its digits where 1 + erf has none (x = -5: within 12
// ulp, not 10^5), in a tenth of the time of erff lane by lane. Below -13.2 it is zero: floats end there.
inline Normal normal(Vec x) {
  const Vec a = smaller(larger(x, -x), broadcast(13.5f)), u = a * a, half = u * 0.5f;
  const Vec e = select(half > 87.f, Vec{}, exp_in_range(-smaller(half, broadcast(87.f))));
  const Vec odd =
      ((((u * -7.65419372e-06f + 1.13486334e-04f) * u - 1.18632987e-03f) * u + 9.97332297e-03f) * u - 6.64903596e-02f) *
          u +
      3.98942292e-01f;
  const Vec t = (a - 2.5f) / (a + 2.5f);
  const Vec high = (((t * -1.56367794e-04f - 3.30667477e-04f) * t + 8.02090159e-04f) * t + 2.94222427e-03f) * t;
  const Vec ratio =
      ((((high - 5.11872256e-03f) * t - 2.45481320e-02f) * t + 1.13135248e-01f) * t - 2.28069797e-01f) * t +
      1.41331345e-01f;
  const Vec tail = e * ratio, far = select(x > 0.f, 1.f - tail, tail);
  return {e * 0.39894228f, select(a < 1.f, x * odd + 0.5f, far)};
}

template <class T>
inline Vec activate(Activation a, Vec x, T) {
  const Vec zero{};
  switch (a) {
    case Activation::relu:
      return select(x < 0.f, zero, x);
    case Activation::relu6:
      return select(x < 0.f, zero, select(x > 6.f, zero + 6.f, x));
    case Activation::trelu:
      return vtrelu(x, T{});
    case Activation::silu:
      return x * vsigmoid(x);
    case Activation::gelu:
      return x * normal(x).below;
    default:
      return x;
  }
}

inline Vec trelu_derivative(Vec y) { return select(y > 0.f, broadcast(1.f), 1.f - y * y); }

inline Vec derivative_from_output(Activation a, Vec y) {
  const Vec zero{}, one = broadcast(1.f);
  switch (a) {
    case Activation::relu:
      return select(y <= 0.f, zero, one);
    case Activation::relu6:
      return select((y <= 0.f) | (y >= 6.f), zero, one);
    case Activation::trelu:
      return trelu_derivative(y);
    default:
      return one;
  }
}

inline Vec derivative_from_input(Activation a, Vec x) {
  switch (a) {
    case Activation::trelu:
      return trelu_derivative(vtrelu(x, float{}));
    case Activation::silu: {
      const Vec s = vsigmoid(x);
      return s * (1.f + x * (1.f - s));
    }
    case Activation::gelu: {
      const Normal n = normal(x);
      return n.below + x * n.density;
    }
    default:
      return derivative_from_output(a, x);  // relu, relu6: the same thresholds hold before and after
  }
}

}  // namespace rkl::cpu::RKL_ISA
