// The launchers of src/cuda/adamw.cu behind C names, for ctypes; compiled with it through cuda_emulator.h by
// tests/test_adamw.py.
#include <vector>

#include "../src/cpp/kernels.h"

using namespace qlora;

extern "C" {

void adamw(const AdamWPiece* pieces, int64_t count, int dtype, double lr, double beta1, double beta2,
           double weight_decay, double eps, int order) {
  cuda::adamw(pieces, count, DType(dtype), {lr, beta1, beta2, weight_decay, eps}, AdamWOrder(order), nullptr);
}

void adamw_8bit(const AdamW8bitPiece* pieces, int64_t count, int dtype, double lr, double beta1, double beta2,
                double weight_decay, double eps, const Map8* maps) {
  cuda::adamw_8bit(pieces, count, DType(dtype), {lr, beta1, beta2, weight_decay, eps}, maps, nullptr);
}

}  // extern "C"
