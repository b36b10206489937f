"""The configuration: frozen, parsed once at the edge from command line, TOML file or connector configuration.

All three become the same dataclasses through `from_mapping`, which refuses unknown keys and impossible values with a
text that names the allowed ones.
"""

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from cachetier.core.errors import ConfigError
from cachetier.core.layout import PAGE_BYTES
from cachetier.core.units import format_bytes, parse_bytes

MIB = 1 << 20
GIB = 1 << 30
HOST_BYTES_MIN = 4 * MIB
DISK_BYTES_MIN = 16 * MIB
CHUNK_TOKENS_MIN, CHUNK_TOKENS_MAX = 16, 1024
SEGMENTS_MIN = 4


def default_data_dir() -> str:
    """Return the data directory of a user who names none."""
    return str(Path.home() / ".cache" / "cachetier")


def setting(default: Any, help_text: str, **metadata: Any) -> Any:
    """Declare a field: its default, and the text that `--help` and docs/configuration.md show."""
    return dataclasses.field(default=default, metadata={"help": help_text, **metadata})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Settings of `cachetier serve`, and of the private server that a connector starts.

    Raises:
        ConfigError: from the constructor, when a value is impossible.
    """

    data_dir: str = setting("", "folder of the disk tier (default ~/.cache/cachetier); made with mode 0700")
    socket: str = setting("", "Unix socket to listen on (default DATA_DIR/cachetier.sock)")
    host_bytes: int = setting(4 * GIB, "size of the host tier in shared memory", size=True)
    disk_bytes: int = setting(16 * GIB, "size limit of the data directory; 0: no disk tier", size=True)
    chunk_tokens: int = setting(64, "tokens a chunk; fixed when the data directory is made")
    segment_bytes: int = setting(
        0, "size of a segment file (default 1 GiB, or a sixteenth of disk_bytes if that is less)", size=True
    )
    tcp: str = setting("", "HOST:PORT to listen on as well; needs token_file")
    token_file: str = setting("", "file with the bearer token that TCP clients must send; at least 16 characters")
    lease_ttl_s: float = setting(30.0, "a lease that its owner neither renews nor releases expires after so long")
    tenant_quota: float = setting(1.0, "largest share of the host tier that one namespace and salt may take, 0 to 1")
    io_threads: int = setting(4, "threads that read from disk at the same time")
    remote: str = setting(
        "",
        "store that servers of several nodes share: mooncake://MASTER_HOST:PORT or s3://BUCKET/PREFIX; none if empty",
    )
    secret_file: str = setting(
        "",
        "file with the 64 hexadecimal digits that chain keys are made with; servers find each other's chunks in a "
        "remote store only if they were given the same (default: made at first start)",
    )
    remote_deadline_ms: float = setting(100.0, "how long a match may wait for the remote store to say what it holds")
    remote_queue_bytes: int = setting(
        256 * MIB,
        "most bytes of the host tier that wait to be put into the remote store, a quarter of the host tier if that is "
        "less; what is beyond that is not put there",
        size=True,
    )
    log_level: str = setting("info", "debug, info, warning or error", choices=("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        if not self.data_dir:
            set_field(self, "data_dir", default_data_dir())
        if not self.socket:
            set_field(self, "socket", str(Path(self.data_dir) / "cachetier.sock"))
        if not self.segment_bytes:
            set_field(self, "segment_bytes", min(GIB, self.disk_bytes // 16 // PAGE_BYTES * PAGE_BYTES))
        _at_least("host_bytes", self.host_bytes, HOST_BYTES_MIN)
        if self.disk_bytes:
            _at_least("disk_bytes", self.disk_bytes, DISK_BYTES_MIN, "or 0 for no disk tier")
            if self.segment_bytes % PAGE_BYTES or not MIB <= self.segment_bytes <= self.disk_bytes // SEGMENTS_MIN:
                raise ConfigError(
                    f"segment_bytes is {self.segment_bytes}; it must be a multiple of {PAGE_BYTES} between 1 MiB and a "
                    f"quarter of disk_bytes, {format_bytes(self.disk_bytes // SEGMENTS_MIN)}"
                )
        _power_of_two("chunk_tokens", self.chunk_tokens, CHUNK_TOKENS_MIN, CHUNK_TOKENS_MAX)
        if len(self.socket.encode()) > 107:
            raise ConfigError(f"socket {self.socket!r} is longer than the 107 bytes that a Unix socket's path may have")
        if self.tcp and not self.token_file:
            raise ConfigError("tcp needs token_file: without a token anyone who reaches the port could read prompts")
        if self.tcp and not self.tcp.rpartition(":")[2].isdigit():
            raise ConfigError(f"tcp is {self.tcp!r}; write HOST:PORT")
        if not 0 < self.tenant_quota <= 1:
            raise ConfigError(f"tenant_quota is {self.tenant_quota}; it must be over 0 and at most 1")
        if not 1 <= self.lease_ttl_s <= 3600:
            raise ConfigError(f"lease_ttl_s is {self.lease_ttl_s}; it must be between 1 and 3600")
        if not 1 <= self.io_threads <= 64:
            raise ConfigError(f"io_threads is {self.io_threads}; it must be between 1 and 64")
        if not 1 <= self.remote_deadline_ms <= 60_000:
            raise ConfigError(f"remote_deadline_ms is {self.remote_deadline_ms}; it must be between 1 and 60000")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ConnectorConfig:
    """Settings of the vLLM connector (`kv_connector_extra_config`).

    Raises:
        ConfigError: from the constructor, when a value is impossible.
    """

    server: str = setting("", "unix:PATH of a running server; without it the connector starts a private one")
    data_dir: str = setting("", "private server: folder of the disk tier (default ~/.cache/cachetier)")
    host_bytes: int = setting(4 * GIB, "private server: size of the host tier", size=True)
    disk_bytes: int = setting(16 * GIB, "private server: size limit of the disk tier", size=True)
    chunk_tokens: int = setting(64, "private server: tokens a chunk")
    name: str = setting("", "how the engine is called in `cachetier engines` (default: host and process id)")
    url: str = setting("", "http://HOST:PORT of the engine's OpenAI server, for `cachetier route` to find it by")
    match_deadline_ms: float = setting(
        200.0,
        "how long the server may take for each answer that a request's match needs; the request waits twenty times as "
        "long while others are answered first",
    )
    load_deadline_ms: float = setting(500.0, "how long a load may go without progress before it is given up")
    wait_deadline_ms: float = setting(
        10_000.0,
        "how long a consumer waits without progress for chunks that another engine has promised to store, before it "
        "computes them",
    )
    store_deadline_ms: float = setting(
        1000.0, "how long a store may wait in its worker, and then for each answer of the server, before it is dropped"
    )
    staging_bytes: int = setting(
        256 * MIB, "host memory for KV on its way to the tier; what does not fit is dropped (CPU engines)", size=True
    )
    device_staging_bytes: int = setting(
        48 * MIB, "GPU memory that each worker takes to copy KV through (GPU engines)", size=True
    )

    gpu_bytes: int = setting(
        0,
        "GPU memory that each worker keeps the hottest chunks in; allocated at start-up beside vLLM's own, so "
        "gpu_memory_utilization must leave room for it; 0: no pool (GPU engines)",
        size=True,
    )
    blend: str = setting(
        "off",
        "reuse registered documents in the middle of prompts, whose answers are then approximate: off, request (only "
        "for requests that ask for it) or always",
        choices=("off", "request", "always"),
    )
    blend_select: str = setting(
        "link",
        "which tokens of reused documents are computed again: none, link (their first 16) or query (also those that "
        "the prompt's last tokens attend to)",
        choices=("none", "link", "query"),
    )
    blend_budget: float = setting(0.15, "query: the share of the reused tokens that is computed again, 0 to 1")
    blend_guard: float = setting(
        0.01,
        "the share of blended requests whose prompt is computed again in full once they have ended, to count how much "
        "blending changes answers, 0 to 1",
    )

    def __post_init__(self) -> None:
        if self.server and not self.server.startswith("unix:"):
            raise ConfigError(
                f"server is {self.server!r}; it must be unix:PATH (payloads travel through shared memory, so the "
                "server runs on the engine's node)"
            )
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"url is {self.url!r}; write http://HOST:PORT")
        for name in ("match_deadline_ms", "load_deadline_ms", "wait_deadline_ms", "store_deadline_ms"):
            if not 1 <= getattr(self, name) <= 60_000:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be between 1 and 60000")
        _at_least("staging_bytes", self.staging_bytes, MIB)
        _at_least("device_staging_bytes", self.device_staging_bytes, MIB)
        if self.gpu_bytes:
            _at_least("gpu_bytes", self.gpu_bytes, MIB, "or 0 for no pool")
        for name in ("blend_budget", "blend_guard"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be between 0 and 1")


Config = TypeVar("Config", ServerConfig, ConnectorConfig)


def from_mapping(kind: type[Config], values: Mapping[str, Any], source: str) -> Config:
    """Build a configuration from `values`, whose keys are field names; dashes count as underscores.

    Raises:
        ConfigError: a key is unknown or a value has the wrong type; `source` says where it stands.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = get_type_hints(kind)
    parsed = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in fields:
            raise ConfigError(f"{source}: unknown setting {key!r}; allowed are {', '.join(fields)}")
        try:
            parsed[name] = _convert(value, hints[name], fields[name].metadata)
        except (ConfigError, ValueError, TypeError) as error:
            raise ConfigError(f"{source}: {key}: {error}") from error
    return kind(**parsed)


