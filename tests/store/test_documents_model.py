"""Random prompts over random documents, against a model that compares tokens and hashes nothing."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.store.chunks import CHUNK_TOKENS
from tests.store.shelves import CHUNK_BYTES, Shelf, fingerprint_of, text_of

# Few kinds of chunks, so that documents overlap, contain and continue each other and stand at many offsets.
CHUNKS = st.lists(st.integers(0, 1), min_size=7, max_size=12)
# A document: a piece of an earlier one, if there is one, and more.
DOCUMENTS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12), CHUNKS), min_size=1, max_size=5)
# A piece of a prompt: noise, or of a document's tokens all but the first and last few.
NOISE = st.integers(0, 40)
PIECES = st.lists(NOISE | st.tuples(st.integers(0, 4), st.integers(0, 20), st.integers(0, 40)), max_size=6)
LIES = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 4)), max_size=8)


def spelled(chunks: list[int]) -> bytes:
    return b"".join(text_of(chunk, CHUNK_TOKENS) for chunk in chunks)


def texts_of(parts: list[tuple[int, int, list[int]]]) -> list[bytes]:
    texts = [b""]
    for earlier, num_chunks, chunks in parts:
        texts.append(texts[earlier % len(texts)][: num_chunks * CHUNK_BYTES] + spelled(chunks))
    return texts[1:]


def piece_of(texts: list[bytes], piece: int | tuple[int, int, int]) -> bytes:
    if isinstance(piece, int):
        return text_of("noise", piece)
    number, first, rest = piece
    text = texts[number % len(texts)]
    return text[4 * max(first - 10, 0) : len(text) - 4 * max(rest - 20, 0)]


def expected(documents: dict[str, bytes], prompt: bytes, candidates: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return offset and chunks of each run."""
    runs, end = [], 0
    for offset, fingerprint in candidates:
        rest = prompt[offset * 4 :]
        alike = [text for text in documents.values() if fingerprint_of(text) == fingerprint]
        longest = max((common_chunks(text, rest) for text in alike), default=0)
        if offset >= end and longest * CHUNK_TOKENS >= 128:
            runs.append((offset, longest))
            end = offset + longest * CHUNK_TOKENS
    return runs


def common_chunks(document: bytes, rest: bytes) -> int:
    count = 0
    while True:
        chunk = slice(count * CHUNK_BYTES, (count + 1) * CHUNK_BYTES)
        if document[chunk] != rest[chunk] or len(rest[chunk]) < CHUNK_BYTES:
            return count
        count += 1


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=DOCUMENTS, pieces=PIECES, lies=LIES, conversation=CHUNKS)
def test_nothing_is_claimed_that_does_not_compare_equal_and_all_that_does_is(
    open_store, parts, pieces, lies, conversation
):
    """Candidates found and invented; the tier holds more than the documents."""
    shelf = Shelf(open_store(disk_bytes=0, host_bytes=16 << 20))
    texts = texts_of(parts)
    documents = {f"{number}": text for number, text in enumerate(texts) if len(text) >= 128 * 4}
    for name, text in documents.items():
        shelf.put(text + spelled(conversation))
        shelf.register(name, text, put=False)
    prompt = b"".join(piece_of(texts, piece) for piece in pieces)
    found = {offset: fingerprint_of(texts[number % len(texts)]) for offset, number in lies}
    found |= dict(shelf.candidates(prompt))
    candidates = sorted((offset, each) for offset, each in found.items() if offset < len(prompt) // 4)

    runs = shelf.find(prompt, candidates)
    end = 0
    for run in runs:
        start, size = run.offset * 4, run.match.num_chunks * CHUNK_BYTES
        assert run.offset >= end, "runs overlap"
        assert prompt[start : start + size] == documents[run.document][:size], "more is claimed than stands there"
        assert shelf.check(run.match) == [True] * run.match.num_chunks
        assert run.match.keys == shelf.match(prompt[start : start + size]).keys
        end = run.offset + run.num_tokens
    assert [(run.offset, run.match.num_chunks) for run in runs] == expected(documents, prompt, candidates)
