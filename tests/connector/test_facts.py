"""What is read from vLLM's configuration: what is refused, and what makes another namespace."""

import dataclasses
import inspect
from types import SimpleNamespace

import pytest
import torch
from vllm.config import KVEventsConfig
from vllm.v1.core.sched.scheduler import Scheduler

from cachetier.core.errors import ConfigError
from cachetier.core.keys import namespace_of
from cachetier.core.layout import Shard
from cachetier_connector.facts import (
    adapter_of,
    inputs_of,
    is_addressable,
    layers_in_order,
    let_any_role,
    may_read,
    rank_of,
    read_facts,
    read_identity,
    recompute_failed_loads,
)
from tests.connector.engines import FakeRequest, full_attention, kv_cache_config, vllm_config


def namespace(config, caches=None):
    caches = caches or kv_cache_config()
    return namespace_of(read_identity(config, caches, read_facts(config, caches)))


def with_transfer(config, **settings):
    config.kv_transfer_config.kv_connector_extra_config = settings
    return config


def test_the_facts_of_the_test_model():
    facts = read_facts(vllm_config(), kv_cache_config())
    assert (facts.layout.num_layers, facts.layout.num_kv_heads, facts.layout.row_bytes) == (4, 4, 128)
    assert (facts.role, facts.num_workers, facts.block_tokens) == ("both", 1, 128)
    assert facts.tiling == [Shard(0, 4, 0, 4)]


@pytest.mark.parametrize(
    ("kv_role", "role"), [("kv_both", "both"), ("kv_producer", "producer"), ("kv_consumer", "consumer")]
)
def test_vllms_role_is_the_engines(kv_role, role):
    config = vllm_config()
    config.kv_transfer_config.kv_role = kv_role
    assert read_facts(config, kv_cache_config()).role == role
    let_any_role(config)
    assert config.kv_transfer_config.is_kv_consumer
    assert config.kv_transfer_config.is_kv_producer


def test_events_are_published_where_vllm_is_told_to_publish_its_own():
    config = vllm_config()
    published = []
    for events in (None, KVEventsConfig(), KVEventsConfig(enable_kv_cache_events=True)):
        config.kv_events_config = events
        published.append(read_facts(config, kv_cache_config()).publishes_events)
    assert published == [False, False, True]


def test_tensor_and_pipeline_ranks_share_the_layout_and_cut_it():
    config = vllm_config()
    config.parallel_config.tensor_parallel_size = 2
    config.parallel_config.pipeline_parallel_size = 2
    caches = kv_cache_config(full_attention(num_kv_heads=2), num_layers=2)
    facts = read_facts(config, caches)
    assert facts.layout == read_facts(vllm_config(), kv_cache_config()).layout
    assert facts.tiling == [Shard(0, 2, 0, 2), Shard(2, 4, 0, 2), Shard(0, 2, 2, 4), Shard(2, 4, 2, 4)]
    shards = []
    for rank in range(4):
        config.parallel_config.rank = rank
        shards.append(rank_of(config, facts.layout.num_kv_heads))
    assert shards == [(number, True) for number in range(4)]


def sliding_window():
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    return SlidingWindowSpec(block_size=128, num_kv_heads=4, head_size=32, dtype=torch.bfloat16, sliding_window=256)


def recurrent():
    from vllm.v1.kv_cache_interface import MambaSpec

    return MambaSpec(block_size=128, shapes=((4, 32),), dtypes=(torch.float32,))


def cross_attention():
    from vllm.v1.kv_cache_interface import CrossAttentionSpec

    return CrossAttentionSpec(block_size=128, num_kv_heads=4, head_size=32, dtype=torch.bfloat16)


def encoder_only():
    from vllm.v1.kv_cache_interface import EncoderOnlyAttentionSpec

    return EncoderOnlyAttentionSpec(block_size=128, num_kv_heads=4, head_size=32, dtype=torch.bfloat16)


def sinks():
    from vllm.v1.kv_cache_interface import SinkFullAttentionSpec

    return SinkFullAttentionSpec(block_size=128, num_kv_heads=4, head_size=32, dtype=torch.bfloat16, sink_len=4)


@pytest.mark.parametrize(
    "specs",
    [[sliding_window], [recurrent], [cross_attention], [encoder_only], [sinks], [full_attention, sliding_window],
     [full_attention, recurrent], [full_attention, full_attention]],
    ids=lambda specs: "+".join(spec.__name__ for spec in specs),
)  # fmt: skip
def test_a_model_that_keeps_anything_but_one_group_of_full_attention_is_refused_by_name(specs):
    made = [spec() for spec in specs]
    with pytest.raises(ConfigError, match="cannot serve this model exactly") as refusal:
        read_facts(vllm_config(), kv_cache_config(*made))
    assert all(type(spec).__name__ in str(refusal.value) for spec in made)
    assert "Start vLLM without the connector" in str(refusal.value)


