"""The blend pass: the engine's own model computes chosen runs of prompts, in place, outside of vLLM's scheduling.

The runs become one vLLM batch in which every run is a sequence of `end - start` query tokens with `end` tokens in all,
whose KV stands in the blocks of its request. The engine's attention kernels then apply the exact causal mask whatever
the backend, and new KV of earlier runs is seen by later ones in the same layer. Runs on the worker's main thread, on
the engine's own stream, in the same step on all ranks. The one module of this package that imports vllm.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_KNOWN_FIELDS = inspect.signature(CommonAttentionMetadata).parameters  # they differ between vLLM's versions


class PassRun(NamedTuple):
    """Consecutive tokens of one prompt to compute.

    Attributes:
        tokens: their ids, a sequence or an array of int32.
        start: position of the first.
        block_ids: the request's block table from its first block on.
    """

    tokens: Any
    start: int
    block_ids: Sequence[int]

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + len(self.tokens)


class BlendPass:
    """One worker's model, ready to compute runs."""

    def __init__(self, model: torch.nn.Module, vllm_config: "VllmConfig", spec: Any, layers: Sequence[str]) -> None:
        """Prepare passes.

        Args:
            model: as vLLM loaded it.
            vllm_config: of this worker.
            spec: vLLM's specification of the KV cache group, which is the model's only one.
            layers: names of the group's attention layers, in order.
        """
        self._model, self._vllm_config = model, vllm_config
        self._block_tokens: int = spec.block_size
        self._device = next(model.parameters()).device
        self._layers = list(layers)
        self._attention: Mapping[str, Any] = vllm_config.compilation_config.static_forward_context
        backend = self._attention[self._layers[0]].get_attn_backend()
        self._builder = backend.get_builder_cls()(spec, self._layers, vllm_config, self._device)

    @property
    def scale(self) -> float:
        """What the attention's products of queries and keys are multiplied by."""
        return float(self._attention[self._layers[0]].impl.scale)

    def compute(self, runs: Sequence[PassRun], *, shift: int = 0) -> torch.Tensor:
        """Compute the KV of `runs`; everything before each run in its blocks is visible to it.

        Returns as soon as the work is launched; on a GPU it runs in the order of the current stream. The caller keeps
        to `max_num_batched_tokens` and `max_num_seqs`.

        Args:
            runs: disjoint; those of one request ascending.
            shift: added to all positions that the model sees, while the KV stays where it is.

        Returns:
            The hidden states `[tokens, hidden size]` after the last layer, run after run.
        """
        ids, positions, slots, metadata = self._batch(runs)
        with (
            torch.inference_mode(),
            set_forward_context(
                dict.fromkeys(self._layers, metadata),
                self._vllm_config,
                num_tokens=len(ids),
                slot_mapping=dict.fromkeys(self._layers, slots),
            ),
        ):
            hidden = self._model(input_ids=ids, positions=positions + shift)
        assert isinstance(hidden, torch.Tensor), "a model that returns more than hidden states is not blended"
        return hidden

    @contextmanager
    def watched(self, layers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
        """Within this context, keep what the passes' queries are: `[tokens, heads, head_size]`, rotated, by layer."""
        queries: dict[int, torch.Tensor] = {}

        def watch(layer: int, forward: Any) -> Any:
            def watching(attention: Any, query: torch.Tensor, *arguments: Any, **named: Any) -> Any:
                queries[layer] = query.clone()
                return forward(attention, query, *arguments, **named)

            return watching

        implementations = {layer: self._attention[self._layers[layer]].impl for layer in layers}
        for layer, implementation in implementations.items():
            implementation.forward = watch(layer, implementation.forward)
        try:
            yield queries
        finally:
            for implementation in implementations.values():
                del implementation.forward  # the method of its class shows again

    def _batch(self, runs: Sequence[PassRun]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]:
        """Return token ids, positions, slots and attention metadata of a pass.

        vLLM drops torch.compile's guards: ids must be int32 and positions int64, as in its own buffers.
        """
        starts, ends = (np.array([getattr(run, name) for run in runs], np.int32) for name in ("start", "end"))
        lengths = ends - starts
        query_start = np.concatenate(([0], lengths.cumsum())).astype(np.int32)
        positions = np.concatenate([np.arange(run.start, run.end) for run in runs])
        tables = np.zeros((len(runs), max(len(run.block_ids) for run in runs)), np.int32)
        known = {id(run.block_ids): np.array(run.block_ids, np.int32) for run in runs}  # runs of a request share one
        for row, run in zip(tables, runs, strict=True):
            row[: len(run.block_ids)] = known[id(run.block_ids)]
        blocks = tables[np.arange(len(runs)).repeat(lengths), positions // self._block_tokens].astype(np.int64)
        slots = self._send(blocks * self._block_tokens + positions % self._block_tokens)
        ids = np.concatenate([np.asarray(run.tokens, np.int32) for run in runs])
        fields = {
            "query_start_loc": self._send(query_start),
            "query_start_loc_cpu": torch.from_numpy(query_start),
            "seq_lens": self._send(ends),
            "_seq_lens_cpu": torch.from_numpy(ends),
            "seq_lens_cpu_upper_bound": torch.from_numpy(ends),
            "num_reqs": len(runs),
            "num_actual_tokens": len(positions),
            "max_query_len": int(lengths.max()),
            "max_seq_len": int(ends.max()),
            "slot_mapping": slots,
            "causal": True,
            "block_table_tensor": self._send(tables),
            "is_prefilling": torch.ones(len(runs), dtype=torch.bool),
        }
        common = CommonAttentionMetadata(**{name: value for name, value in fields.items() if name in _KNOWN_FIELDS})
        metadata = self._builder.build(0, common)
        return self._send(ids), self._send(positions), slots, metadata

    def _send(self, values: "np.ndarray[Any, Any]") -> torch.Tensor:
        """Copy to the device; through pinned memory, or the copy would wait for all work launched before."""
        tensor = torch.from_numpy(values)
        if self._device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)
