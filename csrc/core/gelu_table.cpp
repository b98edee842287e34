#include "gelu_table.h"

#include <cmath>

namespace hflfnerv {
namespace {

constexpr double kPi = 3.14159265358979323846;

// t(a) = Phi(-a) and its derivative.
double tail(double a, bool tanh_form, double* derivative) {
  if (!tanh_form) {
    *derivative = -std::exp(-0.5 * a * a) / std::sqrt(2 * kPi);
    return 0.5 * std::erfc(a / std::sqrt(2.0));
  }
  const double scale = 2 * std::sqrt(2 / kPi), cubic = 0.044715;
  const double t = 1 / (1 + std::exp(scale * (a + cubic * a * a * a)));
  *derivative = -scale * (1 + 3 * cubic * a * a) * t * (1 - t);
  return t;
}

// Interpolates at Chebyshev nodes (Newton's divided differences), and expands into powers.
template <class Function>
void fit(double centre, int terms, const Function& function, double* powers) {
  double nodes[kGeluMaxTerms], differences[kGeluMaxTerms];
  for (int i = 0; i < terms; ++i) {
    nodes[i] = 0.5 * kGeluStep * std::cos(kPi * (i + 0.5) / terms);
    differences[i] = function(centre + nodes[i]);
  }
  for (int order = 1; order < terms; ++order) {
    for (int i = terms - 1; i >= order; --i) {
      differences[i] = (differences[i] - differences[i - 1]) / (nodes[i] - nodes[i - order]);
    }
  }
  for (int i = 0; i < terms; ++i) powers[i] = 0;
  for (int i = terms - 1; i >= 0; --i) {
    for (int p = terms - 1; p > 0; --p) powers[p] = powers[p - 1] - nodes[i] * powers[p];
    powers[0] = differences[i] - nodes[i] * powers[0];
  }
}

// A table of a function that begins at 1/2.
template <class Function>
GeluTable make(int terms, const Function& function) {
  GeluTable table{};
  for (int piece = 0; piece < kGeluPieces - 1; ++piece) {
    double powers[kGeluMaxTerms];
    fit(piece * static_cast<double>(kGeluStep), terms, function, powers);
    for (int i = 0; i < terms; ++i) table.coefficients[i][piece] = static_cast<float>(powers[i]);
  }
  // GELU'(0) and the slope of GELU at 0 are exactly 1/2, and tanh(0) is 0.
  table.coefficients[0][0] = 0.5f;
  return table;
}

GeluTable make_gelu(bool tanh_form, bool gradient) {
  GeluTable table = make(gradient ? kGeluGradientTerms : kGeluTerms, [=](double a) {
    double derivative = 0;
    const double t = tail(a, tanh_form, &derivative);
    return gradient ? t + a * derivative : t;
  });
  table.tanh_form = tanh_form;
  return table;
}

}  // namespace

const GeluTable& gelu_table(bool tanh_form, bool gradient) {
  static const GeluTable tables[2][2] = {{make_gelu(false, false), make_gelu(false, true)},
                                         {make_gelu(true, false), make_gelu(true, true)}};
  return tables[tanh_form][gradient];
}

const GeluTable* activation_table(ConvActivation activation) {
  return activation == ConvActivation::identity ? nullptr : &gelu_table(activation == ConvActivation::gelu_tanh, false);
}

const GeluTable& tanh_table() {
  static const GeluTable table =
      make(kGeluTerms, [](double u) { return 1 / (1 + std::exp(2 * static_cast<double>(kTanhScale) * u)); });
  return table;
}

}  // namespace hflfnerv
