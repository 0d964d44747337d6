// The product with many tokens, for linear.cpp.
#pragma once
#include "kernels.h"

namespace qlora {

bool can_product(DType dtype, int64_t sum);
// forward: y (m, rows) = x (m, cols) W'^T + bias; else y (m, cols) = x (m, rows) W'
void product(const void* x, DType dtype, int64_t m, const Weight4bit& weight, const Codebook& codebook,
             const void* bias, void* y, bool forward);

}  // namespace qlora
