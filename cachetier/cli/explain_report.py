"""What `cachetier explain` prints: where each token of a prompt comes from, and what became of the documents in it.

Pure: values in, text out. What an engine would do with the hits is asked of `plan_blend`, as the engine does.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain

from cachetier.cli.explain_search import NearMiss, Place
from cachetier.core.document_messages import DocumentInfo, DocumentRun
from cachetier.core.messages import TIER_DISK, TIER_GPU, TIER_HOST, TIER_REMOTE, MatchReply
from cachetier_blend.plan import BlendPlan, DocumentHit, DocumentLoad, Run, plan_blend

TIER_NAMES = {TIER_HOST: "host memory", TIER_DISK: "disk", TIER_GPU: "device memory", TIER_REMOTE: "the remote store"}
OTHER_SALT = "not for this prompt: registered with another cache_salt"
BLENDING_NOTE = (
    "Documents are loaded only where blending is on: the engine's setting `blend` and the request decide, with "
    "`blend_select` link as assumed here. The server knows neither; the engine's log says if it cannot blend."
)


@dataclasses.dataclass(frozen=True, slots=True)
class Findings:
    """What the server holds of one prompt.

    Attributes:
        num_tokens: the prompt's length.
        chunk_tokens: tokens a chunk.
        prefix: the match of the prompt itself.
        runs: the match of documents in it that reach beyond the prefix.
        registered: all documents of the model.
        places: where the first chunks of some of them stand.
        near_misses: those that almost do.
    """

    num_tokens: int
    chunk_tokens: int
    prefix: MatchReply
    runs: Sequence[DocumentRun]
    registered: Sequence[DocumentInfo]
    places: Sequence[Place]
    near_misses: Sequence[NearMiss]

    @property
    def exact_end(self) -> int:
        """The tokens before it are loaded exactly; the last token of a prompt never is."""
        return max(0, min(self.prefix.num_chunks * self.chunk_tokens, self.num_tokens - 1))

    def plan(self) -> BlendPlan | None:
        """Return what an engine would do with the documents; None: nothing."""
        hits = [DocumentHit(run.offset, run.match.num_chunks * self.chunk_tokens) for run in self.runs]
        return plan_blend(exact_end=self.exact_end, documents=hits, num_tokens=self.num_tokens)


def as_text(findings: Findings) -> str:
    """Return the report for people."""
    plan = findings.plan()
    parts = [_actions(findings, plan), _totals(findings, plan), _documents(findings, plan), _near_misses(findings)]
    return "\n".join(chain.from_iterable(parts))


def _actions(findings: Findings, plan: BlendPlan | None) -> Iterator[str]:
    """Yield a line for each run of the prompt, in order."""
    exact, chunk_tokens = findings.exact_end, findings.chunk_tokens
    rows = []
    if exact:
        tiers = _tiers(findings.prefix, 0, exact, chunk_tokens)
        rows.append((0, exact, "load", f"exact prefix, from {tiers}"))
    loads = plan.loads if plan else ()
    for load in loads:
        run = findings.runs[load.document]
        tiers = _tiers(run.match, load.start - run.offset, load.end - run.offset, chunk_tokens)
        rows.append((load.start, load.end, "load", f"document {run.document!r}, from {tiers}"))
    for computed in plan.computes if plan else ():
        rows.append((computed.start, computed.end, "compute", _why_computed(findings, loads, computed)))
    end = plan.end if plan else exact
    pending = findings.prefix.num_pending
    more = f"; {pending} chunks more are being stored, or promised" if pending else ""
    rows.append((end, findings.num_tokens, "compute", ("after what is held" if end else "nothing is held") + more))
    for start, end, action, why in sorted(rows):
        yield f"  {f'{start:,}':>9} to {f'{end:,}':<9} {action:<8} {why}"


def _why_computed(findings: Findings, loads: Sequence[DocumentLoad], computed: Run) -> str:
    """Say why tokens before one of `loads`, which end where it starts, are computed."""
    run = next(findings.runs[load.document] for load in loads if load.start == computed.end)
    first = f"the first tokens of {run.document!r}, for what stands before them"
    return first if computed.start >= run.offset else f"not held; and {first}"


def _totals(findings: Findings, plan: BlendPlan | None) -> Iterator[str]:
    approximate = sum(load.end - load.start for load in plan.loads) if plan else 0
    exact, whole = findings.exact_end, findings.num_tokens
    yield f"would load {exact + approximate:,} of {whole:,} tokens ({exact:,} exactly, {approximate:,} approximately)"
    if approximate:
        yield BLENDING_NOTE


def _documents(findings: Findings, plan: BlendPlan | None) -> Iterator[str]:
    """Yield what became of the documents that stand in the prompt."""
    if not findings.registered:
        yield "no documents are registered for this model"
        return
    loaded = {load.document for load in plan.loads} if plan else set()
    rows = [
        (run.offset, run.document, _state(findings, run, is_loaded=number in loaded))
        for number, run in enumerate(findings.runs)
    ]
    matched = {(run.offset, run.document) for run in findings.runs}
    unmatched = [(each.offset, each.document.document) for each in findings.places]
    rows += [(*each, _why_unused(findings, each[0])) for each in unmatched if each not in matched]
    found = {name for _, name, state in rows if state != OTHER_SALT}
    yield f"found {len(found):,} of {len(findings.registered):,} registered documents"
    for offset, name, state in sorted(rows):
        yield f"  {name!r} at token {offset:,}: {state}"


def _state(findings: Findings, run: DocumentRun, *, is_loaded: bool) -> str:
    """Say how much of a found document stands there, is held, and is used."""
    held = run.match.num_chunks * findings.chunk_tokens
    if not held:
        return "registered, nothing held: warm it again"
    whole = max(  # of one id there may be several, of different tenants
        (each.num_chunks * findings.chunk_tokens for each in findings.registered if each.document == run.document),
        default=run.num_tokens,
    )
    parts = [f"{run.num_tokens:,} tokens"]
    if run.num_tokens < whole:
        parts = [f"the first {run.num_tokens:,} of its {whole:,} tokens stand there, then the prompt differs or ends"]
    if held < run.num_tokens:
        parts.append(f"held only {held:,}: warm it again")
    if run.offset == 0 and findings.exact_end:
        parts.append("at the very beginning it is an exact prefix")
    elif not is_loaded:
        parts.append("too little is held to be worth loading")
    return "; ".join(parts)


def _why_unused(findings: Findings, offset: int) -> str:
    """Say why a document was not matched though its first chunk stands at `offset`."""
    for run in findings.runs:
        if run.offset <= offset < run.offset + run.num_tokens:
            return f"{run.document!r} covers it"
    if offset + findings.chunk_tokens <= findings.exact_end:
        return "at the very beginning: exact prefix" if offset == 0 else "inside the exact prefix"
    return OTHER_SALT


def _near_misses(findings: Findings) -> Iterator[str]:
    """Yield the documents that almost stand in the prompt."""
    for miss in findings.near_misses:
        if miss.is_glued:
            why = "the tokenizer glued its first token to what stands before it"
        else:
            why = f"{miss.num_different} of its first {findings.chunk_tokens} tokens are others"
        place = (
            f"it would begin at the prompt's token {miss.offset:,}" if miss.offset >= 0 else "the prompt cuts it off"
        )
        yield f"  {miss.document.document!r} differs at token {miss.token} ({place}): {why}"


def _tiers(match: MatchReply, start: int, end: int, chunk_tokens: int) -> str:
    """Say from which tiers tokens `[start, end)` of a match come."""
    counts: Counter[int] = Counter()
    for number in range(start // chunk_tokens, -(-end // chunk_tokens)):
        overlap = min(end, (number + 1) * chunk_tokens) - max(start, number * chunk_tokens)
        counts[match.tiers[number]] += overlap
    if len(counts) == 1:
        return TIER_NAMES[next(iter(counts))]
    return " and ".join(f"{TIER_NAMES[tier]} ({count:,})" for tier, count in sorted(counts.items()))
