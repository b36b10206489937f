"""On a GPU, a hit gives the plain engine's answer and the stored KV, and flipped bits are caught before they are used.

What is asked and what must hold is what the tests on the CPU ask and hold; only the engines run on the GPU.
"""

import pytest

from tests.e2e import test_faults as faults
from tests.e2e.same_answers import BF16_ROW_BYTES, assert_same_from_everywhere, plain_answers
from tests.gpu.engines import NOISE, ON_GPU

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    ("arguments", "row_bytes"),
    [({}, BF16_ROW_BYTES), ({"kv_cache_dtype": "fp8"}, BF16_ROW_BYTES // 2)],
    ids=["bf16", "fp8"],
)
def test_answers_are_the_same_from_memory_from_disk_after_restarts_and_after_kills(
    tmp_path, tmp_path_factory, arguments, row_bytes
):
    plain = plain_answers(tmp_path_factory.mktemp("plain") / "engine.log", NOISE, **ON_GPU, **arguments)
    assert_same_from_everywhere(tmp_path, plain, row_bytes, **ON_GPU, **arguments)


@pytest.fixture(name="bench", scope="module")
def make_bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    # A GPU digests whole objects anew and compares with their checksum: it does not read the list in their frame.
    verified = ("object", "object")
    # The probe loads also where computing would be faster.
    bench = faults.Bench(folder, NOISE, verified, probe_dir=folder, **ON_GPU)
    yield bench
    bench.close()


test_in_memory = faults.test_bits_flipped_in_memory_are_recomputed_and_counted_and_the_chunk_is_stored_again
test_in_flight = faults.test_bits_flipped_between_match_and_load_are_recomputed_and_counted
test_on_disk = faults.test_bits_flipped_on_disk_are_recomputed_and_counted_and_the_chunk_is_stored_again
test_killed = faults.test_an_engine_killed_while_it_loads_and_stores_leaves_no_leases_and_no_pending_chunks
test_aborted = faults.test_a_request_aborted_while_it_loads_leaves_no_lease_and_no_blocks_behind