def read_toml(path: str) -> dict[str, Any]:
    """Return the settings in the TOML file at `path`.

    Raises:
        ConfigError: it cannot be read or is no TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _convert(value: Any, hint: Any, metadata: Mapping[str, Any]) -> Any:
    if metadata.get("size"):
        return parse_bytes(value)
    choices = metadata.get("choices")
    if choices and value not in choices:
        raise ConfigError(f"{value!r} is not allowed; choose from {', '.join(choices)}")
    kind = next((part for part in get_args(hint) if part is not type(None)), hint)
    if isinstance(value, bool) is not (kind is bool):
        raise ConfigError(f"{value!r} is not of type {kind.__name__}")
    if kind is int and not str(value).lstrip("-").isdigit():
        raise ConfigError(f"{value!r} is not a whole number")
    if kind is str and not isinstance(value, str):
        raise ConfigError(f"{value!r} is not text")
    return kind(value)


def _at_least(name: str, value: int, least: int, otherwise: str = "") -> None:
    if value < least:
        text = f"{name} is {format_bytes(value)}; it must be at least {format_bytes(least)} {otherwise}"
        raise ConfigError(text.strip())


def _power_of_two(name: str, value: int, least: int, most: int) -> None:
    if value & (value - 1) or not least <= value <= most:
        allowed = ", ".join(str(1 << bit) for bit in range(least.bit_length() - 1, most.bit_length()))
        raise ConfigError(f"{name} is {value}; it must be one of {allowed}")
