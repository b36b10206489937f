"""What cachetier needs to know of an engine, read from vLLM's configuration: the one module that knows its versions.

Runs once, when the connector is made. Written against vLLM 0.26 to 0.33.
"""

import dataclasses
import json
import logging
import os
import secrets
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cachetier.core.config import ConnectorConfig, from_mapping
from cachetier.core.engine_messages import BOTH, CONSUMER, PRODUCER
from cachetier.core.errors import ConfigError
from cachetier.core.keys import ModelIdentity
from cachetier.core.layout import KVLayout, Shard
from cachetier_connector.fingerprint import fingerprint_folder
from cachetier_connector.plan import shard_of_rank, tiling_for

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

ROLE_OF = {"kv_producer": PRODUCER, "kv_consumer": CONSUMER, "kv_both": BOTH}

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """One engine, as the tier sees it.

    Attributes:
        engine: id that all its processes share.
        config: the connector's settings.
        name: what it is called.
        role: what it does, one of `ROLES`.
        block_tokens: tokens a block.
        layout: shape of its KV cache group over the whole model.
        tiling: how it cuts a chunk into shards.
        device: type of the device that its KV caches lie on.
        tensor_parallel, pipeline_parallel: ranks of a stage, and stages.
        pass_tokens_max, pass_runs_max: most tokens, and most sequences, of one forward pass.
        blend_refusal: why prompts cannot be blended; empty: nothing in the configuration speaks against it.
        publishes_events: whether vLLM publishes KV events.
    """

    engine: str
    config: ConnectorConfig
    name: str
    role: str
    block_tokens: int
    layout: KVLayout
    tiling: list[Shard]
    device: str
    tensor_parallel: int
    pipeline_parallel: int
    pass_tokens_max: int
    pass_runs_max: int
    blend_refusal: str
    publishes_events: bool = False

    @property
    def num_workers(self) -> int:
        """Ranks of the engine."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def keeps_blocks(self) -> bool:
        """Whether stores read the paged blocks later (see `CopyEngine.keeps_blocks`), so that vLLM must keep them."""
        return self.device == "cuda"


def read_facts(vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig") -> EngineFacts:
    """Return the facts of the engine with these configurations.

    Raises:
        ConfigError: a setting is wrong, or cachetier cannot serve this model exactly; the text says why.
    """
    transfer = vllm_config.kv_transfer_config
    config = from_mapping(ConnectorConfig, transfer.kv_connector_extra_config, "kv_connector_extra_config")
    spec = _the_spec(kv_cache_config)
    _refuse_unsupported(vllm_config, spec)
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    layer_ranges = _layer_ranges(vllm_config, kv_cache_config)
    num_layers = layer_ranges[-1][1]
    num_kv_heads = 1 if _is_mla(spec) else model.get_total_num_kv_heads()
    row_bytes = spec.page_size_bytes // spec.block_size // spec.num_kv_heads
    return EngineFacts(
        engine=str(transfer.engine_id),
        config=config,
        name=config.name or f"{socket.gethostname()}-{os.getpid()}",
        role=ROLE_OF[transfer.kv_role],
        block_tokens=spec.block_size,
        layout=KVLayout(num_layers=num_layers, num_kv_heads=num_kv_heads, row_bytes=row_bytes),
        tiling=tiling_for(num_layers, num_kv_heads, parallel.tensor_parallel_size, layer_ranges),
        device=str(vllm_config.device_config.device_type),
        tensor_parallel=parallel.tensor_parallel_size,
        pipeline_parallel=parallel.pipeline_parallel_size,
        pass_tokens_max=vllm_config.scheduler_config.max_num_batched_tokens,
        pass_runs_max=vllm_config.scheduler_config.max_num_seqs,
        blend_refusal=_blend_refusal(vllm_config, spec),
        publishes_events=bool(getattr(vllm_config.kv_events_config, "enable_kv_cache_events", False)),
    )


def read_identity(vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig", facts: EngineFacts) -> ModelIdentity:
    """Return who the engine's model is. Reads samples of the weights' files."""
    model, spec = vllm_config.model_config, _the_spec(kv_cache_config)
    revision, weights = _weights(vllm_config)
    return ModelIdentity(
        model=str(model.model),
        revision=revision,
        weights=weights,
        kv_dtype=_kv_dtype(vllm_config),
        attention="mla" if _is_mla(spec) else "full",
        num_layers=facts.layout.num_layers,
        num_kv_heads=facts.layout.num_kv_heads,
        k_head_size=spec.head_size,
        v_head_size=0 if _is_mla(spec) else spec.head_size_v or spec.head_size,
        rotary=_rotary(model),
    )


def is_addressable(request: "Request") -> bool:
    """Tell whether the token ids and inputs that the request has now say what its prompt is.

    Not where embeddings stand in for tokens, and not in a session whose prompt and inputs are still to come.
    """
    has_embeddings = request.prompt_token_ids is None or getattr(request, "prompt_embeds", None) is not None
    return not has_embeddings and not getattr(request, "resumable", False)


def adapter_of(request: "Request") -> tuple[str, str, int] | None:
    """Return (name, path, number) of the request's LoRA adapter, or None; loaded anew it has another number."""
    lora = request.lora_request
    return (lora.lora_name, lora.lora_path, lora.lora_int_id) if lora else None


