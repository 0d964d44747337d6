// For linear.cpp: decode a run of elements on the calling thread.
#pragma once
#include "types.h"

namespace qlora {

// Elements first .. first + count of the flattened weight -> out (count) of `dtype`.
void dequantize_run(const Weight4bit& weight, const Codebook& codebook, int64_t first, int64_t count, DType dtype,
                    void* out);

}  // namespace qlora
