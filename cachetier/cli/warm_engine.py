"""The engine as `cachetier warm` sees it: a vLLM OpenAI server that is asked for its models and sent prompts.

Runs on the event loop. What becomes of one prompt is a value (`Sent`, `TooLong`, `TooShort`, `Refused`); an engine that
cannot be used any more is an exception, because every further prompt would meet the same fate.
"""

import asyncio
import dataclasses
import os
import random
from typing import Any

import aiohttp
import msgspec

from cachetier.cli.warm_documents import Document
from cachetier.cli.warm_input import Prompt
from cachetier.core.document_messages import DOCUMENT_TOKENS_MIN
from cachetier.core.errors import ConfigError, UnavailableError

TOKENIZE_PATH = "/tokenize"  # vLLM's own, beside the OpenAI interface
API_KEY_VARIABLE = "VLLM_API_KEY"  # the variable from which `vllm serve` itself takes its key
CONNECT_TIMEOUT_S = 10.0
REPLY_TIMEOUT_S = 900.0  # without streaming nothing arrives before the whole prefill, queue included, is done
BUSY_STATUSES = (429, 502, 503, 504)
# The last is vLLM's answer to a prompt that fills the context to the last token: no room is left to generate.
TOO_LONG_WORDS = ("context length", "maximum model length", "max_model_len", "max_tokens must be at least")


@dataclasses.dataclass(frozen=True, slots=True)
class Backoff:
    """How often and how patiently a prompt is tried again: about two minutes in all.

    Attributes:
        num_tries: tries in all, the first included.
        first_s: wait after the first try; doubles each time.
        longest_s: no wait is longer, whatever Retry-After says.
    """

    num_tries: int = 9
    first_s: float = 0.5
    longest_s: float = 30.0

    def wait_s(self, num_failures: int, retry_after: str | None = None) -> float:
        """Return how long to wait after `num_failures` tries; jitter keeps concurrent prompts apart."""
        wait = self.first_s * float(2 ** (num_failures - 1)) * random.uniform(0.75, 1.25)
        if retry_after and retry_after.isdigit():
            wait = max(wait, float(retry_after))
        return min(wait, self.longest_s)


@dataclasses.dataclass(frozen=True, slots=True)
class Sent:
    """The engine computed or loaded the prompt, which had `num_tokens` tokens."""

    num_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class TooLong:
    """The prompt is longer than the model's context."""

    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class TooShort:
    """The document has too few tokens to be worth registering."""

    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class Refused:
    """The engine answered with an error that sending again would not mend."""

    reason: str


