"""The run behind `cachetier explain`: tokens from the engine, facts from the server, a report for each prompt.

The engine is asked on an event loop, the server with the blocking client, one after the other. Nothing is leased: the
session is needed to ask, and ends with the command.
"""

import asyncio
import os
import struct
import sys
from contextlib import ExitStack, closing
from typing import Any

import msgspec

from cachetier.cli.documents import list_documents
from cachetier.cli.explain_report import Findings, as_text
from cachetier.cli.explain_search import search
from cachetier.cli.warm_engine import Engine, Refused
from cachetier.cli.warm_input import PROMPTS, Prompt, Rejected, check_inputs, read_inputs
from cachetier.client.client import Client
from cachetier.client.session import Session
from cachetier.core.document_messages import CANDIDATES_MAX, DocumentInfo, MatchDocuments
from cachetier.core.messages import API_VERSION, Match, NamespaceInfo

TIMEOUT_S = 10.0
TOKENS_END = 1 << 31
EXIT_EXPLAINED, EXIT_UNREADABLE = 0, 1


def explain(url: str, model: str | None, socket: str, file: str, *, is_jsonl: bool) -> int:
    """Print a report for each prompt in `file` and return the exit code.

    Raises:
        ConfigError: the file or the model cannot be used.
        UnavailableError: engine or server cannot be reached.
    """
    check_inputs([file])
    client = Client(socket)
    known = client.get(f"/v{API_VERSION}/namespaces", TIMEOUT_S)
    namespaces = msgspec.json.decode(known, type=list[NamespaceInfo])
    prompts = list(read_inputs([file], PROMPTS, is_jsonl=is_jsonl))
    weights, adapter, tokens = asyncio.run(_ask_engine(url, model, prompts))
    ours = [each for each in namespaces if is_of(each, weights, adapter)]
    with ExitStack() as stack:
        server = stack.enter_context(closing(_Server(client, ours[-1]))) if ours else None
        for prompt, ids in zip(prompts, tokens, strict=True):
            if isinstance(ids, str):
                print(f"{prompt.source}: {ids}", file=sys.stderr)
                continue
            print(f"{prompt.source}: {len(ids):,} tokens for {adapter or weights}")
            print(as_text(server.find(ids, _salt_of(prompt))) if server else _unknown(namespaces))
    if len(ours) > 1:
        print(f"the server knows {len(ours)} models of that name; this is about {ours[-1].namespace}, the latest")
    return EXIT_UNREADABLE if any(isinstance(ids, str) for ids in tokens) else EXIT_EXPLAINED


def is_of(known: NamespaceInfo, weights: str, adapter: str) -> bool:
    """Tell whether a namespace is that of `adapter` (empty: none) on the model that the engine calls `weights`."""
    return known.identity.model == weights and known.identity.adapter.partition("|")[0] == adapter


async def _ask_engine(
    url: str, model: str | None, prompts: list[Prompt | Rejected]
) -> tuple[str, str, list[list[int] | str]]:
    """Return the model's weights, its adapter, and for each prompt its tokens or why it has none."""
    async with Engine(url, max_tokens=1) as engine:
        await engine.choose_model(model)
        tokens = [await _tokens_of(engine, prompt) for prompt in prompts]
        return engine.weights, engine.adapter, tokens


async def _tokens_of(engine: Engine, prompt: Prompt | Rejected) -> list[int] | str:
    if isinstance(prompt, Rejected):
        return prompt.reason
    given = prompt.body.get("prompt")
    if isinstance(given, list):
        return given if all(0 <= token < TOKENS_END for token in given) else "a token id is out of range"
    if has_more_than_text(prompt.body.get("messages", [])):
        return "messages with more than text cannot be explained: the KV depends on images and sounds as well"
    tokens = await engine.tokenize({key: value for key, value in prompt.body.items() if key != "cache_salt"})
    return tokens.reason if isinstance(tokens, Refused) else tokens


def has_more_than_text(messages: list[dict[str, Any]]) -> bool:
    """Tell whether one of the messages of a chat has parts that are no text."""
    contents = [content for message in messages if isinstance(content := message.get("content"), list)]
    return any(part.get("type") != "text" for content in contents for part in content if isinstance(part, dict))


def _salt_of(prompt: Prompt | Rejected) -> str:
    return str(prompt.body.get("cache_salt", "")) if isinstance(prompt, Prompt) else ""


def _unknown(namespaces: list[NamespaceInfo]) -> str:
    names = ", ".join(sorted({each.identity.model for each in namespaces})) or "none"
    return f"everything would be computed: the server knows nothing of this model; it knows {names}"


class _Server:
    """The server, asked about one namespace."""

    def __init__(self, client: Client, namespace: NamespaceInfo) -> None:
        self._client = client
        self._namespace = bytes.fromhex(namespace.namespace)
        self._session = Session(client, "explain", f"explain {os.getpid()}", TIMEOUT_S)
        documents = list_documents(client)
        self._documents: list[DocumentInfo] = [each for each in documents if each.namespace == self._namespace]

    def close(self) -> None:
        """End the session."""
        self._session.close()

    def find(self, ids: list[int], salt: str) -> Findings:
        """Ask what of a prompt is held."""
        chunk_tokens = self._session.server.chunk_tokens
        tokens = struct.pack(f"<{len(ids)}i", *ids)
        session, namespace = self._session.id, self._namespace
        match = Match(session=session, namespace=namespace, tokens=tokens, salt=salt, lease=False)
        prefix = self._client.call(match, TIMEOUT_S)
        places, near_misses = search(tokens, self._documents)
        found = sorted({(place.offset, place.document.fingerprint) for place in places})
        message = MatchDocuments(
            session=session,
            namespace=namespace,
            tokens=tokens,
            salt=salt,
            candidates=found[:CANDIDATES_MAX],
            start=min(prefix.num_chunks * chunk_tokens, len(ids)),
            lease=False,
        )
        runs = self._client.call(message, TIMEOUT_S).runs
        return Findings(len(ids), chunk_tokens, prefix, runs, self._documents, places, near_misses)
