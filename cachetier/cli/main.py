"""The entry point `cachetier`: finds the command and turns errors into one line and an exit code.

Exit codes of all commands: 0 done; 1 the command's answer is no (bad records, a failed check) or no server answers;
2 a mistake in usage or configuration, with a line that says what to change; 3 another server holds the data directory.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from cachetier import __version__
from cachetier.client.private_server import EXIT_IN_USE
from cachetier.core.errors import CachetierError, ConfigError, InUseError, ProtocolError, StorageError

COMMANDS = ("serve", "route", "warm", "documents", "explain", "engines", "role", "stats", "verify", "doctor")

EXIT_NO = 1
EXIT_USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (those of the process by default) and return the exit code."""
    args = _parser().parse_args(arguments)
    command: ModuleType = args.command
    try:
        return int(command.run(args))
    except InUseError as error:
        return _fail(error, EXIT_IN_USE)
    except (ConfigError, StorageError, ProtocolError) as error:
        return _fail(error, EXIT_USAGE)
    except CachetierError as error:
        return _fail(error, EXIT_NO)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `cachetier stats | head`
        sys.stderr.close()
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cachetier", description="A persistent KV cache tier for vLLM: host memory and NVMe, across restarts."
    )
    parser.add_argument("--version", action="version", version=f"cachetier {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"cachetier.cli.{name}")
        module.add_parser(subparsers)
        subparsers.choices[name].set_defaults(command=module)
    return parser


def _fail(error: Exception, code: int) -> int:
    print(f"cachetier: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
