"""What stands in for an engine in the connector's tests: real vLLM configurations, and requests as vLLM passes them."""

import copy
import shutil
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

MODEL = Path(__file__).parents[1] / "model"
LAYERS, HEADS, HEAD_SIZE = 4, 4, 32


@lru_cache(maxsize=1)
def _base_config() -> Any:
    from vllm.engine.arg_utils import EngineArgs

    transfer = {
        "kv_connector": "CachetierConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"server": "unix:/nowhere"},
    }
    arguments = EngineArgs(model=str(MODEL), dtype="bfloat16", enforce_eager=True, kv_transfer_config=transfer)
    return arguments.create_engine_config()


def vllm_config(folder: Path | None = None) -> Any:
    """Return the configuration of an engine with the test model, or with a copy of it that is put into `folder`."""
    config = copy.deepcopy(_base_config())
    if folder is not None:
        shutil.copytree(MODEL, folder / "model")
        config.model_config.model = str(folder / "model")
    return config


def full_attention(block_tokens: int = 128, **changes: Any) -> Any:
    """Return the KV cache specification of a layer of the test model on one rank."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    fields = {"block_size": block_tokens, "num_kv_heads": HEADS, "head_size": HEAD_SIZE, "dtype": torch.bfloat16}
    return FullAttentionSpec(**(fields | changes))


def kv_cache_config(*specs: Any, num_layers: int = LAYERS) -> Any:
    """Return a configuration with one KV cache group for each of `specs`."""
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

    names = [f"model.layers.{layer}.self_attn.attn" for layer in range(num_layers)]
    groups = [KVCacheGroupSpec(names, spec) for spec in specs or (full_attention(),)]
    return KVCacheConfig(num_blocks=100, kv_cache_tensors=[], kv_cache_groups=groups)


class FakeRequest(SimpleNamespace):
    """A request with the attributes that the connector reads; `decode` gives it another token."""

    def __init__(self, name: str, tokens: list[int], **attributes: Any) -> None:
        defaults = {
            "prompt_embeds": None,
            "kv_transfer_params": None,
            "sampling_params": None,
            "lora_request": None,
            "mm_features": [],
            "cache_salt": None,
        }
        super().__init__(
            request_id=name,
            prompt_token_ids=list(tokens),
            output_token_ids=[],
            all_token_ids=list(tokens),
            **(defaults | attributes),
        )

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    def decode(self, token: int) -> None:
        self.output_token_ids.append(token)
        self.all_token_ids.append(token)


def step_of(
    new: dict[str, tuple[list[int], int, int]] | None = None,
    running: dict[str, tuple[list[int], int, int]] | None = None,
    *,
    resumed: set[str] = frozenset(),
    preempted: set[str] = frozenset(),
) -> Any:
    """Return a `SchedulerOutput`: each request with its (new) blocks, computed tokens and scheduled tokens."""
    new, running = new or {}, running or {}
    return SimpleNamespace(
        num_scheduled_tokens={name: scheduled for name, (_, _, scheduled) in (new | running).items()},
        scheduled_new_reqs=[
            SimpleNamespace(req_id=name, block_ids=(blocks,), num_computed_tokens=computed)
            for name, (blocks, computed, _) in new.items()
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(running),
            new_block_ids=[(blocks,) if blocks else None for blocks, _, _ in running.values()],
            num_computed_tokens=[computed for _, computed, _ in running.values()],
            resumed_req_ids=set(resumed),
        ),
        preempted_req_ids=set(preempted),
    )
