"""How much of a prompt is on its way: being stored, or promised. The caller holds the store's lock."""

from cachetier.core.messages import Wait
from cachetier.store.books import Books
from cachetier.store.prompt import Prompt
from cachetier.store.wait_table import ChunkWait

PROMISE_GRACE_S = 1.0  # a request may reach the engine that waits before the one that promises


def count_pending(books: Books, engine: str, prompt: Prompt, start: int, *, with_promised: bool = True) -> int:
    """Return how many chunks from `start` on are in memory, being stored, or promised by others than `engine`."""
    get, promises, count = books.table.chunks.get, books.promises, 0
    for number in range(start, len(prompt.keys)):
        chunk = get(prompt.keys[number])
        if chunk is not None:
            is_coming = prompt.has(number, chunk)
        else:
            is_coming = with_promised and promises.is_made(prompt.keys[number], not_by=engine)
        if not is_coming:
            break
        count += 1
    return count


def begun_wait(books: Books, asked: Wait, engine: str, prompt: Prompt) -> ChunkWait:
    """Return the wait that a match asks for; it stands in no table yet."""
    is_coming = asked.for_promised and books.engines.is_producer(asked.prefill)
    return ChunkWait(asked, engine, prompt, books.clock() + PROMISE_GRACE_S if is_coming else 0.0)


def num_awaited(books: Books, wait: ChunkWait) -> int:
    """Return how many chunks after the held ones `wait` is waiting for."""
    prompt = wait.prompt
    start = len(prompt.held)
    num_pending = count_pending(books, wait.engine, prompt, start, with_promised=wait.for_promised)
    if not num_pending and books.clock() < wait.promised_by_s:
        return len(prompt.keys) - start
    return num_pending
