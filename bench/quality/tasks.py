"""The two synthetic tasks: what a prompt of documents says, what is asked, and what the answer is. Pure numpy, seeded.

Text consists of token ids; there is no tokenizer. A document is `DOC`, then words without meaning and facts. A fact is
three tokens, `SET key value` or `SET key other_key` (an alias), and stands after the facts that it builds on. A
question is `ASK key SAY`, and its answer one token: the value at the end of the chain of aliases. (`SAY` is
there because an engine computes the last token of a prompt apart, after tokens were selected by what the others attend
to; the key has to be among those.)

- **alias**: what a reader of the last document needs may stand in an earlier one.
- **header**: the same, but the first document begins with `DOC mode`, and the mode permutes what every value means, in
  all documents. Without a mode a value means itself.

While a reader reads the last token of a fact, it can already know the value; `UNKNOWN` stands for an alias of a key
that no fact defined before it. Training asks for it everywhere (`Laid.labels`): many more lessons a prompt than one
question, and the reason why the KV of a document computed alone differs from that in a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BOS, EOS, DOC, SET, ASK, SAY, UNKNOWN = range(7)
NUM_MODES, NUM_VALUES, NUM_KEYS = 3, 32, 64
FIRST_MODE = 7
FIRST_VALUE = FIRST_MODE + NUM_MODES
FIRST_KEY = FIRST_VALUE + NUM_VALUES
FIRST_FILLER = FIRST_KEY + NUM_KEYS
VOCAB_SIZE = 128
FACT_TOKENS = 3
ALIASES_MAX = 2  # in a chain; with the question, one more step
NO_LABEL = -100
DEFINED_ALONE = -1

TASKS = ("alias", "header")
# Row 0: no mode.
MEANINGS = np.stack(
    [np.arange(NUM_VALUES), *(np.random.default_rng(1 + mode).permutation(NUM_VALUES) for mode in range(NUM_MODES))]
)
Tokens = NDArray[np.int32]


class Fact(NamedTuple):
    """What is said of `key`; `target` is the index of the fact whose key it is an alias of, if it is one."""

    key: int
    says: int
    means: int
    num_aliases: int
    target: int
    is_across: bool  # anywhere along the chain


@dataclass(frozen=True)
class Laid:
    """A text with what a reader should know at each token, and where it may be stretched (before which tokens)."""

    tokens: Tokens
    labels: Tokens
    units: NDArray[np.bool_]


@dataclass(frozen=True)
class Question:
    """One prompt: [BOS], the documents, `ASK key SAY`."""

    documents: tuple[Tokens, ...]
    asked: Tokens
    answer: int
    kind: str  # "in": the whole chain stands in one document; "across": it does not
    num_aliases: int

    @property
    def prompt(self) -> Tokens:
        """All tokens."""
        return np.concatenate([np.array([BOS], np.int32), *self.documents, self.asked])

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each document starts in the prompt."""
        return tuple(int(n) for n in np.cumsum([1, *map(len, self.documents[:-1])]))


def draw_facts(
    rng: np.random.Generator, num_documents: int, facts_each: int, mode: int, *, across: float, unknown: float
) -> list[list[Fact]]:
    """Return the facts of each document, in order.

    Args:
        rng: where chance comes from.
        num_documents: how many documents.
        facts_each: facts in each.
        mode: 0 for none, or 1 to `NUM_MODES`.
        across: how likely the target of an alias is taken from an earlier document.
        unknown: how likely it is one that nothing defines.
    """
    keys = FIRST_KEY + rng.permutation(NUM_KEYS)
    undefined = keys[num_documents * facts_each :]
    facts: list[Fact] = []
    for document in range(num_documents):
        start = document * facts_each
        for _ in range(facts_each):
            key, chance = int(keys[len(facts)]), rng.random(3)
            pool = range(start) if chance[0] < across else range(start, len(facts))
            wanted = int(chance[1] * (ALIASES_MAX + 1)) - 1  # aliases that the target has; -1: a value of its own
            targets = [index for index in pool if facts[index].num_aliases == wanted]
            if wanted >= 0 and len(undefined) and chance[2] < unknown:
                says = int(undefined[rng.integers(len(undefined))])
                facts.append(Fact(key, says, UNKNOWN, wanted + 1, DEFINED_ALONE, False))
            elif targets:
                index = targets[int(rng.integers(len(targets)))]
                is_across = index < start or facts[index].is_across
                facts.append(Fact(key, facts[index].key, facts[index].means, wanted + 1, index, is_across))
            else:
                value = int(rng.integers(NUM_VALUES))
                means = FIRST_VALUE + int(MEANINGS[mode, value])
                facts.append(Fact(key, FIRST_VALUE + value, means, 0, DEFINED_ALONE, False))
    return [facts[n * facts_each : (n + 1) * facts_each] for n in range(num_documents)]


