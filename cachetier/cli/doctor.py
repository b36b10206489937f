"""`cachetier doctor`: what will limit a server and its engines on this machine, and what to do about it."""

import argparse
import dataclasses
import json
from typing import Any

from cachetier.cli.doctor_checks import CHECKS, Status
from cachetier.cli.doctor_remote import check_remote
from cachetier.core.config import default_data_dir


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add this command to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "doctor", help="check what will limit the cache on this machine", description=__doc__
    )
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the disk tier (default ~/.cache/cachetier)")
    parser.add_argument("--remote", metavar="URL", help="also check this remote store, as given to `serve`")
    parser.add_argument("--json", action="store_true", help="print JSON: a list of status, name, text, advice")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print one line a check; return 1 if one of them failed."""
    data_dir = args.data_dir or default_data_dir()
    results = [check(data_dir) for check in CHECKS]
    if args.remote:
        results.append(check_remote(args.remote))
    if args.json:
        print(json.dumps([dataclasses.asdict(result) for result in results], indent=1))
    else:
        for result in results:
            print(f"{result.status:<5}{result.name:<16}{result.text}")
            if result.advice:
                print(f"{'':<21}-> {result.advice}")
    return int(any(result.status == Status.FAIL for result in results))
