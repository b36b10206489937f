"""A copy engine that keeps blocks, as one for GPUs does, but runs anywhere: for tests of the protocol around it."""

from collections.abc import Callable

from cachetier_connector.copy_cpu import CpuCopyEngine


class LazyCopyEngine(CpuCopyEngine):
    """Its snapshots are block numbers; `fill` reads the blocks, chunk by chunk, whoever owns them by then."""

    before_chunk: Callable[[], None] = staticmethod(lambda: None)

    @property
    def keeps_blocks(self):
        return True

    def snapshot(self, block_ids, first_token, num_chunks, chunk_tokens):
        return list(block_ids), first_token, num_chunks, chunk_tokens

    def fill(self, snapshot, numbers, arena, frames, is_wanted):
        checksums = []
        for number, frame in zip(numbers, frames, strict=True):
            if is_wanted():
                self.before_chunk()
                checksums += super().fill(self.gather(*snapshot)[number:], [0], arena, [frame], lambda: True)
            else:
                checksums.append(None)
        return checksums
