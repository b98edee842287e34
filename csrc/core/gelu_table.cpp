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
void fit(double centre, int terms, bool tanh_form, bool gradient, double* powers) {
  double nodes[kGeluMaxTerms], differences[kGeluMaxTerms];
  for (int i = 0; i < terms; ++i) {
    nodes[i] = 0.5 * kGeluStep * std::cos(kPi * (i + 0.5) / terms);
    double derivative = 0;
    const double a = centre + nodes[i];
    differences[i] = tail(a, tanh_form, &derivative);
    if (gradient) differences[i] += a * derivative;
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

GeluTable make(bool tanh_form, bool gradient) {
  GeluTable table{};
  const int terms = gradient ? kGeluGradientTerms : kGeluTerms;
  for (int piece = 0; piece < kGeluPieces - 1; ++piece) {
    double powers[kGeluMaxTerms];
    fit(piece * static_cast<double>(kGeluStep), terms, tanh_form, gradient, powers);
    for (int i = 0; i < terms; ++i) table.coefficients[i][piece] = static_cast<float>(powers[i]);
  }
  // GELU'(0) and the slope of GELU at 0 are exactly 1/2.
  table.coefficients[0][0] = 0.5f;
  return table;
}

}  // namespace

const GeluTable& gelu_table(bool tanh_form, bool gradient) {
  static const GeluTable tables[2][2] = {{make(false, false), make(false, true)}, {make(true, false), make(true, true)}};
  return tables[tanh_form][gradient];
}

}  // namespace hflfnerv
