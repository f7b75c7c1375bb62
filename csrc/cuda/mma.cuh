// Matrix products of one warp on tensor cores: sums += a * b.
//
// With g = lane / 4 and t = lane % 4, a lane holds of the 16 x 8 sums  s0, s1: (g, 2t), (g, 2t+1);  s2, s3: the same in
// row g + 8. The operands, as the PTX ISA lays them out:
//   m16n8k16, two values a register   a0: (g, 2t..)  a1: (g+8, 2t..)  a2: (g, 2t+8..)  a3: (g+8, 2t+8..)
//                                     b0: (2t.., g)  b1: (2t+8.., g)
//   m16n8k8, TF32                     a0: (g, t)     a1: (g+8, t)     a2: (g, t+4)     a3: (g+8, t+4)
//                                     b0: (t, g)     b1: (t+4, g)
//   m8n8k4, double                    a: (g, t)      b: (t, g)        s0, s1: (g, 2t), (g, 2t+1)
#pragma once

#include <cstdint>

namespace gingham::cuda {

__device__ inline void mma_float16(float (&s)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void mma_bfloat16(float (&s)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void mma_tf32(float (&s)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void mma_float64(double& s0, double& s1, double a, double b) {
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
      : "+d"(s0), "+d"(s1)
      : "d"(a), "d"(b));
}

}  // namespace gingham::cuda
