"""`cachetier stats`: what a running server holds and whether it helps."""

import argparse
import json
import time
from typing import Any

from cachetier.cli.server_option import add_socket, socket_of
from cachetier.client.client import Client
from cachetier.core.messages import API_VERSION
from cachetier.core.units import format_bytes

TIMEOUT_S = 5.0
WATCH_S = 1.0
TIERS = ("gpu", "host", "disk")
HIT_TIERS = (*TIERS, "remote")
CHUNKS = (("in device memory", "chunks_gpu"), ("in memory", "chunks_host"), ("durable", "chunks_durable"))
CLEAR_SCREEN = "\033[H\033[2J"


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add this command to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "stats", help="show what a running server holds and how often it was hit", description=__doc__
    )
    add_socket(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, one line a snapshot")
    parser.add_argument("--watch", action="store_true", help="print again every second until interrupted")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the server's statistics; return 0.

    Raises:
        UnavailableError: no server answers at the socket.
    """
    client = Client(socket_of(args))
    while True:
        stats = json.loads(client.get(f"/v{API_VERSION}/stats", TIMEOUT_S))
        if args.json:
            print(json.dumps(stats), flush=True)
        else:
            print((CLEAR_SCREEN if args.watch else "") + as_text(stats), flush=True)
        if not args.watch:
            return 0
        time.sleep(WATCH_S)


def as_text(stats: dict[str, Any]) -> str:
    """Return the statistics for people."""
    tokens = stats["tokens"]
    queried = tokens["queried"]
    hits = "  ".join(f"{tier} {_share(tokens['hit'][tier], queried)}" for tier in HIT_TIERS)
    rows = [
        ("tokens asked for", f"{queried:,}"),
        ("of these loaded", hits),
        ("of these waited for", f"{tokens['waited']:,}"),
        ("blended", _blended(stats)),
        ("blends checked", _checked(stats["blend"])),
        ("tokens stored", f"{tokens['stored']:,}"),
        *((f"{tier} used", _filled(stats["bytes"][tier])) for tier in TIERS),
        ("remote", _remote(stats)),
        ("chunks", f"{stats['chunks']:,}  " + "  ".join(f"{name} {stats[key]:,}" for name, key in CHUNKS)),
        ("leases", f"{stats['leases']:,} in {stats['sessions']:,} sessions"),
        ("computed, not loaded", f"{stats['tokens_cut']:,} tokens of {stats['hits_cut']:,} hits: that was faster"),
        ("speeds", _speeds(stats)),
        ("stores dropped", f"{stats['stores_dropped']:,}"),
        ("loads failed", f"{stats['loads_failed']:,}"),
        ("matches too late", f"{stats['matches_late']:,}"),
        ("damaged chunks met", f"{stats['checksum_failures']:,}"),
    ]
    return "\n".join(f"{name:<22}{value}" for name, value in rows)


def _speeds(stats: dict[str, Any]) -> str:
    """Return what breaking even depends on, as far as it was measured."""
    tokens_per_s = stats["tokens_per_s"]
    tiers = [(tier, int(stats[f"{tier}_bytes_per_s"])) for tier in ("disk", "remote")]
    known = [f"{work} {tokens_per_s[work]:,.0f} tokens/s" for work in ("prefill", "load") if tokens_per_s[work]]
    known += [f"{tier} {format_bytes(speed)}/s" for tier, speed in tiers if speed]
    return "  ".join(known) or "not measured yet"


def _remote(stats: dict[str, Any]) -> str:
    """Return what went to the remote store and came from there."""
    moved = stats["bytes"]["remote"]
    state = "in use" if stats["remote_available"] else "none that answers"
    return (
        f"{state}  put {format_bytes(moved['put'])}  got {format_bytes(moved['got'])}  "
        f"failures {stats['remote_failures']:,}  chunks not put {stats['remote_puts_dropped']:,}"
    )


def _blended(stats: dict[str, Any]) -> str:
    blend = stats["tokens"]["blend"]
    return (
        f"{stats['requests']['blended']:,} requests: {blend['loaded']:,} tokens loaded, {blend['computed']:,} computed"
        f"  of {stats['documents']:,} documents"
    )


def _checked(blend: dict[str, Any]) -> str:
    """Return how far answers of blended requests are from those of a full computation."""
    checked = blend["checked"]
    if not checked:
        return "none yet"
    return f"{checked:,}: {blend['agreed'] / checked:.0%} agree on the next token, mean KL {blend['kl'] / checked:.3g}"


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({100 * part / whole:.1f}%)" if whole else f"{part:,}"


def _filled(tier: dict[str, int]) -> str:
    if not tier["limit"]:
        return "off"
    return f"{format_bytes(tier['used'])} of {format_bytes(tier['limit'])} ({100 * tier['used'] / tier['limit']:.0f}%)"
