"""Tests that need a GPU say so with a marker, and are skipped where there is none."""

import pytest
import torch

pytest.register_assert_rewrite(
    "tests.e2e.harness", "tests.e2e.layouts", "tests.e2e.same_answers", "tests.e2e.test_faults"
)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what cannot run here."""
    marker = item.get_closest_marker("gpu")
    num_wanted = marker.kwargs.get("count", 1) if marker else 0
    if torch.cuda.device_count() < num_wanted:
        pytest.skip(f"needs {num_wanted} CUDA GPU(s), this machine has {torch.cuda.device_count()}")
