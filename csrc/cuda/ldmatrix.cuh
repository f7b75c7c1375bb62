// Four 8 x 8 matrices of 16-bit elements from shared memory into fragments.
//
// Lane 8 i + r gives the address of row r of matrix i (16 bytes, aligned). A lane receives in x[i] the elements
// (lane / 4, 2 (lane % 4)) and the next of matrix i; of its transpose in the second form.
#pragma once

#include <cstdint>

namespace gingham::cuda {

__device__ inline void ldmatrix(uint32_t (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

__device__ inline void ldmatrix_transposed(uint32_t (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

}  // namespace gingham::cuda
