"""The prompts of `cachetier warm`: files, folders, JSONL and standard input as one stream of requests.

Everything here is a plain generator: one prompt is in memory at a time. What cannot be a prompt becomes a `Rejected`
value in the same stream, so that one bad line does not end a run of a million.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from cachetier.core.errors import ConfigError

STDIN = "-"
TEXT_SUFFIXES = (".txt", ".md")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
CHAT_PATH = "/v1/chat/completions"
COMPLETIONS_PATH = "/v1/completions"


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of JSONL. Unknown keys are refused: one that changes the prompt would warm another prompt unnoticed."""

    messages: list[dict[str, Any]] | None = None
    prompt: str | None = None
    token_ids: list[int] | None = None
    cache_salt: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """A request to send.

    Attributes:
        source: where it stands, for people: "FILE" or "FILE:LINE".
        path: endpoint of the engine.
        body: what the request says besides model and limits.
    """

    source: str
    path: str
    body: dict[str, Any]

    def digest(self, model: str) -> bytes:
        """Return 16 bytes that identify what is sent to `model`, wherever it was read from."""
        return xxhash.xxh3_128_digest(msgspec.json.encode([model, self.path, self.body], order="deterministic"))


@dataclasses.dataclass(frozen=True, slots=True)
class Rejected:
    """Input that is no prompt.

    Attributes:
        source: where it stands.
        reason: why, for people.
        is_empty: there is nothing to send, which is no failure.
    """

    source: str
    reason: str
    is_empty: bool = False


def check_inputs(inputs: Sequence[str]) -> None:
    """Refuse inputs that do not exist before anything is sent.

    Raises:
        ConfigError: a path is missing, or standard input is named twice.
    """
    if inputs.count(STDIN) > 1:
        raise ConfigError("standard input (-) can be read only once")
    for name in inputs:
        if name != STDIN and not os.path.exists(name):
            raise ConfigError(f"{name}: no such file or folder")


def read_prompts(inputs: Sequence[str]) -> Iterator[Prompt | Rejected]:
    """Yield the prompts of `inputs` in order: folders sorted by name, files line by line. Blocks on standard input."""
    for name in inputs:
        if name == STDIN:
            yield from _read_jsonl(0, "stdin")
        elif os.path.isdir(name):
            yield from _read_folder(name)
        else:
            yield from _read_file(name)


def parse_line(text: bytes, source: str) -> Prompt | Rejected:
    """Turn one line of JSONL into a prompt."""
    try:
        line = msgspec.json.decode(text, type=Line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return Rejected(source, str(error))
    given = [name for name in ("messages", "prompt", "token_ids") if getattr(line, name) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        return Rejected(source, f"a line holds exactly one of messages, prompt and token_ids; here: {found}")
    content = getattr(line, given[0])
    if not content:
        return Rejected(source, f"{given[0]} is empty", is_empty=True)
    path, key = (CHAT_PATH, "messages") if given[0] == "messages" else (COMPLETIONS_PATH, "prompt")
    salt = {"cache_salt": line.cache_salt} if line.cache_salt is not None else {}
    return Prompt(source, path, {key: content, **salt})


def _read_folder(folder: str) -> Iterator[Prompt | Rejected]:
    is_empty = True
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if name.endswith(TEXT_SUFFIXES):
                is_empty = False
                yield _read_text(os.path.join(parent, name))
    if is_empty:
        yield Rejected(folder, f"the folder holds no {' or '.join('*' + suffix for suffix in TEXT_SUFFIXES)}")


def _read_file(name: str) -> Iterator[Prompt | Rejected]:
    if name.endswith(JSONL_SUFFIXES):
        yield from _read_jsonl(name, name)
    else:
        yield _read_text(name)


def _read_text(name: str) -> Prompt | Rejected:
    try:
        text = Path(name).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return Rejected(name, str(error))
    return Prompt(name, COMPLETIONS_PATH, {"prompt": text}) if text else Rejected(name, "empty", is_empty=True)


def _read_jsonl(file: str | int, name: str) -> Iterator[Prompt | Rejected]:
    """Yield the prompts of a JSONL file or file descriptor.

    Standard input is opened by descriptor: a thread that waits inside sys.stdin would abort the interpreter's exit.
    """
    try:
        with open(file, "rb", closefd=file != 0) as lines:
            for number, text in enumerate(lines, start=1):
                if text.strip():
                    yield parse_line(text, f"{name}:{number}")
    except OSError as error:
        yield Rejected(name, str(error))
