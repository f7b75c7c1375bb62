// What a .cu file needs to run on a CPU: a block of fibers and the twin of every device primitive of csrc/cuda.
#pragma once

#include "device.h"
#include "emulated_cp_async.h"
#include "emulated_launch.h"
#include "emulated_ldmatrix.h"
#include "emulated_mma.h"
#include "emulated_numbers.h"
