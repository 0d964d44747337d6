// The linear layer with a second term in its sums, for lora.cpp; and the product with many tokens, for linear.cpp.
#pragma once
#include "kernels.h"
#include "variant.h"

namespace qlora {

bool can_product(DType dtype, int64_t sum);
// forward: y (m, rows) = x (m, cols) W'^T + bias; else y (m, cols) = x (m, rows) W'. `more`: its panels one after the other.
void product(const void* x, DType dtype, int64_t m, const Weight4bit& weight, const Codebook& codebook,
             const void* bias, void* y, bool forward, const ProductMore& more);
// y (m, features) += more alone
void add_product(DType dtype, int64_t m, int64_t features, void* y, const ProductMore& more);

void linear_4bit_forward(const void* x, DType dtype, int64_t m, const Weight4bit& weight, const Codebook& codebook,
                         const void* bias, void* y, const ProductMore& more);
void linear_4bit_backward(const void* dy, DType dtype, int64_t m, const Weight4bit& weight, const Codebook& codebook,
                          void* dx, const ProductMore& more);

}  // namespace qlora
