// Module _C: the functions of kernels.h for native.py, their only importer; backend.py calls them, after every check.
// Tensors arrive as addresses (0 for none), tables as the bytes of their struct, dtypes as the DType integer.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string_view>

#include "kernels.h"
#include "source_hash.h"

namespace py = pybind11;
using namespace qlora;

namespace {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// A struct out of the bytes arguments.py built with the same layout.
template <class Table>
Table table(const py::bytes& bytes) {
  char* data;
  Py_ssize_t size;
  if (PyBytes_AsStringAndSize(bytes.ptr(), &data, &size) != 0) throw py::error_already_set();
  if (size != Py_ssize_t(sizeof(Table))) {
    throw std::invalid_argument("a table of " + std::to_string(size) + " bytes where the binary expects " +
                                std::to_string(sizeof(Table)) +
                                ": arguments.py and _C do not belong together, rebuild");
  }
  Table result;
  std::memcpy(&result, data, sizeof result);
  return result;
}

// The weight's arguments, in the order of backend.py's Weight tuple.
struct Weight {
  Codebook codebook;
  Weight4bit weight;
};

Weight make_weight(Address packed, Address absmax, Address codes, Address nested_absmax, Address mean, Address map,
                   int64_t nested_block_size, int64_t rows, int64_t cols, int64_t block_size,
                   const py::bytes& codebook) {
  return {table<Codebook>(codebook),
          {pointer<uint8_t>(packed),
           {pointer<float>(absmax), pointer<uint8_t>(codes), pointer<float>(nested_absmax), pointer<float>(mean),
            pointer<float>(map), nested_block_size},
           rows,
           cols,
           block_size}};
}

#define WEIGHT_PARAMETERS                                                                          \
  Address packed, Address absmax, Address codes, Address nested_absmax, Address mean, Address map, \
      int64_t nested_block_size, int64_t rows, int64_t cols, int64_t block_size, const py::bytes &codebook
#define WEIGHT \
  make_weight(packed, absmax, codes, nested_absmax, mean, map, nested_block_size, rows, cols, block_size, codebook)

#define LORA_PARAMETERS \
  Address A, int A_dtype, Address B, int B_dtype, int64_t rank, int64_t in, int64_t out, double scaling
#define LORA \
  Lora { pointer<void>(A), pointer<void>(B), DType(A_dtype), DType(B_dtype), rank, in, out, float(scaling) }

// AdamW's runs of elements: an array of structs out of the bytes backend.py packed.
template <class Piece>
std::vector<Piece> pieces(const py::bytes& bytes) {
  const std::string_view view = bytes;
  std::vector<Piece> result(view.size() / sizeof(Piece));
  std::memcpy(result.data(), view.data(), result.size() * sizeof(Piece));
  return result;
}

#define ADAMW_SCALARS double lr, double beta1, double beta2, double weight_decay, double eps

// Last argument: the number of threads. The GIL is released while a kernel runs.
void bind_cpu(py::module_ m) {
  m.def("quantize_4bit", [](Address x, int dtype, int64_t n, int64_t block_size, const py::bytes& codebook,
                            Address packed, Address absmax, int threads) {
    auto codes = table<Codebook>(codebook);
    py::gil_scoped_release release;
    set_num_threads(threads);
    quantize_4bit(pointer<void>(x), DType(dtype), n, block_size, codes, pointer<uint8_t>(packed),
                  pointer<float>(absmax));
  });
  m.def("dequantize_4bit", [](WEIGHT_PARAMETERS, Address out, int dtype, int64_t row_stride, int threads) {
    auto w = WEIGHT;
    py::gil_scoped_release release;
    set_num_threads(threads);
    dequantize_4bit(w.weight, w.codebook, pointer<void>(out), DType(dtype), row_stride);
  });
  m.def("quantize_4bit_double", [](Address x, int dtype, int64_t n, int64_t block_size, const py::bytes& codebook,
                                   int64_t nested_block_size, const py::bytes& map, Address packed, Address absmax,
                                   Address mean, Address absmax_codes, Address nested_absmax, int threads) {
    auto codes = table<Codebook>(codebook);
    auto map8 = table<Map8>(map);
    py::gil_scoped_release release;
    set_num_threads(threads);
    return quantize_4bit_double(pointer<void>(x), DType(dtype), n, block_size, codes, nested_block_size, map8,
                                pointer<uint8_t>(packed), pointer<float>(absmax), pointer<float>(mean),
                                pointer<uint8_t>(absmax_codes), pointer<float>(nested_absmax));
  });
  m.def("double_quantize", [](Address absmax, int64_t n, Address mean, int64_t nested_block_size, const py::bytes& map,
                              Address codes, Address nested_absmax, int threads) {
    auto map8 = table<Map8>(map);
    py::gil_scoped_release release;
    set_num_threads(threads);
    double_quantize(pointer<float>(absmax), n, *pointer<float>(mean), nested_block_size, map8, pointer<uint8_t>(codes),
                    pointer<float>(nested_absmax));
  });
  m.def("quantize_4bit_nested", [](Address x, int dtype, int64_t n, int64_t block_size, const py::bytes& codebook,
                                   Address mean, int64_t nested_block_size, const py::bytes& map, Address packed,
                                   Address absmax_codes, Address nested_absmax, int threads) {
    auto codes = table<Codebook>(codebook);
    auto map8 = table<Map8>(map);
    py::gil_scoped_release release;
    set_num_threads(threads);
    quantize_4bit_nested(pointer<void>(x), DType(dtype), n, block_size, codes, *pointer<float>(mean), nested_block_size,
                         map8, pointer<uint8_t>(packed), pointer<uint8_t>(absmax_codes), pointer<float>(nested_absmax));
  });
  m.def("double_dequantize", [](Address codes, Address nested_absmax, Address mean, Address map,
                                int64_t nested_block_size, int64_t n, Address out, int threads) {
    Absmax absmax{nullptr,
                  pointer<uint8_t>(codes),
                  pointer<float>(nested_absmax),
                  pointer<float>(mean),
                  pointer<float>(map),
                  nested_block_size};
    py::gil_scoped_release release;
    set_num_threads(threads);
    double_dequantize(absmax, n, pointer<float>(out));
  });
  m.def("linear_4bit_forward",
        [](Address x, int dtype, int64_t tokens, WEIGHT_PARAMETERS, Address bias, Address y, int threads) {
          auto w = WEIGHT;
          py::gil_scoped_release release;
          set_num_threads(threads);
          linear_4bit_forward(pointer<void>(x), DType(dtype), tokens, w.weight, w.codebook, pointer<void>(bias),
                              pointer<void>(y));
        });
  // The same for a weight that stays: its arguments are read once. False, and nothing done, where no kernel can do it.
  py::class_<Weight>(m, "Weight")
      .def(py::init(&make_weight))
      .def("linear_4bit_forward",
           [](const Weight& w, Address x, int dtype, int64_t tokens, Address bias, Address y, int threads) {
             if (!can_linear_4bit_forward(DType(dtype), tokens, w.weight.cols, w.weight.block_size)) return false;
             py::gil_scoped_release release;
             set_num_threads(threads);
             linear_4bit_forward(pointer<void>(x), DType(dtype), tokens, w.weight, w.codebook, pointer<void>(bias),
                                 pointer<void>(y));
             return true;
           })
      .def("dequantize_4bit",
           [](const Weight& w, Address out, int dtype, int64_t row_stride, int threads) {
             py::gil_scoped_release release;
             set_num_threads(threads);
             dequantize_4bit(w.weight, w.codebook, pointer<void>(out), DType(dtype), row_stride);
           })
      .def("lora_linear_4bit_forward",
           [](const Weight& w, Address x, int dtype, int64_t tokens, Address bias, LORA_PARAMETERS, Address y,
              int threads) {
             py::gil_scoped_release release;
             set_num_threads(threads);
             lora_linear_4bit_forward(pointer<void>(x), DType(dtype), tokens, w.weight, w.codebook, pointer<void>(bias),
                                      LORA, pointer<void>(y));
           })
      .def("lora_linear_4bit_backward", [](const Weight& w, Address dy, Address x, int dtype, int64_t tokens,
                                           LORA_PARAMETERS, Address dA, Address dB, Address dx, int threads) {
        py::gil_scoped_release release;
        set_num_threads(threads);
        lora_linear_4bit_backward(pointer<void>(dy), pointer<void>(x), DType(dtype), tokens, w.weight, w.codebook, LORA,
                                  {pointer<void>(dA), pointer<void>(dB), pointer<void>(dx)});
      });
  m.def("advise_huge_pages", [](Address memory, int64_t bytes) { advise_huge_pages(pointer<void>(memory), bytes); });
  m.def("can_linear_4bit_forward", [](int dtype, int64_t tokens, int64_t cols, int64_t block_size) {
    return can_linear_4bit_forward(DType(dtype), tokens, cols, block_size);
  });
  m.def("can_linear_4bit_backward",
        [](int dtype, int64_t rows) { return can_linear_4bit_backward(DType(dtype), rows); });
  m.def("linear_4bit_backward", [](Address dy, int dtype, int64_t tokens, WEIGHT_PARAMETERS, Address dx, int threads) {
    auto w = WEIGHT;
    py::gil_scoped_release release;
    set_num_threads(threads);
    linear_4bit_backward(pointer<void>(dy), DType(dtype), tokens, w.weight, w.codebook, pointer<void>(dx));
  });
  m.def("dequantize_region", [](WEIGHT_PARAMETERS, int64_t first_row, int64_t row_count, int64_t first_col,
                                int64_t col_count, Address out, int dtype, int threads) {
    auto w = WEIGHT;
    py::gil_scoped_release release;
    set_num_threads(threads);
    dequantize_region(w.weight, w.codebook, first_row, row_count, first_col, col_count, pointer<void>(out),
                      DType(dtype));
  });
  m.def("can_lora", [](int dtype, int64_t rank) { return can_lora(DType(dtype), rank); });
  m.def("lora_linear_4bit_forward", [](Address x, int dtype, int64_t tokens, WEIGHT_PARAMETERS, Address bias,
                                       LORA_PARAMETERS, Address y, int threads) {
    auto w = WEIGHT;
    py::gil_scoped_release release;
    set_num_threads(threads);
    lora_linear_4bit_forward(pointer<void>(x), DType(dtype), tokens, w.weight, w.codebook, pointer<void>(bias), LORA,
                             pointer<void>(y));
  });
  m.def("lora_linear_4bit_backward", [](Address dy, Address x, int dtype, int64_t tokens, WEIGHT_PARAMETERS,
                                        LORA_PARAMETERS, Address dA, Address dB, Address dx, int threads) {
    auto w = WEIGHT;
    py::gil_scoped_release release;
    set_num_threads(threads);
    lora_linear_4bit_backward(pointer<void>(dy), pointer<void>(x), DType(dtype), tokens, w.weight, w.codebook, LORA,
                              {pointer<void>(dA), pointer<void>(dB), pointer<void>(dx)});
  });
  m.def("adamw", [](const py::bytes& packed, int dtype, ADAMW_SCALARS, int order, int threads) {
    auto runs = pieces<AdamWPiece>(packed);
    py::gil_scoped_release release;
    set_num_threads(threads);
    adamw(runs.data(), int64_t(runs.size()), DType(dtype), {lr, beta1, beta2, weight_decay, eps}, AdamWOrder(order));
  });
  m.def("adamw_8bit", [](const py::bytes& packed, int dtype, ADAMW_SCALARS, Address maps, int threads) {
    auto runs = pieces<AdamW8bitPiece>(packed);
    py::gil_scoped_release release;
    set_num_threads(threads);
    adamw_8bit(runs.data(), int64_t(runs.size()), DType(dtype), {lr, beta1, beta2, weight_decay, eps},
               pointer<Map8>(maps));
  });
  m.def("variants", &cpu_variants);
  m.def("variant", &cpu_variant);
  m.def("set_variant", &set_cpu_variant);
}

#ifdef QLORA_HAS_CUDA
// Last argument: the cudaStream_t.
void bind_cuda(py::module_ m) {
  m.def("quantize_4bit", [](Address x, int dtype, int64_t n, int64_t block_size, const py::bytes& codebook,
                            Address packed, Address absmax, Address stream) {
    auto codes = table<Codebook>(codebook);
    py::gil_scoped_release release;
    cuda::quantize_4bit(pointer<void>(x), DType(dtype), n, block_size, codes, pointer<uint8_t>(packed),
                        pointer<float>(absmax), pointer<void>(stream));
  });
  m.def("dequantize_4bit", [](WEIGHT_PARAMETERS, Address out, int dtype, int64_t row_stride, Address stream) {
    auto w = WEIGHT;
    py::gil_scoped_release release;
    cuda::dequantize_4bit(w.weight, w.codebook, pointer<void>(out), DType(dtype), row_stride, pointer<void>(stream));
  });
  m.def("double_quantize", [](Address absmax, int64_t n, Address mean, int64_t nested_block_size, const py::bytes& map,
                              Address codes, Address nested_absmax, Address stream) {
    auto map8 = table<Map8>(map);
    py::gil_scoped_release release;
    cuda::double_quantize(pointer<float>(absmax), n, pointer<float>(mean), nested_block_size, map8,
                          pointer<uint8_t>(codes), pointer<float>(nested_absmax), pointer<void>(stream));
  });
  m.def("quantize_4bit_nested", [](Address x, int dtype, int64_t n, int64_t block_size, const py::bytes& codebook,
                                   Address mean, int64_t nested_block_size, const py::bytes& map, Address packed,
                                   Address absmax_codes, Address nested_absmax, Address stream) {
    auto codes = table<Codebook>(codebook);
    auto map8 = table<Map8>(map);
    py::gil_scoped_release release;
    cuda::quantize_4bit_nested(pointer<void>(x), DType(dtype), n, block_size, codes, pointer<float>(mean),
                               nested_block_size, map8, pointer<uint8_t>(packed), pointer<uint8_t>(absmax_codes),
                               pointer<float>(nested_absmax), pointer<void>(stream));
  });
  m.def("double_dequantize", [](Address codes, Address nested_absmax, Address mean, Address map,
                                int64_t nested_block_size, int64_t n, Address out, Address stream) {
    Absmax absmax{nullptr,
                  pointer<uint8_t>(codes),
                  pointer<float>(nested_absmax),
                  pointer<float>(mean),
                  pointer<float>(map),
                  nested_block_size};
    py::gil_scoped_release release;
    cuda::double_dequantize(absmax, n, pointer<float>(out), pointer<void>(stream));
  });
  m.def("linear_4bit_forward",
        [](Address x, int dtype, int64_t tokens, WEIGHT_PARAMETERS, Address bias, Address y, Address stream) {
          auto w = WEIGHT;
          py::gil_scoped_release release;
          cuda::linear_4bit_forward(pointer<void>(x), DType(dtype), tokens, w.weight, w.codebook, pointer<void>(bias),
                                    pointer<void>(y), pointer<void>(stream));
        });
  m.def("driver_version", &cuda::driver_version);
  m.def("runtime_version", &cuda::runtime_version);
  m.def("capabilities", &cuda::capabilities);
  m.def("adamw", [](const py::bytes& packed, int dtype, ADAMW_SCALARS, int order, Address stream) {
    auto runs = pieces<AdamWPiece>(packed);
    py::gil_scoped_release release;
    cuda::adamw(runs.data(), int64_t(runs.size()), DType(dtype), {lr, beta1, beta2, weight_decay, eps},
                AdamWOrder(order), pointer<void>(stream));
  });
  m.def("adamw_8bit", [](const py::bytes& packed, int dtype, ADAMW_SCALARS, Address maps, Address stream) {
    auto runs = pieces<AdamW8bitPiece>(packed);
    py::gil_scoped_release release;
    cuda::adamw_8bit(runs.data(), int64_t(runs.size()), DType(dtype), {lr, beta1, beta2, weight_decay, eps},
                     pointer<Map8>(maps), pointer<void>(stream));
  });
  m.attr("archs") = QLORA_CUDA_ARCHS;
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of qlora_ref. Use qlora_ref.native: nothing is checked here.";
  m.attr("source_hash") = QLORA_SOURCE_HASH;
  m.attr("compiler") = QLORA_COMPILER;
  bind_cpu(m.def_submodule("cpu"));
#ifdef QLORA_HAS_CUDA
  bind_cuda(m.def_submodule("cuda"));
#endif
}
