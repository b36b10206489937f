"""Blending on a GPU: what the tests on the CPU ask and hold, by an engine that turns keys in its scatter kernel."""

import pytest

from tests.e2e import test_blend as blend
from tests.e2e.blending import DOCUMENTS, BlendStand
from tests.gpu.engines import ON_GPU

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def stand_and_ids(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blend")
    stand = BlendStand(folder, probe_dir=folder, **ON_GPU)
    try:
        yield stand, stand.register(DOCUMENTS)
    finally:
        stand.kill()


@pytest.fixture
def stand(stand_and_ids):
    return stand_and_ids[0]


@pytest.mark.parametrize("is_eager", [True, False])
def test_recomputing_everything(tmp_path, is_eager):
    blend.test_recomputing_everything_gives_the_plain_engines_kv_and_answers(
        tmp_path, ON_GPU | {"enforce_eager": is_eager}
    )


test_any_order = blend.test_documents_are_found_in_any_order_and_loaded_where_they_stand
test_exactness = blend.test_a_plain_request_finds_nothing_of_a_blended_one
test_prefix = blend.test_a_prefix_and_documents_are_loaded_for_one_prompt
test_twice = blend.test_a_document_that_stands_there_twice_is_loaded_twice
test_aborted = blend.test_blends_that_are_aborted_leave_no_leases_and_no_blocks_behind
test_damaged = blend.test_a_document_that_is_damaged_between_match_and_load_is_computed
