"""What is the same for all contenders: model, sizes, lengths, and how much is asked."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from tests.e2e.harness import PATIENT

GIB = 1 << 30
KV_DTYPE_BYTES = 2

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "hidden_act": "silu",
    "dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "tie_word_embeddings": False,
}
# Little to compute and much KV a token (256 KiB), so that the bus is what requests wait for.
WIDE = LLAMA_8B | {
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 32000,
}
TINY = LLAMA_8B | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 4096,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One run's circumstances.

    Attributes:
        folder: for models, logs, sockets and data.
        is_rehearsal: on the CPU with a tiny model: does it run at all?
        is_eager: neither torch.compile nor CUDA graphs.
        host_bytes: host memory for each contender.
        disk_bytes: of cachetier's server where the disk is measured.
        gpu_tier_bytes: of cachetier's GPU tier where that is measured.
        kv_tokens: what fits into an engine's own KV cache.
        lengths: prompts to load.
        cold_lengths: prompts to compute.
        tier_length: the prompt that is loaded from the GPU tier, from disk, and without checksums.
        rounds: how often each is asked; what is quick or hard to tell apart, a few times as often.
        documents, document_tokens, questions: of the workload with long documents.
        pairs, pair_tokens: requests that hit and that store at the same time, and their length.
        settle_s: pause after which a contender without counters is taken to have stored.
    """

    folder: Path
    is_rehearsal: bool = False
    is_eager: bool = False
    host_bytes: int = 28 * GIB
    disk_bytes: int = 32 * GIB
    gpu_tier_bytes: int = 5 * GIB
    kv_tokens: int = 72 << 10
    lengths: tuple[int, ...] = (8192, 32768, 65536)
    cold_lengths: tuple[int, ...] = (8192, 32768)
    tier_length: int = 32768
    rounds: int = 5
    documents: int = 20
    document_tokens: int = 10_000
    questions: int = 64
    pairs: int = 160
    pair_tokens: int = 4096
    settle_s: float = 0.25

    @property
    def model(self) -> dict[str, Any]:
        """The shape of the model that is asked."""
        return TINY if self.is_rehearsal else LLAMA_8B

    @property
    def wide_model(self) -> dict[str, Any]:
        """The shape of the model with much KV."""
        return TINY if self.is_rehearsal else WIDE

    @property
    def environment(self) -> dict[str, str]:
        """What the engines' environment needs besides."""
        return {"VLLM_CPU_KVCACHE_SPACE": "1"} if self.is_rehearsal else {}

    @property
    def pin_s(self) -> float:
        """How long cachetier's workers page-lock the arena in the background, once they have used it."""
        return 0.0 if self.is_rehearsal else 0.35 * self.host_bytes / GIB

    @property
    def connector_settings(self) -> dict[str, Any]:
        """What cachetier's connector is told: its defaults, except on a machine that is busy with other things."""
        return dict(PATIENT) if self.is_rehearsal else {}

    def engine_arguments(self) -> dict[str, Any]:
        """Return vLLM's engine arguments."""
        arguments = {
            "model": self.write_model("model", self.model),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": "bfloat16",
            "max_num_batched_tokens": 16384,
            "max_num_seqs": 64,
            "max_model_len": max(self.lengths) + 1024,
            "enforce_eager": self.is_eager or self.is_rehearsal,
            "seed": 0,
        }
        if not self.is_rehearsal:
            arguments |= {"gpu_memory_utilization": 0.15} | kv_memory(self.model, self.kv_tokens)
        if not arguments["enforce_eager"]:
            arguments["compilation_config"] = {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256]}
        return arguments

    def wide_arguments(self) -> dict[str, Any]:
        """Return what differs for the model with much KV: every hit must come from outside, none from the GPU."""
        arguments: dict[str, Any] = {
            "model": self.write_model("wide", self.wide_model),
            "max_model_len": self.pair_tokens + 64,
            "enable_prefix_caching": False,
            "enforce_eager": True,
            "compilation_config": {},
        }
        return arguments if self.is_rehearsal else arguments | kv_memory(self.wide_model, 24 * self.pair_tokens)

    def write_model(self, name: str, model: dict[str, Any]) -> str:
        """Write a model's configuration; return its folder."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(model))
        return str(folder)


def token_bytes(model: dict[str, Any]) -> int:
    """Return the KV of one token."""
    heads = model["num_hidden_layers"] * model["num_key_value_heads"]
    return int(2 * heads * model["head_dim"] * KV_DTYPE_BYTES)


def kv_memory(model: dict[str, Any], num_tokens: int) -> dict[str, int]:
    """Return the engine argument that makes room for `num_tokens` tokens."""
    return {"kv_cache_memory_bytes": token_bytes(model) * num_tokens}


def rehearsal(folder: Path) -> Setting:
    """Return a setting that ends in a minute or two on two cores."""
    return Setting(
        folder=folder,
        is_rehearsal=True,
        host_bytes=GIB // 4,
        disk_bytes=GIB // 2,
        lengths=(256, 512, 1024),
        cold_lengths=(256, 512),
        tier_length=512,
        rounds=2,
        documents=4,
        document_tokens=300,
        questions=8,
        pairs=8,
        pair_tokens=256,
        settle_s=0.1,
    )
