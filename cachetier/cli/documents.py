"""`cachetier documents`: what texts are registered for reuse anywhere in a prompt, and how much of each is held."""

import argparse
import json
import time
from typing import Any

from cachetier.cli.server_option import add_socket, socket_of
from cachetier.cli.table import as_table
from cachetier.client.client import Client
from cachetier.core.document_messages import DocumentInfo, ListDocuments, RemoveDocument

TIMEOUT_S = 10.0
COLUMNS = ("DOCUMENT", "MODEL", "TOKENS", "CHUNKS", "IN HOST", "ON DISK", "REGISTERED")
NUM_TEXT_COLUMNS = 2  # those that are aligned to the left
PUBLIC_FIELDS = ("document", "model", "num_tokens", "num_chunks", "host_chunks", "disk_chunks", "registered_at_s")
EXIT_DONE, EXIT_NONE = 0, 1


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add this command to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "documents",
        help="list the registered documents, or forget one",
        description="List the documents that `cachetier warm --document` registered. A document stays registered when "
        "its KV is evicted; warm it again then.",
    )
    add_socket(parser)
    parser.add_argument("--json", action="store_true", help="print JSON: a list of objects")
    actions = parser.add_subparsers(metavar="[remove ID]")
    remove = actions.add_parser(
        "remove",
        help="forget a document",
        description="Forget every tenant's and model's document of this id. Its KV stays, as a prompt's would, until "
        "it is evicted. Exit code: 0 forgotten, 1 there was none.",
    )
    remove.add_argument("--socket", metavar="PATH", default=argparse.SUPPRESS, help="the server's socket")
    remove.add_argument("id", metavar="ID", help="the document's id")
    parser.set_defaults(id=None)
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the documents, or forget the one that is named; return the exit code.

    Raises:
        UnavailableError: no server answers at the socket.
    """
    client = Client(socket_of(args))
    if args.id is not None:
        removed = client.call(RemoveDocument(document=args.id), TIMEOUT_S).removed
        print(f"removed {removed} of id {args.id!r}" if removed else f"no document {args.id!r} is registered")
        return EXIT_DONE if removed else EXIT_NONE
    documents = list_documents(client)
    if args.json:
        print(json.dumps([{name: getattr(each, name) for name in PUBLIC_FIELDS} for each in documents], indent=1))
    else:
        print(as_text(documents))
    return EXIT_DONE


def list_documents(client: Client) -> list[DocumentInfo]:
    """Return all registered documents, in the order of their registration.

    Raises:
        UnavailableError: no server answers.
    """
    documents: list[DocumentInfo] = []
    while page := client.call(ListDocuments(skip=len(documents)), TIMEOUT_S).documents:
        documents += page
    return documents


def as_text(documents: list[DocumentInfo]) -> str:
    """Return the table for people."""
    if not documents:
        return "no documents are registered; `cachetier warm --document` registers some"
    return as_table([COLUMNS, *map(_row, documents)], NUM_TEXT_COLUMNS)


def _row(document: DocumentInfo) -> tuple[str, ...]:
    counts = (document.num_tokens, document.num_chunks, document.host_chunks, document.disk_chunks)
    registered = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(document.registered_at_s))
    return (document.document, document.model or "?", *(f"{count:,}" for count in counts), registered)
