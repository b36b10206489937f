"""Triton kernels run on the GPU where there is one, and on the CPU in Triton's interpreter elsewhere.

Triton decides it when a kernel is defined, by the environment. Only our kernels are to be interpreted, and no process
that a test starts: so the variable stands only while they are imported, and Triton is imported before.
"""

import os

import pytest
import torch
import triton

pytest.register_assert_rewrite("tests.connector.cuda.kernel_cases", "tests.connector.cuda.copy_cases")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from cachetier_connector.cuda import kernels

    del os.environ["TRITON_INTERPRET"]
    assert not isinstance(kernels.gather_kernel, triton.JITFunction), "something imported the kernels before"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
