"""`cachetier route`: one OpenAI address in front of engines, of which some prefill prompts and others answer."""

import argparse
import asyncio
import logging
import sys
from typing import TYPE_CHECKING, Any

from cachetier.core.bearer import read_token

if TYPE_CHECKING:
    from cachetier.route.engine import Engine

EXAMPLE = """
example: two engines that share the server of this node, and were started with the connector's settings `name` and `url`
    cachetier route --listen 127.0.0.1:9000 --socket /run/cachetier.sock
the same, without asking the server:
    cachetier route --listen 127.0.0.1:9000 --engine p1=producer@http://127.0.0.1:8001 --engine \
c1=consumer@http://127.0.0.1:8002

while it runs:
    curl http://127.0.0.1:9000/engines
    curl http://127.0.0.1:9000/engines --json '{"name": "c2", "role": "consumer", "url": "http://127.0.0.1:8003"}'
    curl -X DELETE http://127.0.0.1:9000/engines/c2

The engines' API key, if they want one, is taken from VLLM_API_KEY where the router has a token of its own; else the
clients' keys are passed on.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add this command to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "route",
        help="pass requests on to producers and consumers",
        description="Serve the OpenAI interface in front of vLLM engines. A prompt goes to a producer, which computes "
        "and stores it, and at the same time to a consumer, which loads it and answers; short prompts, and all when no "
        "producer is left, go to the consumer alone. Engines are those named here, those that the server lists "
        "(--socket), and those added later; each is watched through its own /health and /metrics.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--listen", required=True, metavar="HOST:PORT", help="where to listen; port 0: any free one")
    parser.add_argument(
        "--engine",
        action="append",
        default=[],
        metavar="NAME=ROLE@URL",
        help="an engine: its connector's setting `name`; producer, consumer or both; http://HOST:PORT. Repeat for more",
    )
    parser.add_argument(
        "--socket",
        default="",
        metavar="PATH",
        help="the cachetier server whose engines are to be used as well: those with a `url`; their roles are those "
        "that `cachetier role` gives them",
    )
    parser.add_argument(
        "--min-prefill-tokens",
        type=_not_negative,
        default=512,
        metavar="N",
        help="shorter prompts are not handed over; text counts four characters a token (default 512)",
    )
    parser.add_argument(
        "--token-file",
        metavar="FILE",
        help="file with the bearer token that clients must send; needed to listen beyond the loopback",
    )
    parser.add_argument(
        "--drain-s",
        type=_not_negative,
        default=30,
        metavar="N",
        help="seconds that answers under way may take after SIGTERM (default 30)",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Route until SIGTERM or SIGINT; return 0.

    Raises:
        ConfigError: an option or the port cannot be used.
    """
    from cachetier.route.engine import Registration
    from cachetier.route.server import RouterConfig
    from cachetier.route.server import run as run_router

    config = RouterConfig(
        listen=args.listen,
        token=read_token(args.token_file) if args.token_file else "",
        socket=args.socket.removeprefix("unix:"),
        registrations=tuple(map(Registration.parse, args.engine)),
        min_prefill_tokens=args.min_prefill_tokens,
        drain_s=args.drain_s,
    )
    text = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=text)
    # aiohttp would quote what it could not parse, which may be anybody's prompt.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
    asyncio.run(run_router(config, _announce))
    return 0


def _announce(url: str, engines: "list[Engine]") -> None:
    known = ", ".join(f"{each.name} ({each.role}{'' if each.is_up else ', out'})" for each in engines)
    print(f"cachetier route ready: {url}, engines: {known or 'none yet'}", flush=True)


def _not_negative(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)