def test_a_model_without_kv_is_refused():
    caches = kv_cache_config()
    caches.kv_cache_groups = []
    with pytest.raises(ConfigError, match="no KV cache"):
        read_facts(vllm_config(), caches)


def decode_context_parallel(config):
    config.parallel_config.decode_context_parallel_size = 2


def prefill_context_parallel(config):
    config.parallel_config.prefill_context_parallel_size = 2


def encoder_decoder(config):
    config.model_config.__dict__["is_encoder_decoder"] = True  # otherwise read from the architecture, and kept


def diffusion(config):
    config.model_config.__dict__["is_diffusion"] = True


def running_scales(config):
    config.cache_config.calculate_kv_scales = True


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (decode_context_parallel, "context parallelism"),
        (prefill_context_parallel, "context parallelism"),
        (encoder_decoder, "encoder-decoder"),
        (diffusion, "not causal"),
        (running_scales, "scales are computed while it runs"),
    ],
)
def test_an_engine_that_cannot_be_served_exactly_is_refused_with_the_reason(change, reason):
    config = vllm_config()
    change(config)
    with pytest.raises(ConfigError, match=reason):
        read_facts(config, kv_cache_config())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"non_causal": True}, "not causal"),
        ({"page_size_padded": 1 << 16}, "pads its pages"),
        ({"tokens_per_state": 4}, "packs several tokens"),
    ],
)
def test_a_cache_that_cannot_be_served_exactly_is_refused_with_the_reason(changes, reason):
    with pytest.raises(ConfigError, match=reason):
        read_facts(vllm_config(), kv_cache_config(full_attention(**changes)))


def test_pipeline_stages_with_other_shares_than_vllms_are_refused():
    config = vllm_config()
    config.parallel_config.pipeline_parallel_size = 2
    with pytest.raises(ConfigError, match="pipeline"):
        read_facts(config, kv_cache_config(num_layers=3))


def test_an_unknown_setting_is_refused_with_the_allowed_ones():
    with pytest.raises(ConfigError, match=r"sever.*allowed are server, data_dir"):
        read_facts(with_transfer(vllm_config(), sever="unix:/x"), kv_cache_config())


# Every change of what decides the bytes, one by one.


