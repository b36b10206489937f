"""One engine, as the router knows it: what people or the server said of it, and what it was seen to do.

On the event loop's thread, all of it.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from yarl import URL

from cachetier.core.engine_messages import CONSUMER, ENGINE_NAME_MAX, ENGINE_URL_MAX, ROLES
from cachetier.core.errors import ConfigError

UNSEEN = "it was not looked at yet"
# A request of others, whose prompt the router has not seen, counts as one of so many tokens.
PROMPT_TOKENS_TYPICAL = 1024
# A request that waits in its engine's queue says that the engine has no room, which weighs more than one that runs.
WAITING_WEIGHT = 4


@dataclass(frozen=True, slots=True)
class Registration:
    """What a person says of an engine.

    Attributes:
        name: what it is called; the connector's setting `name`, where the server is to know whom the router means.
        role: one of `ROLES`; where the server lists the engine, its word counts.
        url: http://HOST:PORT of its OpenAI server.

    Raises:
        ConfigError: from the constructor, when one of them is impossible.
    """

    name: str
    role: str
    url: str

    def __post_init__(self) -> None:
        if not 0 < len(self.name) <= ENGINE_NAME_MAX or not self.name.isprintable() or "/" in self.name:
            raise ConfigError(f"an engine's name has 1 to {ENGINE_NAME_MAX} printable characters and no slash")
        if self.role not in ROLES:
            raise ConfigError(f"there is no role {self.role!r}, only {', '.join(ROLES)}")
        object.__setattr__(self, "url", base_url(self.url))

    @classmethod
    def parse(cls, text: str) -> "Registration":
        """Read NAME=ROLE@URL.

        Raises:
            ConfigError: it is not of this form.
        """
        name, _, rest = text.partition("=")
        role, _, url = rest.partition("@")
        if not url:
            raise ConfigError(f"engine {text!r}: write NAME=ROLE@http://HOST:PORT")
        return cls(name, role, url)


def base_url(text: str) -> str:
    """Return the URL of an engine's OpenAI server, without the /v1 that people like to add.

    Raises:
        ConfigError: it is none.
    """
    try:
        url = URL(text)
        is_usable = url.scheme in ("http", "https") and bool(url.host) and not url.query_string and not url.fragment
    except ValueError:
        is_usable = False
    if not is_usable or len(text) > ENGINE_URL_MAX:
        raise ConfigError(f"{text!r} is no address of an engine; write http://HOST:PORT")
    return text.rstrip("/").removesuffix("/v1")


@dataclass(slots=True, eq=False)
class Engine:
    """One engine.

    Attributes:
        name, url, role: see `Registration`.
        namespace: whose KV it stores and loads, by the server's word; empty: nobody said.
        is_given: a person registered it; others go when neither the server lists them nor do they answer.
        trouble: what was wrong with it when it was looked at last; empty: nothing, it is up.
        models: what it serves: its cards of /v1/models, by name.
        models_due_s: when to ask for them again, on the loop's clock.
        num_waiting: requests in its queue, as it said last.
        num_others: requests that it had then and that were not this router's.
        kv_usage: share of its KV blocks in use, as it said last.
        num_in_flight: requests of this router that it has now.
        prompt_tokens_in_flight: the tokens of their prompts.
        chosen_at: number of the choice that it last was, of all choices.
    """

    name: str
    url: str
    role: str
    namespace: bytes = b""
    is_given: bool = False
    trouble: str = UNSEEN
    models: Mapping[str, Any] = field(default_factory=dict)
    models_due_s: float = 0.0
    num_waiting: int = 0
    num_others: int = 0
    kv_usage: float = 0.0
    num_in_flight: int = 0
    prompt_tokens_in_flight: int = 0
    chosen_at: int = 0

    @property
    def is_up(self) -> bool:
        """Whether requests can go to it."""
        return not self.trouble

    @property
    def can_store(self) -> bool:
        """Whether what it computes goes into the tier."""
        return self.role != CONSUMER

    @property
    def requests(self) -> int:
        """How much it has to do, in requests: the others' as it said last, the router's own as they are now."""
        return self.num_others + self.num_in_flight + WAITING_WEIGHT * self.num_waiting

    @property
    def prompt_tokens(self) -> int:
        """How much it has to do, in tokens of prompts: what a prefill waits for."""
        return PROMPT_TOKENS_TYPICAL * self.num_others + self.prompt_tokens_in_flight

    def serves(self, model: str | None) -> bool:
        """Tell whether a request for `model` can go to it; None leaves the choice to the engine."""
        return model is None or model in self.models

    @contextlib.contextmanager
    def busy(self, num_tokens: int) -> Iterator[None]:
        """Count a request with a prompt of `num_tokens` while it lasts."""
        self.num_in_flight += 1
        self.prompt_tokens_in_flight += num_tokens
        try:
            yield
        finally:
            self.num_in_flight -= 1
            self.prompt_tokens_in_flight -= num_tokens