def lay_out(rng: np.random.Generator, facts: list[Fact], num_tokens: int, mode: int = 0) -> Laid:
    """Return a document of `num_tokens` tokens with `facts` in it, in their order, at random places.

    `mode`, unless it is 0, is announced right after `DOC`.
    """
    head = [DOC, FIRST_MODE + mode - 1] if mode else [DOC]
    num_filler = num_tokens - len(head) - FACT_TOKENS * len(facts)
    assert num_filler >= 0, "the facts do not fit"
    tokens = rng.integers(FIRST_FILLER, VOCAB_SIZE, num_tokens, dtype=np.int32)
    labels = np.full(num_tokens, NO_LABEL, np.int32)
    units = np.ones(num_tokens, np.bool_)
    tokens[: len(head)], units[: len(head)] = head, False
    places = np.sort(rng.permutation(num_filler + len(facts))[: len(facts)])
    starts = len(head) + places + (FACT_TOKENS - 1) * np.arange(len(facts))
    for start, fact in zip(starts, facts, strict=True):
        tokens[start : start + FACT_TOKENS] = SET, fact.key, fact.says
        labels[start + FACT_TOKENS - 1] = fact.means
        units[start + 1 : start + FACT_TOKENS] = False
    return Laid(tokens, labels, units)


def lay_questions(facts: list[Fact]) -> Laid:
    """Return questions, one after the other; no answer stands between them."""
    tokens = np.array([[ASK, fact.key, SAY] for fact in facts], np.int32).reshape(-1)
    labels = np.array([[NO_LABEL, fact.means, fact.means] for fact in facts], np.int32).reshape(-1)
    return Laid(tokens, labels, np.tile([True, False, False], len(facts)))


def draw_question(
    rng: np.random.Generator, task: str, kind: str, *, num_documents: int = 5, facts_each: int = 6
) -> Question:
    """Return a prompt whose question needs at least one alias, `kind` "in" or "across".

    Documents have 192 to 256 tokens. Every alias is of a key that some document before it defines.
    """
    mode = int(rng.integers(1, NUM_MODES + 1)) if task == "header" else 0
    while True:
        documents = draw_facts(rng, num_documents, facts_each, mode, across=0.5, unknown=0.0)
        wanted = 1 + int(rng.integers(ALIASES_MAX))
        fitting = [
            fact
            for document in documents
            for fact in document
            if fact.num_aliases == wanted and fact.is_across == (kind == "across")
        ]
        if fitting:
            break
    fact = fitting[int(rng.integers(len(fitting)))]
    laid = [
        lay_out(rng, facts, int(rng.integers(192, 257)), mode if number == 0 else 0)
        for number, facts in enumerate(documents)
    ]
    asked = lay_questions([fact]).tokens
    return Question(tuple(each.tokens for each in laid), asked, fact.means, kind, fact.num_aliases)


def draw_questions(rng: np.random.Generator, task: str, count: int) -> list[Question]:
    """Return `count` questions of each kind."""
    return [draw_question(rng, task, kind) for kind in ("in", "across") for _ in range(count)]
