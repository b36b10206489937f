"""Who had the beginning of this prompt last: a bounded memory from blocks of prompts to names of engines.

The router sees no engine's GPU cache. But an engine that has just had a prompt's beginning most likely holds it there,
where a hit costs a third of a load from host memory, and a producer, which loads nothing, computes all that it does not
hold there. So prompts go where their beginnings went, as in the prefix-aware routing of production-stack and llm-d. A
block's hash covers all that stands before it. The memory is a guess: it is wrong after an eviction, and that costs a
load, or a prefill, and never an answer.

Pure, on the event loop's thread.
"""

from collections import OrderedDict
from collections.abc import Collection, Sequence

CAPACITY = 1 << 17  # blocks: about 30 million tokens, 30 MB


class Affinity:
    """Blocks, and which engine was sent each of them last. Forgets those that were longest not asked for."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._engine_of: OrderedDict[int, str] = OrderedDict()

    def find(self, blocks: Sequence[int], names: Collection[str]) -> str:
        """Return which of the engines `names` had most of a prompt's leading blocks, or an empty name."""
        found = ""
        for block in blocks:
            name = self._engine_of.get(block)
            if name is None:
                break
            if name in names:
                found = name
        return found

    def note(self, blocks: Sequence[int], name: str) -> None:
        """Remember that the engine `name` has these blocks now."""
        for block in reversed(blocks):  # so that a prompt's last blocks are forgotten before its first ones
            self._engine_of[block] = name
            self._engine_of.move_to_end(block)
        while len(self._engine_of) > self._capacity:
            self._engine_of.popitem(last=False)
