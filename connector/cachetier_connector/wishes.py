"""What a request asks of cachetier: `kv_transfer_params={"cachetier": {...}}`, parsed once."""

from collections.abc import Mapping
from typing import Any, NamedTuple

SELECTORS = ("none", "link", "query")


class Wishes(NamedTuple):
    """A request's wishes; None: what the connector's configuration says.

    Attributes:
        load: take KV from the tier.
        store: put KV into the tier.
        blend: reuse registered documents in the middle of the prompt.
        select: which reused tokens are computed again, one of `SELECTORS`.
        budget: share of the reused tokens that `query` chooses.
        prefill: name of the engine that computes the prompt at the same time; empty: nobody is known to.
        document: id under which the prompt is to be registered as a document; empty: it is none.
        complaint: what is wrong with the parameters, for the log; empty: nothing.
    """

    load: bool = True
    store: bool = True
    blend: bool | None = None
    select: str | None = None
    budget: float | None = None
    prefill: str = ""
    document: str = ""
    complaint: str = ""


def wishes_of(params: Mapping[str, Any] | None) -> Wishes:
    """Return what `kv_transfer_params` ask for. What cannot be understood is left out and complained about."""
    given = (params or {}).get("cachetier") or {}
    if not isinstance(given, Mapping):
        return Wishes(complaint=f'kv_transfer_params["cachetier"] is {given!r}, not an object')
    understood, complaints = dict[str, Any](), []
    for name, value in given.items():
        if name not in _EXPECTED:
            complaints.append(f"unknown {name!r}; allowed: {', '.join(_EXPECTED)}")
        elif not _is_as_expected(name, value):
            complaints.append(f"{name} is {value!r}; it must be {_EXPECTED[name]}")
        else:
            understood[name] = value
    complaint = f'in kv_transfer_params["cachetier"]: {"; ".join(complaints)}' if complaints else ""
    return Wishes(**understood, complaint=complaint)


_EXPECTED = {
    "load": "true or false",
    "store": "true or false",
    "blend": "true or false",
    "select": "one of " + ", ".join(SELECTORS),
    "budget": "a number between 0 and 1",
    "prefill": "a name",
    "document": "a name",
}


def _is_as_expected(name: str, value: Any) -> bool:
    match name:
        case "select":
            return value in SELECTORS
        case "budget":
            return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
        case "document" | "prefill":
            return isinstance(value, str) and bool(value)
        case _:
            return isinstance(value, bool)