def inputs_of(request: "Request") -> list[tuple[str, int, int]]:
    """Return (hash, first placeholder token, number of placeholder tokens) of the request's multimodal inputs."""
    return [
        (str(feature.identifier), feature.mm_position.offset, feature.mm_position.length)
        for feature in getattr(request, "mm_features", None) or ()
    ]


def is_plain_text(request: "Request") -> bool:
    """Tell whether the model alone makes KV of the request's tokens: no adapter, and nothing but text."""
    return request.lora_request is None and not inputs_of(request)


def may_read(request: "Request") -> bool:
    """Tell whether the request lets its prompt come from a cache: not when it wants log-probabilities of the prompt."""
    if getattr(request, "skip_reading_prefix_cache", False):
        return False
    sampling = request.sampling_params
    return sampling is None or sampling.prompt_logprobs is None


def rank_of(vllm_config: "VllmConfig", num_kv_heads: int) -> tuple[int, bool]:
    """Return the shard of the calling worker's rank, and whether it is the rank that stores it."""
    parallel = vllm_config.parallel_config
    pp_rank, tp_rank = divmod(
        parallel.rank % (parallel.tensor_parallel_size * parallel.pipeline_parallel_size), parallel.tensor_parallel_size
    )
    return shard_of_rank(num_kv_heads, parallel.tensor_parallel_size, tp_rank, pp_rank)


def layers_in_order(names: "list[str] | Any") -> list[str]:
    """Return layer names in the order of their numbers in the model."""
    from vllm.model_executor.models.utils import extract_layer_index

    return sorted(names, key=lambda name: (extract_layer_index(name), name))


def recompute_failed_loads(vllm_config: "VllmConfig") -> None:
    """Have vLLM compute what a load did not bring. It reads this setting after it made the connector."""
    vllm_config.kv_transfer_config.kv_load_failure_policy = "recompute"


def let_any_role(vllm_config: "VllmConfig") -> None:
    """Have vLLM treat the engine as one that loads and stores: its role may become that, see `RoleKeeper`.

    Above all, its scheduler then keeps blocks that steps under way touch from loads. It reads this later.
    """
    vllm_config.kv_transfer_config.kv_role = "kv_both"


def _the_spec(kv_cache_config: "KVCacheConfig") -> Any:
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

    groups = kv_cache_config.kv_cache_groups
    if not groups:
        raise ConfigError("cachetier: this model has no KV cache, there is nothing to keep")
    kinds = sorted({type(group.kv_cache_spec).__name__ for group in groups})
    if len(groups) > 1 or type(groups[0].kv_cache_spec) not in (FullAttentionSpec, MLAAttentionSpec):
        raise ConfigError(
            f"cachetier cannot serve this model exactly: its layers keep {', '.join(kinds)} in {len(groups)} KV cache "
            "group(s), and cachetier serves one group of full attention or MLA. Start vLLM without the connector."
        )
    return groups[0].kv_cache_spec


def _is_mla(spec: Any) -> bool:
    from vllm.v1.kv_cache_interface import MLAAttentionSpec

    return isinstance(spec, MLAAttentionSpec)


