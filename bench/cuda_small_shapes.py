"""Every CUDA kernel once, on shapes small enough for compute-sanitizer, under which bench/gpu.sh runs this."""

from __future__ import annotations

import itertools

import torch

from gingham.ops import criss_cross_attention

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SIZES = ((5, 6), (1, 19), (18, 2, 3), (2, 131))  # the last is longer than a warp holds


def main() -> None:
    torch.manual_seed(0)
    for dtype, size, last, tf32 in itertools.product(DTYPES, SIZES, (False, True), (False, True)):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        query, key, value, grad = (
            torch.randn(2, *size, channels, device="cuda").to(dtype).movedim(-1, 1) for channels in (5, 5, 24, 24)
        )
        if not last:
            query, key, value, grad = (x.contiguous() for x in (query, key, value, grad))
        leaves = [x.requires_grad_() for x in (query, key, value)]
        output = criss_cross_attention(*leaves, scale=0.5)
        gradients = torch.autograd.grad(output, leaves, grad)
        assert all(x.isfinite().all() for x in (output, *gradients))
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
