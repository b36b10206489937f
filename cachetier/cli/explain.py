"""`cachetier explain`: what of a prompt would be loaded, from where, what would be computed, and why.

Only the options stand here; the work is in `explain_prompt`, which is imported on use because aiohttp takes its time.
"""

import argparse
from typing import Any

from cachetier.cli.server_option import add_socket, socket_of


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add this command to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "explain",
        help="say what of a prompt would be loaded, from where, and why not more",
        description="Say what of a prompt would be loaded, from which tier, what would be computed, and why; and name "
        "registered documents that almost stand in it. Nothing is sent to the model, loaded or leased. What the "
        "engine's own prefix cache holds is not counted. Exit code: 0 explained, 1 a prompt could not be read.",
    )
    parser.add_argument("--url", required=True, metavar="http://HOST:PORT", help="the engine, for its tokenizer")
    parser.add_argument("--model", metavar="NAME", help="model to ask for (default: the only one that is served)")
    add_socket(parser)
    parser.add_argument("--jsonl", action="store_true", help="the file is JSONL whatever its name")
    parser.add_argument(
        "input", metavar="FILE", help="a text, or JSONL of prompts as for `cachetier warm`; - for standard input"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit code.

    Raises:
        ConfigError: an option or the input cannot be used.
        UnavailableError: engine or server cannot be reached.
    """
    from cachetier.cli.explain_prompt import explain

    socket = socket_of(args)
    return explain(args.url, args.model, socket, args.input, is_jsonl=args.jsonl)
