// All that the kernels ask of the hardware; compiled by a C++ compiler, its emulation (tests/cuda_emulation).
#pragma once

#if defined(GINGHAM_CUDA_EMULATION)
#include "cuda_emulation.h"
#else
#include "cp_async.cuh"
#include "launch.cuh"
#include "ldmatrix.cuh"
#include "mma.cuh"
#include "numbers.cuh"
#endif
