"""Looking for registered documents in a prompt: where they stand, and where one almost stands. Pure functions.

An engine finds documents by the hash of their first chunk, so a document whose first chunk differs in a single token is
not found at all. Here pieces of the first chunk are looked for, which tells at which token the two part. Usually it
is the first: the tokenizer glued it to what stands before it in the prompt.
"""

from collections.abc import Sequence
from typing import NamedTuple

from cachetier.core.document_messages import DocumentInfo
from cachetier.core.keys import TOKEN_BYTES

PIECE_TOKENS = 16  # so many tokens in a row are no coincidence
PIECES_AT = (0, 1, 4, 8, 16, 24, 32, 48)  # where the pieces start in the first chunk; gluing changes its beginning
GLUED_TOKENS_MAX = 8


class Place(NamedTuple):
    """Where in a prompt a document's first chunk stands."""

    offset: int
    document: DocumentInfo


class NearMiss(NamedTuple):
    """A document whose first chunk does not stand in a prompt, though part of it does.

    Attributes:
        offset: the prompt's token at which the document would begin; negative: before the prompt begins.
        document: which.
        token: the number, from 1, of the document's first token that differs.
        num_different: how many tokens of its first chunk do.
        is_glued: only the first few do, as where the tokenizer glued them to what stands before them.
    """

    offset: int
    document: DocumentInfo
    token: int
    num_different: int
    is_glued: bool


def search(prompt: bytes, documents: Sequence[DocumentInfo]) -> tuple[list[Place], list[NearMiss]]:
    """Look for `documents` in `prompt`, little-endian int32.

    Returns:
        All places, by their offsets; and for each document that has none the best near miss, if there is any.
    """
    pieces = _pieces(prompt)
    places: list[Place] = []
    near_misses: list[NearMiss] = []
    for document in documents:
        missing = []
        found = False
        for offset in _offsets(document, pieces):
            different = _different_tokens(prompt, offset, document.first_tokens)
            if different:
                is_glued = different[-1] < GLUED_TOKENS_MAX and different[-1] + 1 == len(different)
                missing.append(NearMiss(offset, document, different[0] + 1, len(different), is_glued))
            else:
                found = True
                places.append(Place(offset, document))
        if missing and not found:
            near_misses.append(min(missing, key=lambda miss: miss.num_different))
    return sorted(places, key=lambda place: place.offset), sorted(near_misses, key=lambda miss: miss.offset)


def _pieces(prompt: bytes) -> dict[bytes, list[int]]:
    """Return where each piece of the prompt starts, in tokens."""
    found: dict[bytes, list[int]] = {}
    step = PIECE_TOKENS * TOKEN_BYTES
    for start in range(0, len(prompt) - step + 1, TOKEN_BYTES):
        found.setdefault(prompt[start : start + step], []).append(start // TOKEN_BYTES)
    return found


def _offsets(document: DocumentInfo, pieces: dict[bytes, list[int]]) -> list[int]:
    """Return where the document would begin if its pieces that are in the prompt stood in their places."""
    first, step = document.first_tokens, PIECE_TOKENS * TOKEN_BYTES
    offsets: set[int] = set()
    for start in PIECES_AT:
        piece = first[start * TOKEN_BYTES : start * TOKEN_BYTES + step]
        if len(piece) == step:
            offsets.update(at - start for at in pieces.get(piece, ()))
    return sorted(offsets)


def _different_tokens(prompt: bytes, offset: int, first_tokens: bytes) -> list[int]:
    """Return the tokens of the first chunk that the prompt does not have from `offset` on, counted from 0."""
    return [
        start // TOKEN_BYTES
        for start in range(0, len(first_tokens), TOKEN_BYTES)
        if (at := offset * TOKEN_BYTES + start) < 0
        or prompt[at : at + TOKEN_BYTES] != first_tokens[start : start + TOKEN_BYTES]
    ]
