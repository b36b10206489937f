"""Any layout reads any other: block sizes and tensor parallelism differ, the stored bytes do not."""

import pytest

from tests.e2e.layouts import TENSOR_2, assert_any_layout_reads_any_other

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


def test_any_layout_reads_any_other_and_all_store_the_same_bytes(tmp_path):
    assert_any_layout_reads_any_other(tmp_path, TENSOR_2, can_differ=True)
