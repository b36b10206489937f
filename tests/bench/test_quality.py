"""The tasks mean what they say, the models know them, and the simulated blending is a blending."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from bench.quality import reference, report
from bench.quality.measures import CONTENDERS, FULL, Answer, divergence, rows_of
from bench.quality.model import Llama, load, save
from bench.quality.run import wishes_of
from bench.quality.tasks import (
    ASK,
    BOS,
    DOC,
    FIRST_KEY,
    FIRST_MODE,
    FIRST_VALUE,
    MEANINGS,
    NUM_MODES,
    NUM_VALUES,
    SAY,
    SET,
    TASKS,
    Question,
    draw_question,
    draw_questions,
)
from bench.quality.train import accuracies
from bench.report import RESULTS_DIR, read_results
from cachetier_connector.wishes import wishes_of as parsed_wishes

MODELS = Path(__file__).parents[2] / "bench" / "quality" / "models"
ROPE = {"rope_type": "default", "rope_theta": 100_000.0}


def read(question: Question) -> tuple[int, set[int], int]:
    """Answer a question by reading the text: the value, the documents that were needed, and the aliases followed."""
    facts = {}
    for number, document in enumerate(question.documents):
        for at in np.flatnonzero(document == SET):
            facts[int(document[at + 1])] = (int(document[at + 2]), number)
    first = int(question.documents[0][1])
    mode = first - FIRST_MODE + 1 if FIRST_MODE <= first < FIRST_MODE + NUM_MODES else 0
    ask, said, say = question.asked.tolist()
    assert (ask, say) == (ASK, SAY)
    needed, steps = set(), 0
    while said >= FIRST_KEY:
        said, document = facts[said]
        needed.add(document)
        steps += 1
    return FIRST_VALUE + int(MEANINGS[mode, said - FIRST_VALUE]), needed, steps - 1


@pytest.fixture(scope="module")
def small() -> Llama:
    """A model that knows nothing, with attention that is far from uniform."""
    torch.manual_seed(0)
    model = Llama().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(1.5)
    return model


@pytest.fixture(scope="module", params=TASKS)
def trained(request: pytest.FixtureRequest) -> tuple[str, Llama]:
    return request.param, load(MODELS / request.param)


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_what_the_text_says(task: str) -> None:
    for question in draw_questions(np.random.default_rng(3), task, 100):
        answer, needed, num_aliases = read(question)
        assert (answer, num_aliases) == (question.answer, question.num_aliases)
        assert num_aliases >= 1
        assert question.kind == ("across" if len(needed) > 1 else "in")
        assert all(192 <= len(document) <= 256 and document[0] == DOC for document in question.documents)


def test_a_header_changes_answers_and_its_absence_does_not() -> None:
    questions = draw_questions(np.random.default_rng(3), "header", 100)
    first = [int(question.documents[0][1]) for question in questions]
    assert set(first) == set(range(FIRST_MODE, FIRST_MODE + NUM_MODES))
    assert (MEANINGS[0] == np.arange(NUM_VALUES)).all()
    assert (MEANINGS[1:] != MEANINGS[0]).mean() > 0.8


def test_every_fact_stands_behind_what_it_builds_on() -> None:
    for question in draw_questions(np.random.default_rng(4), "alias", 20):
        prompt, known = question.prompt, set()
        for at in np.flatnonzero(prompt == SET):
            key, says = prompt[at + 1 : at + 3].tolist()
            assert says < FIRST_KEY or says in known
            assert key not in known
            known.add(key)


def test_offsets_are_where_documents_stand() -> None:
    question = draw_question(np.random.default_rng(5), "alias", "in")
    assert question.prompt[0] == BOS
    for offset, document in zip(question.offsets, question.documents, strict=True):
        assert (question.prompt[offset : offset + len(document)] == document).all()


def test_a_saved_model_is_read_back_and_transformers_computes_the_same(small: Llama, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    save(small, tmp_path)
    mine = load(tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.from_numpy(draw_question(np.random.default_rng(0), "alias", "in").prompt).long()[None]
    with torch.inference_mode():
        logits = mine.lm_head(mine(tokens, torch.arange(tokens.shape[1])[None])[1])
        torch.testing.assert_close(logits, theirs(tokens).logits, rtol=1e-3, atol=1e-3)


@torch.inference_mode()
def test_computing_everything_is_the_full_prefill(small: Llama) -> None:
    question = draw_question(np.random.default_rng(1), "alias", "across")
    prompt, tokens = reference.Prompt(small, question), torch.from_numpy(question.prompt).long()[None]
    expected = small.lm_head(small(tokens, torch.arange(tokens.shape[1])[None])[1])[0, -1].log_softmax(-1).numpy()
    np.testing.assert_allclose(prompt.full().logprobs, expected, atol=1e-3)
    np.testing.assert_allclose(prompt.blended("query", 1.0).logprobs, expected, atol=1e-3)
    assert np.abs(prompt.blended("none", None).logprobs - expected).max() > 0.1, "documents depend on what is before"


@torch.inference_mode()
def test_keys_are_turned_to_where_the_document_stands(small: Llama) -> None:
    document = torch.from_numpy(draw_question(np.random.default_rng(1), "alias", "in").documents[0]).long()
    question = Question((document.numpy().astype(np.int32),), np.array([ASK, FIRST_KEY, SAY], np.int32), 0, "in", 1)
    prompt = reference.Prompt(small, question)
    positions = 1 + torch.arange(len(document))[None]
    keys, values = prompt._kv[0]  # what the first layer keeps depends on token and position only
    x = small.embed_tokens(document)[None]
    _, moved, same = small.layers[0].project(x, reference.rotation(positions, small.shape))
    held = len(document) // 64 * 64
    torch.testing.assert_close(keys[:, 1 : 1 + held], moved[0, :, :held], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(values[:, 1 : 1 + held], same[0, :, :held])


@torch.inference_mode()
def test_selectors_load_and_compute_what_they_should(small: Llama) -> None:
    question = draw_question(np.random.default_rng(2), "alias", "in")
    prompt, held = reference.Prompt(small, question), [len(document) // 64 * 64 for document in question.documents]
    before_end = question.offsets[-1] + held[-1]
    none, link = prompt.blended("none", None), prompt.blended("link", None)
    assert (none.loaded, none.computed) == (sum(held), before_end - sum(held))
    assert (link.loaded, link.computed) == (sum(held) - 5 * 16, before_end - sum(held) + 5 * 16)
    query, suffix = prompt.blended("query", 0.25), len(question.prompt) - 1 - before_end
    budget = int(0.25 * link.loaded) // 16 * 16
    twice = link.computed + suffix - 1 - 16  # what stands before the first loaded token is exact at once
    assert (query.loaded, query.computed) == (link.loaded, link.computed + suffix + twice + budget)


def test_the_pieces_that_are_attended_to_most_are_chosen_within_the_budget() -> None:
    paid = torch.zeros(100)
    paid[40], paid[90], paid[20] = 3, 2, 1  # the last piece has 8 tokens: what counts is attention a token
    chosen = reference.choose(paid, [(10, 58), (64, 96)], 0.4)
    assert chosen.nonzero().flatten().tolist() == [*range(26, 42), *range(80, 96)]
    assert not reference.choose(paid, [(10, 58)], 0.3).any()


@pytest.mark.slow
def test_the_models_know_their_tasks(trained: tuple[str, Llama]) -> None:
    task, model = trained
    for kind, num_aliases, accuracy in accuracies(model, task, seed=77, count=60):
        assert accuracy >= 0.9, (kind, num_aliases)


@torch.inference_mode()
@pytest.mark.slow
def test_documents_alone_answer_within_but_not_across(trained: tuple[str, Llama]) -> None:
    task, model = trained
    right = {}
    for kind in ("in", "across"):
        questions = [draw_question(np.random.default_rng((9, n)), task, kind) for n in range(30)]
        answers = [reference.Prompt(model, question).blended("none", None) for question in questions]
        said = [int(answer.logprobs.argmax()) == each.answer for answer, each in zip(answers, questions, strict=True)]
        right[kind] = sum(said) / len(said)
    assert right["across"] < 0.7
    assert right["in"] > 0.95 if task == "alias" else right["in"] < 0.9


def answer(*chances: float) -> Answer:
    return Answer(np.log(np.array(chances, np.float32)))


def test_divergence_is_that_of_kullback_and_leibler() -> None:
    assert divergence(answer(0.5, 0.5), answer(0.5, 0.5)) == 0
    assert divergence(answer(0.5, 0.5), answer(0.75, 0.25)) == pytest.approx(0.5 * np.log(4 / 3))
    assert divergence(answer(0.75, 0.25), answer(0.5, 0.5)) == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5))


def test_rows_count_each_kind_apart_and_agreement_whether_right_or_wrong() -> None:
    def asked(kind: str, right: int) -> Question:
        return Question((np.array([DOC], np.int32),), np.array([ASK, FIRST_KEY, SAY], np.int32), right, kind, 1)

    zero, one = answer(0.9, 0.1), answer(0.1, 0.9)
    questions = [asked("in", 0), asked("in", 1), asked("across", 1), asked("across", 1)]
    rows: list[dict[str, Any]] = list(
        rows_of(questions, [zero, zero, one, one], [zero, zero, zero, zero], contender="link", on="torch", budget=None)
    )
    values = {row["question"]: row["value"] for row in rows}
    assert (values["accuracy_in"], values["accuracy_cross"], values["agreement"]) == (0.5, 0, 0.5)
    assert values["kl"] == pytest.approx(divergence(one, zero) / 2, abs=1e-4)
    assert all(row["contender"] == "link" and row["parameters"] == {"on": "torch"} for row in rows)


@pytest.mark.parametrize(("contender", "budget"), [(FULL, None), *CONTENDERS])
def test_the_connector_understands_what_contenders_wish(contender: str, budget: float | None) -> None:
    wishes = parsed_wishes({"cachetier": wishes_of(contender, budget)})
    assert not wishes.complaint
    assert (wishes.load, wishes.budget) == (contender != FULL, budget)
    assert wishes.select == (None if contender == FULL else contender)


def test_page_and_picture_are_up_to_date() -> None:
    values = report.by_key(read_results(RESULTS_DIR))
    assert (report.DOCS / "quality.md").read_text() == "\n".join(report.sections(values))
    assert (report.DOCS / "quality.svg").read_text() == report.chart(values)


def test_the_picture_is_well_formed_and_shows_every_value() -> None:
    values = {
        (question, "alias", contender, budget, "vllm"): 0.5
        for question in report.COLUMNS
        for contender, budget in ((FULL, None), *CONTENDERS)
    }
    values["accuracy_cross", "alias", "query", 0.25, "vllm"] = 0.75
    picture = ElementTree.fromstring(report.chart(values))
    curves = [element.get("points") for element in picture.iter() if element.tag.endswith("polyline")]
    assert curves[0] == "0.0,140.0 21.5,140.0 64.5,140.0 107.5,70.0 215.0,140.0 430.0,140.0"
    assert len(curves) == 2