def weights_file(config):
    path = f"{config.model_config.model}/model.safetensors"
    with open(path, "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))


def model_configuration_file(config):
    with open(f"{config.model_config.model}/config.json", "a") as file:
        file.write(" ")


def rotary_parameters(config):
    config.model_config.hf_text_config.rope_parameters = {"rope_type": "default", "rope_theta": 20000.0}


def cache_dtype(config):
    config.cache_config.cache_dtype = "fp8"


def model_dtype(config):
    config.model_config.dtype = torch.float16


def quantization(config):
    config.model_config.quantization = "fp8"


def overrides(config):
    config.model_config.hf_overrides = {"attn_temperature_tuning": True}


def dummy_weights(config):
    config.load_config.load_format = "dummy"


def other_dummy_weights(config):
    config.load_config.load_format = "dummy"
    config.model_config.seed = 7


def speculation(config):
    config.speculative_config = SimpleNamespace(model="eagle")


def model_name(config):
    config.model_config.model = config.model_config.model + "/."


CHANGES = [
    weights_file, model_configuration_file, rotary_parameters, cache_dtype, model_dtype, quantization, overrides,
    dummy_weights, other_dummy_weights, speculation, model_name,
]  # fmt: skip


def test_every_setting_that_changes_the_bytes_changes_the_namespace(tmp_path):
    seen = {namespace(vllm_config(tmp_path))}
    for change in CHANGES:
        config = vllm_config()
        config.model_config.model = str(tmp_path / "model")
        change(config)
        found = namespace(config)
        assert found not in seen, change.__name__
        seen.add(found)
    for spec in (full_attention(head_size=64), full_attention(head_size_v=16)):
        found = namespace(vllm_config(), kv_cache_config(spec))
        assert found not in seen
        seen.add(found)


def test_dynamic_rotary_embeddings_depend_on_the_longest_prompt_and_others_do_not():
    spaces = set()
    for kind, length in [("dynamic", 4096), ("dynamic", 8192), ("default", 4096), ("default", 8192)]:
        config = vllm_config()
        config.model_config.hf_text_config.rope_parameters = {"rope_type": kind, "rope_theta": 10000.0}
        config.model_config.max_model_len = length
        spaces.add(namespace(config))
    assert len(spaces) == 3


def tensor_parallel(config):
    config.parallel_config.tensor_parallel_size = 2
    return kv_cache_config(full_attention(num_kv_heads=2))


def pipeline_parallel(config):
    config.parallel_config.pipeline_parallel_size = 2
    return kv_cache_config(num_layers=2)


def small_blocks(config):
    config.cache_config.block_size = 32
    return kv_cache_config(full_attention(32))


def other_limits(config):
    config.scheduler_config.max_num_batched_tokens = 256
    config.model_config.max_model_len = 1024


def other_server(config):
    with_transfer(config, server="unix:/elsewhere", match_deadline_ms=50)
    config.kv_transfer_config.engine_id = "other"


def compiled(config):
    config.model_config.enforce_eager = False


@pytest.mark.parametrize(
    "change", [tensor_parallel, pipeline_parallel, small_blocks, other_limits, other_server, compiled]
)
def test_what_does_not_change_the_bytes_shares_the_namespace(change):
    config = vllm_config()
    assert namespace(config, change(config)) == namespace(vllm_config())


def test_unreadable_weights_are_shared_with_nobody(tmp_path, caplog):
    config = vllm_config()
    config.model_config.model = str(tmp_path)
    assert namespace(config) != namespace(config)
    assert "cannot read the weights" in caplog.text


def test_failed_loads_are_recomputed():
    config = vllm_config()
    config.kv_transfer_config.kv_load_failure_policy = "fail"
    recompute_failed_loads(config)
    assert config.kv_transfer_config.kv_load_failure_policy == "recompute"


# Requests.


def test_layers_are_ordered_by_number():
    names = ["model.layers.10.self_attn.attn", "model.layers.9.self_attn.attn", "model.layers.0.self_attn.attn"]
    assert layers_in_order(names) == names[::-1]


def test_embeddings_in_place_of_tokens_cannot_be_addressed():
    assert is_addressable(FakeRequest("r", [1, 2]))
    assert not is_addressable(FakeRequest("r", [1, 2], prompt_embeds=torch.zeros(2, 4)))
    embeddings_alone = FakeRequest("r", [])
    embeddings_alone.prompt_token_ids = None
    assert not is_addressable(embeddings_alone)


def test_a_session_whose_prompt_is_still_to_come_cannot_be_addressed():
    assert is_addressable(FakeRequest("r", [1, 2], resumable=False))
    assert not is_addressable(FakeRequest("r", [1, 2], resumable=True))


def test_a_request_for_log_probabilities_of_its_prompt_does_not_load():
    from vllm import SamplingParams

    assert may_read(FakeRequest("r", [1]))
    assert may_read(FakeRequest("r", [1], sampling_params=SamplingParams(logprobs=2)))
    assert not may_read(FakeRequest("r", [1], sampling_params=SamplingParams(prompt_logprobs=0)))
    assert not may_read(FakeRequest("r", [1], skip_reading_prefix_cache=True))


def test_adapters_and_inputs_are_read_from_vllms_own_types():
    from vllm.lora.request import LoRARequest
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

    feature = MultiModalFeatureSpec(
        data=None, modality="image", identifier="hash", mm_position=PlaceholderRange(offset=3, length=70)
    )
    request = FakeRequest("r", [1], lora_request=LoRARequest("a", 1, "/adapters/a"), mm_features=[feature])
    assert adapter_of(request) == ("a", "/adapters/a", 1)
    assert inputs_of(request) == [("hash", 3, 70)]
    assert adapter_of(FakeRequest("r", [1])) is None


def test_the_facts_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        read_facts(vllm_config(), kv_cache_config()).block_tokens = 1


def test_a_vllm_whose_loads_may_meet_a_step_under_way_is_refused(monkeypatch):
    """The installed one is none; its condition is what `CopyEngine.fence` relies on."""
    read_facts(vllm_config(), kv_cache_config())
    assert "multiple_inflight_batches and kv_transfer_config.is_kv_consumer" in inspect.getsource(Scheduler.__init__)
    monkeypatch.delattr(Scheduler, "_drain_deferred_frees")
    with pytest.raises(ConfigError, match=r"needs vLLM 0\.26"):
        read_facts(vllm_config(), kv_cache_config())
