"""The prompts of `cachetier warm`: files, folders, JSONL and standard input as one stream of requests.

Everything here is a plain generator: one prompt is in memory at a time. What cannot be a prompt becomes a `Rejected`
value in the same stream, so that one bad line does not end a run of a million. What a text or a line becomes is said by
a `Reading`: here that of plain prompts, in `warm_documents` that of documents.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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


class Reading(NamedTuple):
    """What the inputs stand for.

    Attributes:
        of_text: makes a request of a file's text, given where it stands, its name (the path as given, or relative to
            the folder that was given) and the text.
        of_line: makes one of a line of JSONL, given the line and where it stands.
    """

    of_text: Callable[[str, str, str], Prompt | Rejected]
    of_line: Callable[[bytes, str], Prompt | Rejected]


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


def read_inputs(inputs: Sequence[str], reading: Reading, *, is_jsonl: bool = False) -> Iterator[Prompt | Rejected]:
    """Yield what `inputs` hold in order: folders sorted by name, files line by line. Blocks on standard input.

    With `is_jsonl` every file is JSONL, whatever its name.
    """
    for name in inputs:
        if name == STDIN:
            yield from _read_jsonl(0, "stdin", reading)
        elif os.path.isdir(name):
            yield from _read_folder(name, reading)
        elif is_jsonl or name.endswith(JSONL_SUFFIXES):
            yield from _read_jsonl(name, name, reading)
        else:
            yield _read_text(name, name, reading)


def prompt_of_text(source: str, _: str, text: str) -> Prompt:
    """Turn a text into a prompt."""
    return Prompt(source, COMPLETIONS_PATH, {"prompt": text})


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


PROMPTS = Reading(prompt_of_text, parse_line)


def _read_folder(folder: str, reading: Reading) -> Iterator[Prompt | Rejected]:
    is_empty = True
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if name.endswith(TEXT_SUFFIXES):
                is_empty = False
                path = os.path.join(parent, name)
                yield _read_text(path, os.path.relpath(path, folder), reading)
    if is_empty:
        yield Rejected(folder, f"the folder holds no {' or '.join('*' + suffix for suffix in TEXT_SUFFIXES)}")


def _read_text(path: str, name: str, reading: Reading) -> Prompt | Rejected:
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return Rejected(path, str(error))
    return reading.of_text(path, name, text) if text else Rejected(path, "empty", is_empty=True)


def _read_jsonl(file: str | int, name: str, reading: Reading) -> Iterator[Prompt | Rejected]:
    """Yield what the lines of a JSONL file or file descriptor hold.

    Standard input is opened by descriptor: a thread that waits inside sys.stdin would abort the interpreter's exit.
    """
    try:
        with open(file, "rb", closefd=file != 0) as lines:
            for number, text in enumerate(lines, start=1):
                if text.strip():
                    yield reading.of_line(text, f"{name}:{number}")
    except OSError as error:
        yield Rejected(name, str(error))
