"""The worker half's part in blending: computes runs of prompts with the engine's model, and tells whether it may.

Runs on the worker's main thread, in `start_loads`, with the same work in the same order on all ranks of the engine. A
pass is launched like a forward pass of the engine's own and is not waited for, except where tokens are selected.
"""

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cachetier_blend.blend_pass import BlendPass, PassRun
from cachetier_blend.plan import DocumentLoad, Run, choose_runs, cut_runs, merge
from cachetier_blend.rotation import CannotRotate, Rotary, read_rotary, rotate
from cachetier_blend.scoring import PIECE_TOKENS, QUERY_TOKENS, attention_paid, piece_scores, watched_layers
from cachetier_connector.copy_base import CopyEngine
from cachetier_connector.facts import EngineFacts
from cachetier_connector.model_keeper import loaded_model
from cachetier_connector.plan import BlendOp, CheckOp, Verdict

if TYPE_CHECKING:
    from vllm.config import VllmConfig

TEST_TOKENS = 64
# Of keys that one model computed at two positions; bf16 leaves 0.5 to 2%, wrong angles 50% and more.
TEST_ERROR_MAX = 0.05

log = logging.getLogger(__name__)


class Blender:
    """One worker's blend passes.

    Attributes:
        refusal: why it blends nothing; empty: it does.
    """

    def __init__(
        self, facts: EngineFacts, vllm_config: "VllmConfig", spec: Any, layers: Sequence[str], engine: CopyEngine
    ) -> None:
        """Get ready, and try on the free blocks of the engine whether keys can be moved.

        Args:
            facts: of the engine.
            vllm_config: of this worker.
            spec: of the KV cache group.
            layers: its layers in order.
            engine: of this rank's paged blocks; learns how keys are rotated.
        """
        self._facts, self._engine, self._num_layers = facts, engine, len(layers)
        self._failed: set[str] = set()
        self._finished: set[str] = set()
        self._bad_blocks: set[int] = set()
        self._computed: dict[str, int] = {}
        self._blended_logits: torch.Tensor | None = None
        self._verdict: Verdict | None = None
        try:
            self._model = model = _the_model()
            rotary = _rotary_of(model, vllm_config)
            self._pass = BlendPass(model, vllm_config, spec, layers)
            config = vllm_config.model_config
            error = self._try(rotary, config.max_model_len, config.get_vocab_size())
            self.refusal = "" if error <= TEST_ERROR_MAX else f"rotated keys differ by {error:.0%} from computed ones"
            engine.use_rotary(rotary)
        except CannotRotate as reason:
            self.refusal = str(reason)
        except Exception:  # the boundary to a model that nobody has tried this with
            log.exception("cachetier: the model cannot be blended with")
            self.refusal = "its model could not compute runs out of turn; the worker's log has more"
        self._agree()

    def carry_out(self, ops: Sequence[BlendOp]) -> None:
        """Compute the runs of one step, all in one pass, then what is selected."""
        try:
            if self.refusal:
                raise CannotRotate(self.refusal)
            began_s = time.monotonic()
            self._compute(ops)
            log.debug("cachetier: a blend pass was launched in %.2f ms", 1000 * (time.monotonic() - began_s))
        except Exception as error:
            log.exception("cachetier: a blend pass failed; vLLM computes its requests: %s", error)
            self._failed.update(op.request_id for op in ops)
        for op in ops:
            if op.is_last:
                self._finish(op)

    def check(self, op: CheckOp) -> None:
        """Compute a piece of a blended prompt again; with the last one, compare the answers and wait for the result."""
        try:
            hidden = self._pass.compute([PassRun(np.frombuffer(op.tokens, np.int32).copy(), op.start, op.block_ids)])
            if not op.answer:
                return
            with torch.inference_mode():
                logits = self._model.compute_logits(hidden[-1:])  # None on the ranks that vLLM does not gather them on
            if op.answer == "blended":
                self._blended_logits = logits
            elif logits is not None and self._blended_logits is not None:
                self._verdict = compare_answers(logits, self._blended_logits)
        except Exception as error:
            self._blended_logits = None
            log.exception("cachetier: blended request %s could not be checked: %s", op.request_id, error)

    def take_verdict(self) -> Verdict | None:
        """Return what a check has found since the last call; None on ranks without the model's answers."""
        verdict, self._verdict = self._verdict, None
        return verdict

    def take_finished(self) -> set[str]:
        """Return the requests whose last run was launched since the last call."""
        finished, self._finished = self._finished, set()
        return finished

    def take_bad_blocks(self) -> set[int]:
        """Return the blocks of requests among them whose passes failed."""
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def take_computed(self) -> dict[str, int]:
        """Return how many tokens were computed since the last call, by request."""
        computed, self._computed = self._computed, {}
        return computed

    def _finish(self, op: BlendOp) -> None:
        self._finished.add(op.request_id)
        if op.request_id in self._failed:
            self._failed.discard(op.request_id)
            self._bad_blocks.update(op.block_ids[op.loaded_from // self._facts.block_tokens :])

    def _compute(self, ops: Sequence[BlendOp]) -> None:
        runs = [_pass_run(op, start, end) for op in ops for start, end in op.runs]
        if not runs:
            return
        selecting = [op for op in ops if op.select]
        layers = watched_layers(self._num_layers) if selecting else []
        with self._pass.watched(layers) as queries:
            self._pass.compute(runs)
        first = 0
        for op in ops:
            num_tokens = sum(end - start for start, end in op.runs)
            self._count(op, num_tokens)
            first += num_tokens
            if op.select:
                chosen = self._choose(op, {layer: rows[:first] for layer, rows in queries.items()})
                self._compute_chosen(op, chosen)

    def _choose(self, op: BlendOp, queries: dict[int, torch.Tensor]) -> list[Run]:
        """Choose tokens by the attention of the op's last ones, whose queries stand last in `queries`."""
        select, (start, num_tokens) = op.select, op.runs[-1]
        assert select is not None
        num_queries = min(QUERY_TOKENS, num_tokens - start)
        paid = torch.zeros(num_tokens, dtype=torch.float32, device=next(iter(queries.values())).device)
        for layer, rows in queries.items():
            keys = self._engine.read_keys(layer, op.block_ids, num_tokens)
            paid += attention_paid(rows[-num_queries:], keys, self._pass.scale)
        loads = [DocumentLoad(number, start, end) for number, (start, end) in enumerate(select.loads)]
        scores = piece_scores(_summed_over_ranks(paid).tolist(), loads)
        return choose_runs(loads, scores, PIECE_TOKENS, select.budget)

    def _compute_chosen(self, op: BlendOp, chosen: list[Run]) -> None:
        """Compute the chosen tokens, and again what was computed before with their loaded KV in view."""
        assert op.select is not None
        runs = merge([*chosen, *(Run(*run) for run in op.select.computed)])
        for piece in cut_runs(runs, self._facts.pass_tokens_max, self._facts.pass_runs_max):
            self._pass.compute([_pass_run(op, *run) for run in piece])
            self._count(op, sum(run.end - run.start for run in piece))

    def _count(self, op: BlendOp, num_tokens: int) -> None:
        self._computed[op.request_id] = self._computed.get(op.request_id, 0) + num_tokens

    def _try(self, rotary: Rotary, max_model_len: int, vocab_size: int) -> float:
        """Compute the same tokens at two positions; return the error of the rotated keys in the worst layer."""
        num_tokens = min(TEST_TOKENS, max_model_len // 2)
        num_blocks = -(-num_tokens // self._facts.block_tokens)
        tokens = (np.arange(num_tokens) * 7919 % vocab_size).tolist()  # what they are does not matter
        here, there = (list(range(1 + n * num_blocks, 1 + (n + 1) * num_blocks)) for n in range(2))
        shift = max_model_len - num_tokens
        self._pass.compute([PassRun(tokens, 0, here)])
        self._pass.compute([PassRun(tokens, 0, there)], shift=shift)
        errors = []
        for layer in range(self._num_layers):
            moved = rotate(self._engine.read_keys(layer, here, num_tokens), shift, rotary).float()
            computed = self._engine.read_keys(layer, there, num_tokens).float()
            errors.append(float((moved - computed).norm() / computed.norm()))
        log.info("cachetier: blending: rotated keys differ by %.2f%% from computed ones", 100 * max(errors))
        return max(errors)

    def _agree(self) -> None:
        """Refuse on all ranks what one of them refuses."""
        from vllm.distributed.parallel_state import get_tp_group

        refuses = torch.tensor([1.0 if self.refusal else 0.0], device=get_tp_group().device)
        if float(get_tp_group().all_reduce(refuses)) and not self.refusal:
            self.refusal = "another rank refuses; its log has more"


def compare_answers(full: torch.Tensor, blended: torch.Tensor) -> Verdict:
    """Compare the logits of the next token, `[1, vocabulary]` each, after a full and a blended computation."""
    scores, blended_scores = (logits.float().log_softmax(dim=-1) for logits in (full, blended))
    terms = scores.exp() * (scores - blended_scores)  # NaN for tokens that a model excludes with -inf
    return Verdict(max(0.0, float(terms.nan_to_num(nan=0.0).sum())), bool(full.argmax() == blended.argmax()))


def _pass_run(op: BlendOp, start: int, end: int) -> PassRun:
    tokens = np.frombuffer(op.tokens, np.int32)[start - op.first_token : end - op.first_token]
    return PassRun(tokens.copy(), start, op.block_ids)


def _summed_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the sum over the tensor-parallel ranks, to the last bit the same on all of them."""
    from vllm.distributed.parallel_state import get_tp_group

    summed: torch.Tensor = get_tp_group().broadcast(get_tp_group().all_reduce(values), src=0)
    return summed


def _the_model() -> torch.nn.Module:
    model = loaded_model()
    if model is None:
        raise CannotRotate("the plugin of cachetier did not run before the model was loaded; is the package installed?")
    return model


def _rotary_of(model: torch.nn.Module, vllm_config: "VllmConfig") -> Rotary:
    """Return how the model rotates keys.

    Raises:
        CannotRotate: not at all, in several ways, or in one that is not known.
    """
    kinds = {
        (module.head_size, module.rotary_dim, bool(getattr(module, "is_neox_style", True)))  # LongRoPE does not say
        for module in model.modules()
        if hasattr(module, "head_size") and hasattr(module, "rotary_dim")
    }
    if len(kinds) != 1:
        raise CannotRotate("it has no rotary embedding" if not kinds else f"it has {len(kinds)} rotary embeddings")
    [(head_size, rotary_dim, is_neox)] = kinds
    model_config = vllm_config.model_config
    parameters = getattr(model_config.hf_text_config, "rope_parameters", None) or {}
    return read_rotary(
        parameters,
        head_size=head_size,
        rotary_dim=rotary_dim,
        is_interleaved=not is_neox,
        max_positions=model_config.max_model_len,
    )
