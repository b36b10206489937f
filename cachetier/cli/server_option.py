"""The option `--socket` of the commands that ask a running server."""

import argparse

from cachetier.core.config import ServerConfig


def add_socket(parser: argparse.ArgumentParser) -> None:
    """Add the option."""
    parser.add_argument(
        "--socket", metavar="PATH", help="the server's socket (default that of the default data directory)"
    )


def socket_of(args: argparse.Namespace) -> str:
    """Return the path of the socket that `args` name."""
    return str(args.socket or ServerConfig().socket).removeprefix("unix:")
