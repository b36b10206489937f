"""`cachetier role`: have an engine store, load, or both, from now on."""

import argparse
from typing import Any

from cachetier.cli.server_option import add_socket, socket_of
from cachetier.client.client import Client
from cachetier.core.engine_messages import ROLES, SetRole

TIMEOUT_S = 10.0
EXIT_DONE, EXIT_NONE = 0, 1


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add this command to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "role",
        help="change what an engine does: store, load, or both",
        description="Change an engine's role while it serves. Requests that it already has go on as before. An engine "
        "that is started again begins with the role of its own configuration. Exit code: 0 changed, 1 there is no such "
        "engine.",
    )
    parser.add_argument("name", metavar="NAME", help="the engine, as `cachetier engines` lists it")
    parser.add_argument("role", metavar="ROLE", choices=ROLES, help=f"one of {', '.join(ROLES)}")
    add_socket(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Change the role; return the exit code.

    Raises:
        UnavailableError: no server answers at the socket.
    """
    client = Client(socket_of(args))
    if not client.call(SetRole(name=args.name, role=args.role), TIMEOUT_S).is_known:
        print(f"there is no engine {args.name!r}; `cachetier engines` lists those that there are")
        return EXIT_NONE
    print(f"{args.name} is told within a second: {args.role}")
    return EXIT_DONE
