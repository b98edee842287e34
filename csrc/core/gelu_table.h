// GELU and its gradient as piecewise polynomials with 16 pieces, so that one register permutation looks a coefficient up,
// where a register has 16 lanes; simd_avx2.h has another way to the same functions.
//
// With a = |x| and t(a) = Phi(-a), a function that falls from 1/2 to 0,
//   GELU(x)  = max(x, 0) - a t(a)
//   GELU'(x) = d(a) for x < 0, otherwise 1 - d(a), with d(a) = t(a) + a t'(a)
// Phi is the normal distribution's function for the exact GELU, and the logistic function that stands for it in the tanh
// form. Both t and d are fitted on pieces of equal width, centred at multiples of it; beyond the last they are 0.
//
// Error of float32 results against float64, for every finite x, both forms:
//   |GELU|  at most 1e-7 + 1.2e-7 |GELU(x)|, |GELU'| at most 2e-7.
//
// The same pieces serve tanh: with u = |x| / kTanhScale and s(u) = (1 - tanh |x|) / 2,
//   tanh(x) = sign(x) (1 - 2 s(u)), with an error of at most 1e-6.
#pragma once

namespace hflfnerv {

constexpr int kGeluPieces = 16;
constexpr int kGeluMaxTerms = 7;
constexpr float kGeluStep = 0.5f;  // a power of two, so that adding a number rounds to whole steps
constexpr float kGeluLimit = (kGeluPieces - 1) * kGeluStep;
constexpr float kTanhScale = 1.1375f;
constexpr float kTanhLimit = 10;  // from where on tanh is 1
constexpr float kGeluRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits

struct GeluTable {
  alignas(64) float coefficients[kGeluMaxTerms][kGeluPieces];  // of the powers of (a - piece * step)
  bool tanh_form;
};

constexpr int kGeluTerms = 6;          // for t and s
constexpr int kGeluGradientTerms = 7;  // for d

// The table of t or of d, made when it is first asked for.
const GeluTable& gelu_table(bool tanh_form, bool gradient);

// What is applied to a convolution's result, and its table: null for identity.
enum class ConvActivation { identity, gelu, gelu_tanh };
const GeluTable* activation_table(ConvActivation activation);

// The table of s.
const GeluTable& tanh_table();

}  // namespace hflfnerv