def _refuse_unsupported(vllm_config: "VllmConfig", spec: Any) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    if not hasattr(Scheduler, "_drain_deferred_frees"):  # see `CopyEngine.fence`
        raise ConfigError(
            "cachetier needs vLLM 0.26 or later: this one gives loads blocks that a step under way may still write to"
        )
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    reasons = {
        "context parallelism spreads the tokens of a block over ranks": parallel.decode_context_parallel_size > 1
        or getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "it is an encoder-decoder model": bool(model.is_encoder_decoder),
        "its attention is not causal, so KV depends on later tokens": getattr(spec, "non_causal", False)
        or getattr(spec, "non_causal_multi_token_decode", False)
        or getattr(model, "is_diffusion", False),
        "its KV scales are computed while it runs": getattr(vllm_config.cache_config, "calculate_kv_scales", False),
        "its KV cache packs several tokens or pads its pages": getattr(spec, "tokens_per_state", 1) != 1
        or getattr(spec, "page_size_padded", None) is not None,
    }
    for reason, applies in reasons.items():
        if applies:
            raise ConfigError(f"cachetier cannot serve this model exactly: {reason}. Start vLLM without the connector.")


def _blend_refusal(vllm_config: "VllmConfig", spec: Any) -> str:
    """Return why the connector cannot have the model compute parts of a prompt out of turn, or cannot move its KV."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    reasons = {
        "pipeline parallelism passes hidden states from engine step to engine step": (
            parallel.pipeline_parallel_size > 1
        ),
        "data parallel ranks run their forward passes in step": parallel.data_parallel_size > 1,
        "its KV are latents, whose rotation is not implemented": _is_mla(spec),
        "speculative decoding keeps KV of a second model": vllm_config.speculative_config is not None,
        "passes out of turn would run with the adapters of other requests": vllm_config.lora_config is not None,
        "its KV are e5m2 numbers, whose rotation is not implemented": _kv_dtype(vllm_config) == "fp8_e5m2",
        "its positions have several dimensions": bool(getattr(model, "uses_mrope", False)),
    }
    return next((reason for reason, applies in reasons.items() if applies), "")


def _layer_ranges(vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig") -> list[tuple[int, int]]:
    """Return the layers of each pipeline stage, counted over the whole model."""
    from vllm.distributed.utils import get_pp_indices

    num_stages = vllm_config.parallel_config.pipeline_parallel_size
    num_here = len(kv_cache_config.kv_cache_groups[0].layer_names)
    if num_stages == 1:
        return [(0, num_here)]
    num_layers = vllm_config.model_config.get_total_num_hidden_layers()
    ranges = [get_pp_indices(num_layers, stage, num_stages) for stage in range(num_stages)]
    if num_here not in {end - start for start, end in ranges}:
        raise ConfigError(
            f"cachetier cannot serve this model with pipeline parallelism: a stage keeps KV of {num_here} layers, "
            f"its share of the model is another number. Use pipeline_parallel_size=1."
        )
    return ranges


def _rotary(model: Any) -> str:
    parameters = getattr(model.hf_text_config, "rope_parameters", None)
    text = json.dumps(parameters, sort_keys=True, default=str)
    if "longrope" in text or "dynamic" in text:  # these choose their frequencies by the longest prompt allowed
        text += f" max_model_len={model.max_model_len}"
    return text


def _kv_dtype(vllm_config: "VllmConfig") -> str:
    dtype = str(vllm_config.cache_config.cache_dtype)
    if dtype == "auto":
        return str(vllm_config.model_config.dtype).removeprefix("torch.")
    return "fp8_e4m3" if dtype == "fp8" else dtype


def _weights(vllm_config: "VllmConfig") -> tuple[str, str]:
    """Return (revision, fingerprint). The fingerprint holds whatever else decides what the weights compute."""
    model, load_format = vllm_config.model_config, str(vllm_config.load_config.load_format)
    rest = [str(model.dtype), str(model.quantization), str(model.hf_overrides or "")]
    speculative = vllm_config.speculative_config
    if speculative is not None:
        rest.append(str(speculative.model))
    if "dummy" in load_format:
        return "", "|".join(["dummy", str(model.seed), *rest])
    try:
        path = _local_path(vllm_config)
        revision = path.name if path.parent.name == "snapshots" else ""
        return revision, "|".join([fingerprint_folder(path), *rest])
    except (OSError, ValueError) as error:
        log.warning(
            "cachetier: cannot read the weights of %s to tell them from others of that name (%s); this engine "
            "shares its cache with nobody, and not with itself after a restart",
            model.model,
            error,
        )
        return "", "|".join([secrets.token_hex(16), *rest])


def _local_path(vllm_config: "VllmConfig") -> Path:
    from huggingface_hub import snapshot_download

    model = vllm_config.model_config
    if Path(model.model).exists():
        return Path(model.model)
    return Path(
        snapshot_download(
            model.model,
            revision=model.revision,
            cache_dir=vllm_config.load_config.download_dir,
            local_files_only=True,
        )
    )
