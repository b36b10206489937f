"""`cachetier engines`: which vLLM engines use the server, and in which role."""

import argparse
import json
from typing import Any

import msgspec

from cachetier.cli.server_option import add_socket, socket_of
from cachetier.cli.table import as_table
from cachetier.client.client import Client
from cachetier.core.engine_messages import EngineInfo, ListEngines

TIMEOUT_S = 10.0
COLUMNS = ("ENGINE", "ROLE", "MODEL", "WEIGHTS AND LAYOUT", "TP", "PP", "BLOCK", "PID", "SILENT", "URL")
NUM_TEXT_COLUMNS = 4


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add this command to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "engines",
        help="list the vLLM engines that use the server",
        description="List the engines that use the server: a producer stores, a consumer loads, the others do both. "
        "Engines with the same weights and layout share what they store. `cachetier role` changes a role.",
    )
    add_socket(parser)
    parser.add_argument("--json", action="store_true", help="print JSON: a list of objects")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the engines; return the exit code.

    Raises:
        UnavailableError: no server answers at the socket.
    """
    client = Client(socket_of(args))
    engines = client.call(ListEngines(), TIMEOUT_S).engines
    if args.json:
        print(json.dumps([_public(engine) for engine in engines], indent=1))
    elif engines:
        print(as_table([COLUMNS, *map(_row, engines)], NUM_TEXT_COLUMNS))
    else:
        print("no engine uses this server; see `cachetier doctor` if one should")
    return 0


def _public(engine: EngineInfo) -> dict[str, Any]:
    return msgspec.structs.asdict(engine) | {"namespace": engine.namespace.hex(), "silent_s": round(engine.silent_s, 3)}


def _row(engine: EngineInfo) -> tuple[str, ...]:
    numbers = (engine.tensor_parallel, engine.pipeline_parallel, engine.block_tokens, engine.pid)
    return (
        engine.name,
        engine.role,
        engine.model or "?",
        engine.namespace.hex()[:12],
        *map(str, numbers),
        f"{engine.silent_s:.1f} s",
        engine.url or "-",
    )
