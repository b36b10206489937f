"""Stage plans with what the kernels need of them on the device; made once for each way that chunks are cut.

Locking design: `_lock` guards the table; plans never change. Making one blocks for a moment.
"""

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch

from cachetier.core.layout import KVLayout, Shard
from cachetier_connector.cuda.device import Device
from cachetier_connector.cuda.kernels import WORD_BYTES
from cachetier_connector.cuda.paged_layers import PagedLayers
from cachetier_connector.cuda.stage_plan import StagePlan, plan_parts, plan_single_objects


class DevicePlan(NamedTuple):
    """A stage plan with its tables on the device, and the layers that its part lies in.

    Attributes:
        is_exact: the pages are those of the part and of nothing else, so they can be digested in the paged blocks.
    """

    plan: StagePlan
    layers: PagedLayers
    unit_offsets: torch.Tensor
    page_bytes: torch.Tensor
    is_exact: bool


class DevicePlans:
    """The plans by tiling and chunk size. Any thread."""

    def __init__(
        self, device: Device, caches: Sequence[torch.Tensor], layout: KVLayout, shard: Shard, slot_bytes: int
    ) -> None:
        """Serve `shard`, which `caches` hold: one tensor a layer."""
        self._device, self._caches, self._layout, self._shard = device, caches, layout, shard
        self._slot_bytes = slot_bytes
        self._lock = threading.Lock()
        self._layers: dict[Shard, PagedLayers] = {}
        self._plans: dict[tuple[tuple[Shard, ...], int, bool], list[DevicePlan]] = {}

    def get(self, tiling: Sequence[Shard], chunk_tokens: int, *, is_staged: bool = True) -> list[DevicePlan]:
        """Return one plan for each part of the shard that is moved on its own.

        Those of chunks that are not staged, but used where they lie, need one object each.

        Raises:
            ConfigError: such chunks cannot be staged.
        """
        key = (tuple(tiling), chunk_tokens, is_staged)
        with self._lock:
            if key not in self._plans:
                if is_staged:
                    plans = plan_parts(self._layout, tiling, self._shard, chunk_tokens, self._slot_bytes)
                else:
                    plans = plan_single_objects(self._layout, tiling, self._shard, chunk_tokens)
                self._plans[key] = [self._on_device(plan, chunk_tokens) for plan in plans]
            return self._plans[key]

    def _on_device(self, plan: StagePlan, chunk_tokens: int) -> DevicePlan:
        layers = self._layers_of(plan.part)
        return DevicePlan(
            plan,
            layers,
            self._device.constant(plan.unit_offsets, torch.int64),
            self._device.constant(plan.page_bytes, torch.int32),
            is_exact=layers.unit_bytes == WORD_BYTES
            and len(plan.ranges) == 1
            and sum(plan.page_bytes) == layers.shard_bytes(chunk_tokens),
        )

    def _layers_of(self, part: Shard) -> PagedLayers:
        if part not in self._layers:
            whole = self._shard
            caches = self._caches[part.layer_start - whole.layer_start : part.layer_end - whole.layer_start]
            if (part.head_start, part.head_end) != (whole.head_start, whole.head_end):
                heads = slice(part.head_start - whole.head_start, part.head_end - whole.head_start)
                caches = [cache[:, heads] for cache in caches]
            self._layers[part] = PagedLayers.of(caches)
        return self._layers[part]
