"""On two GPUs: ranks that share a model by heads or layers load what one rank stored, and back; and they blend."""

import pytest

from tests.e2e import test_blend as blend
from tests.e2e.layouts import PIPELINE_2, TENSOR_2, assert_any_layout_reads_any_other
from tests.gpu.engines import NOISE, ON_GPU

pytestmark = [pytest.mark.gpu(count=2), pytest.mark.timeout(900)]


@pytest.fixture(autouse=True)
def no_multicast(monkeypatch):
    """Have ranks talk without NVLink multicast, which not every machine allows; inherited by the engines."""
    monkeypatch.setenv("VLLM_ALLREDUCE_USE_SYMM_MEM", "0")
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")


def test_two_tensor_parallel_ranks_and_one_read_each_others_kv(tmp_path):
    assert_any_layout_reads_any_other(tmp_path, TENSOR_2, can_differ=True, **ON_GPU)


def test_two_pipeline_stages_and_one_read_each_others_kv(tmp_path):
    assert_any_layout_reads_any_other(tmp_path, PIPELINE_2, can_differ=False, **ON_GPU)


def test_two_tensor_parallel_ranks_blend(tmp_path, monkeypatch):
    monkeypatch.setattr(blend, "NOISE", NOISE)
    arguments = ON_GPU | {"enforce_eager": True, "tensor_parallel_size": 2}
    blend.test_recomputing_everything_gives_the_plain_engines_kv_and_answers(tmp_path, arguments)
