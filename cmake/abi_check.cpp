// Compiled (not linked) against torch's headers: fails when csrc/torch/shim.h declares anything differently.
//   g++ -std=c++20 -fsyntax-only -I <torch>/include -I csrc cmake/abi_check.cpp
#define USE_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include "torch/shim.h"
