"""Every kernel once on the device, small enough for a checker of memory accesses:

compute-sanitizer --tool memcheck python -m tests.gpu.kernels_small
compute-sanitizer --tool racecheck python -m tests.gpu.kernels_small
"""

import os

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # or accesses beyond a tensor fall into PyTorch's own memory

import sys
from dataclasses import replace

import torch

from tests.connector.cuda.kernel_cases import (
    FORMS,
    Case,
    Turn,
    check_digests,
    check_gather,
    check_paged_digests,
    check_round_trip,
    check_scatter,
)


def main() -> None:
    """Run and compare; raises where something differs."""
    device = torch.device("cuda", 0)
    for form in FORMS:
        case = Case(form, torch.bfloat16, 24, 16, 20, num_chunks=3, first_token=9, skip_tokens=7, drop_tokens=3)
        for seed in (0, 1):  # a program for each tile, and digests; one for all
            check_gather(replace(case, seed=seed), device)
            check_scatter(replace(case, seed=seed), device)
        check_round_trip(case, device)
    for is_interleaved in (False, True):
        case = Case("nhd", torch.bfloat16, 64, 16, 20, num_chunks=3, first_token=9, skip_tokens=7, drop_tokens=3)
        check_scatter(case, device, Turn.of(torch.bfloat16, is_interleaved, 32, 1_234))
    check_paged_digests(Case("nhd", torch.bfloat16, 64, 16, 40, num_chunks=3, first_token=9), device)
    check_digests([4096, 32, 4064, 4096, 2080], 3, device)
    sys.stdout.write(f"gather, scatter, also of turned keys, digest_pages and digest_paged are right on {device}\n")


if __name__ == "__main__":
    main()
