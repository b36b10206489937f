"""What the tests of blending share: documents, prompts made of them, and KV to compare."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from cachetier_blend.plan import BlendPlan, DocumentHit, plan_blend
from cachetier_blend.rotation import Rotary, read_rotary, rotate
from tests.e2e.harness import PATIENT, dumped_kv
from tests.e2e.stand import Stand, prompt_of, whole_chunks

LOADING = "tests.e2e.loading_connector.LoadingConnector"
HEAD_SIZE = 32
ROTARY: Rotary = read_rotary(
    {"rope_type": "default", "rope_theta": 10000.0},
    head_size=HEAD_SIZE,
    rotary_dim=HEAD_SIZE,
    is_interleaved=False,
    max_positions=4096,
)
# Without the guard, which keeps blocks for a while when it chooses a request: nothing here is to depend on luck.
BLENDING = PATIENT | {"blend": "request", "blend_guard": 0.0}
# Documents of odd lengths, so that their last tokens stand in no complete chunk and others follow at odd offsets.
DOCUMENTS = {
    "a": prompt_of(10, 300)["tokens"],
    "b": prompt_of(11, 201)["tokens"],
    "c": prompt_of(12, 517)["tokens"],
}
QUESTION = prompt_of(13, 45)["tokens"]


def blended(**wishes) -> dict:
    """Return a request's parameters that ask for blending."""
    return {"cachetier": {"blend": True, **wishes}}


class BlendStand(Stand):
    """A stand whose server knows documents."""

    def __init__(self, folder: Path, settings: Mapping[str, object] = BLENDING, **arguments) -> None:
        super().__init__(folder, settings, **({"connector_class": LOADING} | arguments))

    def register(self, documents: dict[str, list[int]]) -> dict[str, str]:
        """Have the engine register `documents`, of which nothing is held yet; return the ids of their requests."""
        before, num_before, ids = self.counts(), self.server.peek()["documents"], {}
        for name, tokens in documents.items():
            self.ask([{"tokens": tokens, "params": {"cachetier": {"document": name}}}], max_tokens=1)
            ids[name] = self.last_id
        self.wait_until_stored(before, sum(whole_chunks(len(tokens)) for tokens in documents.values()))
        self.server.wait_for(lambda stats: stats["documents"] == num_before + len(documents))
        return ids

    def blend_counts(self) -> np.ndarray:
        """Return how many requests were blended, and how many of their tokens were loaded and computed, so far."""
        stats = self.settled()
        blend = stats["tokens"]["blend"]
        return np.array([stats["requests"]["blended"], blend["loaded"], blend["computed"]])

    def blend(self, prompt: list[int], names: str, *, exact_end: int = 0, **wishes) -> dict:
        """Ask a prompt that holds `DOCUMENTS` in this order: it is blended as planned, and not stored.

        `wishes` choose a selector that computes what is planned and no more.
        """
        plan = planned(prompt, names, exact_end=exact_end)
        before, counts = self.blend_counts(), self.counts()
        [answer] = self.ask([{"tokens": prompt, "params": blended(**wishes)}])
        self.server.wait_for(lambda stats: stats["requests"]["blended"] > before[0])
        assert answer["cached"] == plan.end
        assert (self.blend_counts() - before).tolist() == [1, num_tokens(plan.loads), num_tokens(plan.computes)]
        assert self.counts() == counts._replace(host=counts.host + exact_end)
        return answer


def joined(*parts: list[int] | str) -> list[int]:
    """Return a prompt of tokens and names of documents."""
    return [token for part in parts for token in (DOCUMENTS[part] if isinstance(part, str) else part)]


def planned(prompt: list[int], names: str, *, exact_end: int = 0) -> BlendPlan:
    """Return the plan of a prompt that holds `DOCUMENTS` in this order."""
    hits, after = [], 0
    for name in names:
        offset = offset_of(prompt, DOCUMENTS[name], after)
        after = offset + len(DOCUMENTS[name])
        hits.append(DocumentHit(offset, whole_chunks(len(DOCUMENTS[name]))))
    plan = plan_blend(exact_end=exact_end, documents=hits, num_tokens=len(prompt))
    assert plan is not None
    return plan


def num_tokens(runs: Sequence) -> int:
    """Return how many tokens are in `runs`."""
    return sum(run.end - run.start for run in runs)


def offset_of(prompt: list[int], document: list[int], after: int = 0) -> int:
    """Return where `document` stands in `prompt`, not before token `after`."""
    return next(at for at in range(after, len(prompt)) if prompt[at : at + len(document)] == document)


def rows_of(folder: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the K and the V rows that a request's blocks held: bf16 `[tokens, heads, layers, HEAD_SIZE]`."""
    kv = torch.from_numpy(dumped_kv(folder, name).view(np.int16)).view(torch.bfloat16)
    return kv[..., :HEAD_SIZE], kv[..., HEAD_SIZE:]


def assert_loaded(folder: Path, name: str, document: str, *, shift: int, start: int, end: int) -> None:
    """Tokens `[start, end)` of a blended request hold the KV that `document` had alone, its keys rotated by `shift`."""
    keys, values = rows_of(folder, name)
    alone_keys, alone_values = rows_of(folder, document)
    here, there = slice(start, end), slice(start - shift, end - shift)
    assert torch.equal(values[here], alone_values[there])
    torch.testing.assert_close(keys[here], rotate(alone_keys[there], shift, ROTARY), rtol=1 / 128, atol=1e-4)


def largest_difference(folder: Path, name: str, other: str) -> float:
    """Return how far the KV of two requests with one prompt are apart, relative to its size, in the worst layer."""
    worst = 0.0
    for rows, other_rows in zip(rows_of(folder, name), rows_of(folder, other), strict=True):
        length = min(len(rows), len(other_rows))
        one, another = rows[:length].float(), other_rows[:length].float()
        norms = [torch.linalg.vector_norm(each, dim=(0, 1, 3)) for each in (one - another, another)]
        worst = max(worst, float((norms[0] / norms[1]).max()))
    return worst
