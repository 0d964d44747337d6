"""Constants that bitsandbytes' users and tests ask for."""

HIP_ENVIRONMENT = False
ROCM_WARP_SIZE_64 = False
BNB_BACKEND = "CUDA"
