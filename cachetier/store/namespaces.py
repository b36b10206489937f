"""The known namespaces: who they are, what their chunks look like, which tilings of them were checked.

Pure bookkeeping; the caller holds the store's lock.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Sequence

from cachetier.core.errors import ProtocolError
from cachetier.core.keys import ModelIdentity, NamespaceId, namespace_of
from cachetier.core.layout import KVLayout, Shard, frame_bytes
from cachetier.core.messages import NamespaceInfo
from cachetier.storage.arena import Arena
from cachetier.store.chunk import Tiling

NAMESPACES_MAX = 1024
TILINGS_MAX = 64
LAYERS_MAX, HEADS_MAX, ROW_BYTES_MAX = 4096, 4096, 1 << 20


class Namespace:
    """One model: its identity, its layout and the tilings in use."""

    def __init__(self, identity: ModelIdentity, layouts: list[KVLayout], chunk_tokens: int, arena: Arena) -> None:
        self.id = namespace_of(identity)
        self.identity = identity
        self.layouts = layouts
        self.layout = layouts[0]
        self._chunk_tokens = chunk_tokens
        self._arena = arena
        self._tilings: dict[tuple[Shard, ...], Tiling] = {}

    def tiling(self, shards: Sequence[Shard]) -> Tiling:
        """Return the tiling made of `shards`, checking it when it is new.

        Raises:
            ProtocolError: it does not cover every head and layer exactly once, an object is too large for the arena,
                or this namespace has been cut in too many ways already.
        """
        parts = tuple(shards)
        known = self._tilings.get(parts)
        if known is not None:
            return known
        self._check(parts)
        if len(self._tilings) >= TILINGS_MAX:
            raise ProtocolError(f"the namespace is cut in {TILINGS_MAX} ways already")
        largest = max(frame_bytes(self.layout.object_bytes(part, self._chunk_tokens)) for part in parts)
        if largest > self._arena.largest_frame_bytes:
            raise ProtocolError(
                f"an object needs a frame of {largest} bytes, and the largest that the arena gives has "
                f"{self._arena.largest_frame_bytes}: raise host_bytes or lower chunk_tokens"
            )
        tiling = Tiling(self.layout, parts, self._chunk_tokens, self._arena.size_class)
        self._tilings[parts] = tiling
        return tiling

    def _check(self, parts: tuple[Shard, ...]) -> None:
        layout = self.layout
        cells = 0
        for part in parts:
            if not (
                0 <= part.head_start < part.head_end <= layout.num_kv_heads
                and 0 <= part.layer_start < part.layer_end <= layout.num_layers
            ):
                raise ProtocolError(f"{part} is not within {layout.num_kv_heads} heads and {layout.num_layers} layers")
            cells += (part.head_end - part.head_start) * (part.layer_end - part.layer_start)
        # Counted before check_tiling lists them: its work is bounded by the layout, whatever the message says.
        if cells != layout.num_kv_heads * layout.num_layers or not layout.check_tiling(list(parts)):
            raise ProtocolError("the tiling does not cover every head and layer exactly once")


class NamespaceTable:
    """All namespaces; past NAMESPACES_MAX the one registered longest ago is forgotten (its engine registers again)."""

    def __init__(self, chunk_tokens: int, arena: Arena) -> None:
        self._chunk_tokens = chunk_tokens
        self._arena = arena
        self._known: OrderedDict[NamespaceId, Namespace] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, namespace: bytes) -> Namespace:
        """Return a registered namespace.

        Raises:
            ProtocolError: status 404, it is not registered.
        """
        known = self._known.get(NamespaceId(namespace))
        if known is None:
            raise ProtocolError(f"namespace {namespace[:16].hex()} is not registered", status=404)
        return known

    def infos(self) -> list[NamespaceInfo]:
        """Describe all of them, the one registered last at the end."""
        return [NamespaceInfo(namespace=known.id.hex(), identity=known.identity) for known in self._known.values()]

    def model_of(self, namespace: NamespaceId) -> str:
        """Return the name of a namespace's model, empty if it is not registered."""
        known = self._known.get(namespace)
        return known.identity.model if known else ""

    def recall(self, identity: ModelIdentity, layouts: list[KVLayout]) -> None:
        """Register what the data directory remembers; what this version cannot serve is left out."""
        with contextlib.suppress(ProtocolError):
            self.register(identity, layouts)

    def register(self, identity: ModelIdentity, layouts: list[KVLayout]) -> tuple[Namespace, bool]:
        """Make a namespace known; also tell whether it is new.

        Raises:
            ProtocolError: the layouts are impossible (400) or not those it was registered with (409).
        """
        _check_layouts(layouts)
        known = self._known.get(namespace_of(identity))
        if known is None:
            known = Namespace(identity, layouts, self._chunk_tokens, self._arena)
            self._known[known.id] = known
            if len(self._known) > NAMESPACES_MAX:
                self._known.popitem(last=False)
            return known, True
        if known.layouts != layouts:
            raise ProtocolError("the namespace is registered with other layouts", status=409)
        self._known.move_to_end(known.id)
        return known, False


def _check_layouts(layouts: list[KVLayout]) -> None:
    if len(layouts) != 1:
        raise ProtocolError(f"{len(layouts)} KV cache groups: this version serves models with one")
    layout = layouts[0]
    limits = (("num_layers", LAYERS_MAX), ("num_kv_heads", HEADS_MAX), ("row_bytes", ROW_BYTES_MAX))
    for name, most in limits:
        if not 1 <= getattr(layout, name) <= most:
            raise ProtocolError(f"{name} is {getattr(layout, name)}; it must be between 1 and {most}")
    if not 0 <= layout.group < 256:
        raise ProtocolError(f"group is {layout.group}; it must be between 0 and 255")
