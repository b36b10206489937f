"""The documents of `cachetier warm --document`: texts that are sent alone under an id, to be found anywhere later.

The engine computes a document as a prompt of its own, from position 0, and registers it under the id. So it is sent as
token ids: what a tokenizer would put before a prompt (BOS) must not stand before a document. Plain generators and
values, like `warm_input`, which reads the inputs.
"""

import dataclasses

import msgspec

from cachetier.cli.warm_input import COMPLETIONS_PATH, Prompt, Reading, Rejected
from cachetier.core.document_messages import DOCUMENT_ID_LENGTH_MAX


class DocumentLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of JSONL."""

    id: str
    text: str | None = None
    token_ids: list[int] | None = None
    cache_salt: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Document(Prompt):
    """A document to send; its `prompt` is a text that the engine has to turn into token ids first, or token ids.

    Attributes:
        id: the name that it is registered under.
    """

    id: str


class DocumentReader:
    """Makes documents of texts and lines, and sees to it that no id stands for two documents.

    The later one would take the earlier one's place in the server without a word. About 200 bytes of memory each.
    """

    def __init__(self) -> None:
        self._digests: dict[tuple[str, str], bytes] = {}

    def reading(self) -> Reading:
        """Return how inputs are to be read."""
        return Reading(self.of_text, self.of_line)

    def of_text(self, source: str, name: str, text: str) -> Document | Rejected:
        """Make a document of a file's text; its id is the file's name."""
        return self._checked(source, name, text, None)

    def of_line(self, line: bytes, source: str) -> Document | Rejected:
        """Make a document of one line of JSONL."""
        try:
            given = msgspec.json.decode(line, type=DocumentLine)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return Rejected(source, str(error))
        if (given.text is None) == (given.token_ids is None):
            return Rejected(source, "a line holds exactly one of text and token_ids, besides id")
        content = given.text if given.text is not None else given.token_ids
        if not content:
            return Rejected(source, f"document {given.id!r} is empty", is_empty=True)
        return self._checked(source, given.id, content, given.cache_salt)

    def _checked(self, source: str, name: str, content: str | list[int], salt: str | None) -> Document | Rejected:
        if not 1 <= len(name) <= DOCUMENT_ID_LENGTH_MAX or not name.isprintable():
            return Rejected(
                source, f"the id {name[:40]!r} must have 1 to {DOCUMENT_ID_LENGTH_MAX} printable characters"
            )
        body = {"prompt": content, "kv_transfer_params": {"cachetier": {"document": name}}}
        salted = {"cache_salt": salt} if salt is not None else {}
        document = Document(source, COMPLETIONS_PATH, {**body, **salted}, name)
        digest = document.digest("")
        if self._digests.setdefault((salt or "", name), digest) != digest:
            return Rejected(source, f"the id {name!r} already stands for another document of this input")
        return document
