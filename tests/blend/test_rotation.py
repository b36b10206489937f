"""Rotation against vLLM's own rotary embeddings: what they make of keys at one position, moved to another."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import rotary_embedding

from cachetier_blend.rotation import CannotRotate, Rotary, read_rotary, rotate

pytestmark = pytest.mark.slow  # vLLM's own classes are imported, and asked for every kind

HEAD_SIZE = 64
MAX_POSITIONS = 131_072
BF16_ERROR_MAX = 0.005
FLOAT32_ERROR_MAX = 1e-4
ANGLE_ERROR_A_TOKEN = 1e-8  # vLLM's tables hold angles rounded to float32; beyond 10,000 tokens that is the larger part
POSITIONS = [(0, 1), (0, 100), (37, 5), (1000, 0), (5, 8000), (120, 60_001), (99_000, 17), (64, 100_000)]

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32_768}
DEEPSEEK = {"factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
LONG = {"original_max_position_embeddings": 4096}
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 10_000.0},
    "large base": {"rope_type": "default", "rope_theta": 5_000_000},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 500_000.0, **LLAMA3},
    "yarn": {"rope_type": "yarn", "rope_theta": 1_000_000.0, **YARN},
    "yarn, untruncated": {"rope_type": "yarn", "rope_theta": 150_000.0, "truncate": False, "beta_fast": 24, **YARN},
    "yarn, scaled": {"rope_type": "yarn", "rope_theta": 1_000_000.0, "attention_factor": 1.7, **YARN},
    "deepseek_yarn": {"rope_type": "deepseek_yarn", "mscale": 1.0, "mscale_all_dim": 0.5, **DEEPSEEK},
    "longrope": {"rope_type": "longrope", "rope_theta": 10_000.0, **LONG},
}


@dataclass(frozen=True)
class Case:
    """One embedding: of vLLM and as read by us."""

    embedding: Any
    rotary: Rotary
    dtype: torch.dtype

    def at(self, keys: torch.Tensor, position: int) -> torch.Tensor:
        """Return what vLLM makes of keys `[tokens, heads, head_size]` whose first token is at `position`."""
        positions = torch.arange(position, position + len(keys))
        # LongRoPE's class takes the heads of a token in one row, DeepSeek's takes them apart, the others both.
        rows = keys if "Deepseek" in type(self.embedding).__name__ else keys.flatten(1)
        forward = getattr(self.embedding, "forward_native", self.embedding.forward)
        return forward(positions, rows.clone(), rows.clone())[1].view_as(keys)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the Frobenius norm of the difference, in that of `wanted`."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def parameters_of(kind: str, rotary_dim: int) -> dict[str, Any]:
    """Return the parameters as in a model's configuration."""
    parameters = KINDS[kind] | {"partial_rotary_factor": rotary_dim / HEAD_SIZE}
    if kind == "longrope":
        steps = range(rotary_dim // 2)
        parameters["short_factor"] = [1.0 + 0.01 * step for step in steps]
        parameters["long_factor"] = [1.0 + 0.3 * step for step in steps]
    return parameters


def read(parameters: dict[str, Any], rotary_dim: int, is_interleaved: bool, max_positions: int) -> Rotary:
    sizes = {"head_size": HEAD_SIZE, "rotary_dim": rotary_dim}
    return read_rotary(parameters, is_interleaved=is_interleaved, max_positions=max_positions, **sizes)


Make = Callable[..., Case]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Return what makes cases within the configuration of an engine for `max_positions` tokens."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 64}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64, **sizes}
    Path(folder, "config.json").write_text(json.dumps(config | {"max_position_embeddings": MAX_POSITIONS}))

    @cache
    def engine_of(max_positions: int) -> VllmConfig:
        model = ModelConfig(model=str(folder), skip_tokenizer_init=True, max_model_len=max_positions)
        return VllmConfig(model_config=model)

    def make_case(
        kind: str,
        rotary_dim: int = HEAD_SIZE,
        is_interleaved: bool = False,
        dtype: torch.dtype = torch.float32,
        max_positions: int = MAX_POSITIONS,
    ) -> Case:
        parameters = parameters_of(kind, rotary_dim)
        with set_current_vllm_config(engine_of(max_positions)):
            # get_rope keeps what it made, also for an engine of another length
            rotary_embedding._ROPE_DICT.clear()
            embedding = rotary_embedding.get_rope(HEAD_SIZE, MAX_POSITIONS, not is_interleaved, parameters, dtype)
        return Case(embedding, read(parameters, rotary_dim, is_interleaved, max_positions), dtype)

    return make_case


def random_keys(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(48, 3, HEAD_SIZE, generator=torch.Generator().manual_seed(0)).to(dtype)


def errors(case: Case) -> list[float]:
    """Return the relative error of each pair of positions."""
    keys = random_keys(case.dtype)
    return [
        relative_error(rotate(case.at(keys, before), after - before, case.rotary), case.at(keys, after))
        for before, after in POSITIONS
    ]


WAYS = [
    (kind, rotary_dim, is_interleaved)
    for kind in KINDS
    for rotary_dim in (HEAD_SIZE, HEAD_SIZE // 2, HEAD_SIZE // 4)
    for is_interleaved in (False, True)
    if not (kind == "longrope" and is_interleaved)  # vLLM has none
]


@pytest.fixture(scope="module", params=WAYS, ids=lambda way: "-".join(map(str, way)))
def way(request: pytest.FixtureRequest) -> tuple[str, int, bool]:
    """Return a kind, how many numbers it rotates, and whether their pairs are interleaved."""
    return request.param


@pytest.fixture(scope="module")
def in_bf16(way: tuple[str, int, bool], make: Make) -> Case:
    return make(*way, torch.bfloat16)


@pytest.fixture(scope="module")
def in_float32(way: tuple[str, int, bool], make: Make) -> Case:
    return make(*way, torch.float32)


class TestAgainstVllm:
    def test_moved_keys_are_those_computed_at_the_new_position(self, in_bf16, in_float32):
        assert max(errors(in_bf16)) < BF16_ERROR_MAX
        found = errors(in_float32)
        bounds = [max(FLOAT32_ERROR_MAX, ANGLE_ERROR_A_TOKEN * max(pair)) for pair in POSITIONS]
        assert all(error < bound for error, bound in zip(found, bounds, strict=True)), found

    def test_a_base_that_is_off_by_five_percent_is_seen(self, way, in_bf16):
        kind, rotary_dim, is_interleaved = way
        parameters = parameters_of(kind, rotary_dim)
        parameters["rope_theta"] = 1.05 * parameters.get("rope_theta", 10_000)
        tampered = replace(in_bf16, rotary=read(parameters, rotary_dim, is_interleaved, MAX_POSITIONS))
        is_far = [abs(after - before) >= 1000 for before, after in POSITIONS]
        found = [error for error, far in zip(errors(tampered), is_far, strict=True) if far]
        assert min(found) > 10 * BF16_ERROR_MAX

    def test_frequencies_are_bit_for_bit_those_of_the_tables(self, way, in_float32):
        kind, embedding = way[0], in_float32.embedding
        if kind == "longrope":
            wanted = embedding._compute_inv_freq(embedding.long_factor)
        elif "yarn" in kind:
            wanted = embedding._compute_inv_freq(embedding.scaling_factor)
        else:
            wanted = embedding._compute_inv_freq(embedding.base)
        divisor = 4.0 if kind == "linear" else 1.0
        assert in_float32.rotary.frequencies == tuple((wanted.double() / divisor).tolist())


def test_long_rope_uses_the_factors_that_vllm_chooses_by_the_longest_prompt(make):
    short, long = make("longrope", max_positions=4096), make("longrope", max_positions=4097)
    keys = random_keys(torch.float32)
    for case, other in ((short, long), (long, short)):
        moved = rotate(case.at(keys, 20), 3000, case.rotary)
        assert relative_error(moved, case.at(keys, 3020)) < FLOAT32_ERROR_MAX
        assert relative_error(moved, other.at(keys, 3020)) > 0.1


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "'dynamic'.*depend on the length"),
        ({"rope_type": "default", "mrope_section": [8, 12, 12]}, "mrope"),
        ({"rope_type": "yarn", "mrope_section": [8, 12, 12], **YARN}, "mrope"),
        ({"rope_type": "default", "use_fope": True}, "fope"),
        ({"rope_type": "deepseek_yarn", "is_deepseek_v4": True, **DEEPSEEK}, "DeepSeek V4"),
        ({"rope_type": "of tomorrow"}, "'of tomorrow'.*not known"),
        ({"type": "dynamic", "factor": 2.0}, "'dynamic'"),
        ({"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}}, "layers"),
        ({"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings"),
        ({"rope_type": "llama3", **LLAMA3, "factor": "8"}, "'llama3'"),
        ({"rope_type": "longrope", "long_factor": [1.0], "short_factor": [1.0] * 3, **LONG}, "'longrope'"),
    ],
)
def test_what_cannot_be_rotated_is_refused_with_the_reason(parameters, reason):
    with pytest.raises(CannotRotate, match=reason):
        read(parameters, HEAD_SIZE, False, 4096)


@pytest.mark.parametrize("rotary_dim", [0, 7, HEAD_SIZE + 2])
def test_sizes_that_make_no_pairs_are_refused(rotary_dim):
    with pytest.raises(CannotRotate, match=f"{rotary_dim} numbers"):
        read({}, rotary_dim, False, 4096)


@pytest.mark.parametrize("is_interleaved", [False, True])
class TestRotate:
    def rotary(self, is_interleaved: bool, first_dim: int = 0, rotary_dim: int = HEAD_SIZE) -> Rotary:
        return replace(read({}, rotary_dim, is_interleaved, 4096), first_dim=first_dim)

    def test_pairs_turn_by_the_angle_and_other_numbers_stay(self, is_interleaved):
        rotary = self.rotary(is_interleaved, first_dim=12, rotary_dim=8)
        keys = random_keys(torch.float32)
        moved, wanted = rotate(keys, 7, rotary), keys.clone()
        for number, frequency in enumerate(rotary.frequencies):
            one, two = (2 * number, 2 * number + 1) if is_interleaved else (number, number + 4)
            turn = torch.polar(torch.tensor(1.0), torch.tensor(7 * frequency))
            turned = torch.complex(keys[..., 12 + one], keys[..., 12 + two]) * turn
            wanted[..., 12 + one], wanted[..., 12 + two] = turned.real, turned.imag
        assert torch.allclose(moved, wanted, atol=1e-6)
        rotated = slice(12, 20)
        moved[..., rotated] = keys[..., rotated]
        assert torch.equal(moved, keys)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_rows_of_chunks_are_rotated_in_any_layout_and_the_given_ones_stay(self, is_interleaved, dtype):
        rotary = self.rotary(is_interleaved)
        generator = torch.Generator().manual_seed(1)
        rows = torch.randn(2, 3, 2, 40, 2 * HEAD_SIZE, generator=generator).to(dtype)  # K row | V row
        keys, before = rows[..., :HEAD_SIZE], rows.clone()
        moved = rotate(keys, -9, rotary)
        assert (moved.shape, moved.dtype) == (keys.shape, dtype)
        assert torch.equal(rows, before)
        assert torch.equal(moved, torch.stack([rotate(key, -9, rotary) for key in keys.flatten(0, 2)]).view_as(moved))
        assert torch.equal(rotate(keys.transpose(1, 2), -9, rotary), moved.transpose(1, 2))

    def test_there_and_back_is_where_it_was(self, is_interleaved):
        rotary, keys = self.rotary(is_interleaved), random_keys(torch.float32)
        assert torch.equal(rotate(keys, 0, rotary), keys)
        assert relative_error(rotate(rotate(keys, 90_000, rotary), -90_000, rotary), keys) < 1e-6
        assert relative_error(rotate(rotate(keys, 500, rotary), 123, rotary), rotate(keys, 623, rotary)) < 1e-6

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
    def test_numbers_of_eight_bits_are_rounded_once_and_never_overflow(self, is_interleaved, dtype):
        rotary, limit = self.rotary(is_interleaved), torch.finfo(dtype).max
        keys = (random_keys(torch.float32) * limit / 2).clamp(-limit, limit).to(dtype)
        exact = rotate(keys.float(), 33, rotary).clamp(-limit, limit)
        moved = rotate(keys, 33, rotary).float()
        assert torch.equal(moved, exact.to(dtype).float())
        assert moved.isfinite().all()
        assert exact.eq(limit).any()

    def test_one_row_needs_no_other_dimensions(self, is_interleaved):
        rotary, keys = self.rotary(is_interleaved), random_keys(torch.float32)
        assert torch.equal(rotate(keys[0, 0], 5, rotary), rotate(keys, 5, rotary)[0, 0])

    def test_no_rows_are_no_fault(self, is_interleaved):
        assert rotate(torch.zeros(0, 3, HEAD_SIZE), 5, self.rotary(is_interleaved)).shape == (0, 3, HEAD_SIZE)
