"""Tests that need a GPU say so with a marker, and are skipped where there is none."""

import pytest
import torch


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what cannot run here."""
    marker = item.get_closest_marker("gpu")
    num_wanted = marker.kwargs.get("count", 1) if marker else 0
    if torch.cuda.device_count() < num_wanted:
        pytest.skip(f"needs {num_wanted} CUDA GPU(s), this machine has {torch.cuda.device_count()}")
