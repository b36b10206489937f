"""`cachetier warm`: send prompts to a running engine so that their KV is in the tier before anyone needs it.

Only the options stand here; the work is in `warm_up`, which is imported on use because aiohttp takes its time.
"""

import argparse


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "warm",
        help="send prompts to a running engine so that their KV is stored",
        description="Send prompts to a running vLLM OpenAI server so that their KV is stored. Exit code: 0 all sent, "
        "1 some failed, 130 interrupted. The engine's API key, if it wants one, is taken from VLLM_API_KEY.",
    )
    parser.add_argument("--url", required=True, metavar="http://HOST:PORT", help="the engine")
    parser.add_argument("--model", metavar="NAME", help="model to ask for (default: the only one that is served)")
    parser.add_argument("--concurrency", type=_positive, default=8, metavar="N", help="prompts in flight (default 8)")
    parser.add_argument(
        "--socket", metavar="PATH", help="the cachetier server: show tokens stored and hit, check that it has documents"
    )
    parser.add_argument("--max-tokens", type=_positive, default=1, metavar="N", help="tokens to generate (default 1)")
    parser.add_argument("--no-resume", action="store_true", help="send again what an interrupted run sent")
    parser.add_argument(
        "--journal",
        metavar="FILE",
        help="remember here what was sent, for good: later runs send only what is new (default: a file of its own for "
        "each engine, model and inputs, deleted when everything was sent)",
    )
    parser.add_argument(
        "--document",
        action="store_true",
        help="the inputs are documents: texts that are computed alone and registered, to be found anywhere in later "
        "prompts (blending); an id is the file's path as given, or relative to the folder that was given",
    )
    parser.add_argument("--jsonl", action="store_true", help="the files are JSONL whatever their names")
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help='text file, folder (its *.txt and *.md), .jsonl file of {"messages": [...]}, {"prompt": "..."} or '
        '{"token_ids": [...]}, each with an optional "cache_salt" (documents: {"id": "...", "text": "..."} or {"id": '
        '"...", "token_ids": [...]}); - for JSONL on standard input',
    )


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit code.

    Raises:
        ConfigError: an option, an input or the journal cannot be used.
        UnavailableError: engine or tier cannot be reached, or the engine is gone for good.
    """
    from cachetier.cli.warm_up import warm_up

    return warm_up(args)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
