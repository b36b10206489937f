"""`cachetier serve`: run the server in the foreground until SIGTERM or SIGINT.

Options come from the fields of `ServerConfig`. A value on the command line wins over the same one in the file given
with --config, which wins over the default.
"""

import argparse
import asyncio
import dataclasses
import logging
import os
import sys
from typing import Any

from cachetier.core.bearer import read_token
from cachetier.core.config import ServerConfig, from_mapping, read_toml
from cachetier.core.units import format_bytes


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add this command to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "serve", help="run the server of this node", description=__doc__
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file with settings; its keys are the options' names")
    for field in dataclasses.fields(ServerConfig):
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            dest=field.name,
            metavar=_metavar(field),
            default=argparse.SUPPRESS,
            help=field.metadata["help"] + _default_text(field),
        )
    parser.add_argument("--parent-pid", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the server; return 0 after an orderly end.

    Raises:
        ConfigError, StorageError: a setting, the data directory or a socket cannot be used.
    """
    from cachetier.service.server import run as run_server
    from cachetier.store.store import Store

    os.umask(0o077)
    config = server_config(args)
    _log_to_stderr(config.log_level)
    token = read_token(config.token_file) if config.tcp else ""
    store = Store(config)

    def announce() -> None:
        disk = f"disk {format_bytes(config.disk_bytes)}" if config.disk_bytes else "no disk"
        host = format_bytes(config.host_bytes)
        print(f"cachetier ready: unix:{config.socket}, host {host}, {disk}, {store.stats().chunks} chunks", flush=True)

    is_closed = asyncio.run(run_server(config, store, announce, token=token, parent_pid=args.parent_pid))
    if not is_closed:
        logging.shutdown()
        os._exit(0)  # a thread still waits for the disk; what it has is safe, what it has not is lost
    return 0


def server_config(args: argparse.Namespace) -> ServerConfig:
    """Return the configuration that the parsed command line asks for.

    Raises:
        ConfigError: a setting is unknown or impossible.
    """
    names = {field.name for field in dataclasses.fields(ServerConfig)}
    given = {name: value for name, value in vars(args).items() if name in names}
    from_file = {key.replace("-", "_"): value for key, value in read_toml(args.config).items()} if args.config else {}
    source = f"command line and {args.config}" if args.config else "command line"
    return from_mapping(ServerConfig, from_file | given, source)


def _log_to_stderr(level: str) -> None:
    text = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(stream=sys.stderr, level=level.upper(), format=text)
    # aiohttp would quote what it could not parse, which may be anybody's prompt or salt.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)


def _metavar(field: "dataclasses.Field[Any]") -> str:
    if field.metadata.get("choices"):
        return "|".join(field.metadata["choices"])
    if field.metadata.get("size"):
        return "SIZE"
    metavars: dict[Any, str] = {int: "N", float: "X", "tcp": "HOST:PORT", "data_dir": "DIR", "remote": "URL"}
    return metavars.get(field.type, metavars.get(field.name, "FILE"))


def _default_text(field: "dataclasses.Field[Any]") -> str:
    default: Any = field.default
    if not default:
        return ""
    return f" (default {format_bytes(default) if field.metadata.get('size') else default})"
