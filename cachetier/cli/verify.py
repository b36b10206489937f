"""`cachetier verify`: read every record of a stopped server's data directory and compare it with its checksums."""

import argparse
import dataclasses
import json
import sys
from typing import Any

from tqdm import tqdm

from cachetier.core.config import default_data_dir
from cachetier.core.units import format_bytes


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add this command to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "verify", help="check every stored record of a stopped server", description=__doc__
    )
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the disk tier (default ~/.cache/cachetier)")
    parser.add_argument("--repair", action="store_true", help="drop what is bad, so that it becomes a miss")
    parser.add_argument("--json", action="store_true", help="print JSON: records, bad, bytes, details")
    return parser


def run(args: argparse.Namespace) -> int:
    """Verify; return 0 when every record checks and 1 when one does not (repaired or not).

    Raises:
        StorageError: the directory cannot be used, or a server holds it.
    """
    from cachetier.storage.verify import verify

    with tqdm(unit="B", unit_scale=True, disable=not sys.stderr.isatty(), leave=False) as bar:

        def show(done_bytes: int, total_bytes: int) -> None:
            bar.total = total_bytes
            bar.update(done_bytes - bar.n)

        report = verify(args.data_dir or default_data_dir(), repair=args.repair, progress=show)
    if args.json:
        print(json.dumps(dataclasses.asdict(report)))
        return int(report.bad > 0)
    for line in report.details:
        print(line)
    outcome = "dropped" if args.repair else "run again with --repair to drop them"
    bad = f"{report.bad} bad ({outcome})" if report.bad else "all good"
    print(f"{report.records} records, {format_bytes(report.bytes)}: {bad}")
    return int(report.bad > 0)