class Engine:
    """One OpenAI server and one model of it; use as an asynchronous context manager.

    Attributes:
        model: the model's name on this server.
        weights: the name or folder that the server was given for it (for the model under it, if it is an adapter).
        adapter: its name, if it is a LoRA adapter.
        num_retries: tries beyond the first, of all prompts.
    """

    def __init__(self, url: str, *, max_tokens: int, backoff: Backoff | None = None) -> None:
        """`url` is http://HOST:PORT, with or without /v1."""
        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"--url is {url!r}; write http://HOST:PORT")
        self.model = self.weights = self.adapter = ""
        self.num_retries = 0
        self._max_tokens = max_tokens
        self._backoff = backoff or Backoff()

    async def __aenter__(self) -> "Engine":
        key = os.environ.get(API_KEY_VARIABLE)
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # the number of workers is the limit
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=REPLY_TIMEOUT_S),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    async def choose_model(self, name: str | None) -> str:
        """Check that the engine answers and serves `name`; None takes the only model it serves.

        Raises:
            UnavailableError: nothing that speaks the OpenAI interface answers there.
            ConfigError: the name is not served, or several are and none was named.
        """
        try:
            async with self._http.get(f"{self.url}/v1/models") as reply:
                self._check_key(reply.status)
                served = {card.id: card for card in msgspec.json.decode(await reply.read(), type=_Served).data}
        except (aiohttp.ClientConnectionError, TimeoutError) as error:
            raise UnavailableError(
                f"no engine answers at {self.url} ({error or type(error).__name__}); is `vllm serve` running there?"
            ) from error
        except (aiohttp.ClientError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise UnavailableError(f"{self.url} answers, but not as an OpenAI server (/v1/models: {error})") from error
        if name is None and len(served) != 1:
            raise ConfigError(f"name one of the models with --model; {self.url} serves {', '.join(served) or 'none'}")
        if name is not None and name not in served:
            raise ConfigError(f"{self.url} does not serve {name!r}; it serves {', '.join(served) or 'nothing'}")
        card = served[name] if name is not None else next(iter(served.values()))
        self.model, self.adapter = card.id, card.id if card.parent else ""
        base = served.get(card.parent or "", card)
        self.weights = base.root or base.id
        return self.model

    async def send(self, prompt: Prompt) -> Sent | TooLong | TooShort | Refused:
        """Send one prompt, trying again while the engine is busy or away. A document is sent as token ids.

        Raises:
            UnavailableError: it stayed so for all tries, or the key is wrong.
        """
        body = prompt.body
        if isinstance(prompt, Document):
            tokens = await self._tokens_of(prompt)
            if not isinstance(tokens, list):
                return tokens
            body = {**body, "prompt": tokens}
        limits = {"max_tokens": self._max_tokens, "temperature": 0.0}
        return outcome_of(*await self._post(prompt.path, {**body, **limits}))

    async def tokenize(self, fields: dict[str, Any]) -> list[int] | Refused:
        """Return the token ids that the engine makes of a text or of messages; `fields` are vLLM's for /tokenize.

        Raises:
            UnavailableError: as `send`.
        """
        status, text = await self._post(TOKENIZE_PATH, fields)
        if status != 200:
            return Refused(f"{TOKENIZE_PATH}: {_error_text(status, text)}")
        try:
            return msgspec.json.decode(text, type=_Tokenized).tokens
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return Refused(f"{TOKENIZE_PATH}: {error}")

    async def _tokens_of(self, document: Document) -> list[int] | TooShort | Refused:
        tokens: list[int] | str | Refused = document.body["prompt"]
        if isinstance(tokens, str):
            tokens = await self.tokenize({"prompt": tokens, "add_special_tokens": False})
        if isinstance(tokens, list) and len(tokens) < DOCUMENT_TOKENS_MIN:
            return TooShort(f"document {document.id!r} has {len(tokens)} tokens; it needs {DOCUMENT_TOKENS_MIN}")
        return tokens

    async def _post(self, path: str, fields: dict[str, Any]) -> tuple[int, bytes]:
        """Return status and body of an answer that is final."""
        body = msgspec.json.encode({**fields, "model": self.model})
        for num_failures in range(1, self._backoff.num_tries + 1):
            retry_after = None
            try:
                async with self._http.post(
                    self.url + path, data=body, headers={"Content-Type": "application/json"}
                ) as reply:
                    text = await reply.read()
                    if reply.status not in BUSY_STATUSES:
                        self._check_key(reply.status)
                        return reply.status, text
                    reason, retry_after = _error_text(reply.status, text), reply.headers.get("Retry-After")
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError) as error:
                reason = str(error) or type(error).__name__
            if num_failures < self._backoff.num_tries:
                self.num_retries += 1
                await asyncio.sleep(self._backoff.wait_s(num_failures, retry_after))
        raise UnavailableError(f"gave up on {self.url} after {self._backoff.num_tries} tries; the last: {reason}")

    @staticmethod
    def _check_key(status: int) -> None:
        if status in (401, 403):
            raise UnavailableError(f"the engine wants its API key: set {API_KEY_VARIABLE}")


class _Card(msgspec.Struct, frozen=True):
    id: str
    root: str | None = None
    parent: str | None = None


class _Served(msgspec.Struct, frozen=True):
    data: list[_Card]


class _Tokenized(msgspec.Struct, frozen=True):
    tokens: list[int]


def outcome_of(status: int, text: bytes) -> Sent | TooLong | Refused:
    """Read an answer that is final."""
    if status == 200:
        num_tokens = _parse(text, "usage").get("prompt_tokens")
        return Sent(num_tokens) if isinstance(num_tokens, int) else Refused("the answer has no usage.prompt_tokens")
    reason = _error_text(status, text)
    if status == 413 or (status == 400 and any(words in reason for words in TOO_LONG_WORDS)):
        return TooLong(reason)
    return Refused(reason)


def _error_text(status: int, text: bytes) -> str:
    message = _parse(text, "error").get("message")
    return f"HTTP {status}: {message or text[:200].decode('utf-8', 'replace') or 'no text'}"


def _parse(text: bytes, key: str) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(text)[key]
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
        return {}
    return value if isinstance(value, dict) else {}
