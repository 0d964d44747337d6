// What native.py asks before it uses the kernels: versions and compute capabilities. None of this creates a context.
#include "../cpp/kernels.h"
#include "common.cuh"

namespace qlora::cuda {

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

std::vector<int> capabilities() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // no card is an answer, not an error to leave behind
    return {};
  }
  std::vector<int> all;
  for (int device = 0; device < count; ++device) {
    int major = 0, minor = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
    all.push_back(10 * major + minor);
  }
  return all;
}

}  // namespace qlora::cuda
