"""`cachetier warm` and `explain` against a real vLLM OpenAI server: what was sent is hit afterwards, by whoever may."""

import json
import random
import subprocess
import sys

import pytest

from tests.e2e.harness import ROOT, Server, running
from tests.e2e.openai_servers import OpenAIServer

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

CHUNK = 64


def cachetier(*arguments: object) -> str:
    """Run the command line and return what it prints."""
    command = [sys.executable, "-m", "cachetier.cli.main", *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def warm(engine: OpenAIServer, server: Server, *inputs: object) -> str:
    return cachetier("warm", "--url", engine.url, "--socket", server.socket, "--concurrency", 4, *inputs)


def hit(server: Server) -> int:
    return server.wait_for(lambda stats: stats["leases"] == 0)["tokens"]["hit"]["host"]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """An engine and its server."""
    folder = tmp_path_factory.mktemp("warm")
    server = Server(folder)
    engine = OpenAIServer(folder, server, blend="request")
    with running(server, engine):
        engine.wait_until_healthy()
        engine.complete(prompt=list(range(40, 60)))
        yield engine, server


def test_what_was_warmed_is_hit_by_whoever_may(both, tmp_path):
    engine, server = both
    rng = random.Random(7)
    prompts = [[rng.randrange(20, 4000) for _ in range(length)] for length in (130, 700, 1500)]
    lines = [{"token_ids": prompt} for prompt in prompts] + [{"token_ids": prompts[1], "cache_salt": "tenant"}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "texts").mkdir()
    text = (ROOT / "docs" / "goals.md").read_text()[:3000]
    (tmp_path / "texts" / "goals.md").write_text(text)
    before = hit(server)
    warm(engine, server, tmp_path / "prompts.jsonl", tmp_path / "texts")
    stats = server.wait_for(lambda stats: stats["chunks_pending"] == 0)
    chunks = sum(len(line["token_ids"]) // CHUNK for line in lines)
    assert stats["tokens"]["stored"] >= chunks * CHUNK
    assert hit(server) == before

    engine.complete(prompt=prompts[2])
    assert hit(server) == before + 1500 // CHUNK * CHUNK
    before = hit(server)
    engine.complete(prompt=text)
    assert hit(server) >= before + 5 * CHUNK
    for salt, tokens in (("tenant", 700 // CHUNK * CHUNK), ("another", 0)):
        before = hit(server)
        engine.complete(prompt=prompts[1], cache_salt=salt)
        assert hit(server) == before + tokens
    before = hit(server)
    engine.complete(prompt=prompts[0], kv_transfer_params={"cachetier": {"load": False}})
    assert hit(server) == before

    warm(engine, server, tmp_path / "prompts.jsonl")
    assert hit(server) == before + chunks * CHUNK


def test_warmed_documents_are_listed_blended_and_explained(both, tmp_path):
    engine, server = both
    texts = {name: (ROOT / "docs" / name).read_text()[2:2500].strip() for name in ("format.md", "structure.md")}
    (tmp_path / "texts").mkdir()
    for name, text in texts.items():
        (tmp_path / "texts" / name).write_text(text)
    assert "all 2 are registered" in warm(engine, server, "--document", tmp_path / "texts")
    tokens = {name: engine.tokens(text) for name, text in texts.items()}
    server.wait_for(lambda stats: stats["chunks_pending"] == 0)
    listed = json.loads(cachetier("documents", "--socket", server.socket, "--json"))
    assert [(each["document"], each["num_tokens"], each["host_chunks"]) for each in listed] == [
        (name, len(tokens[name]), len(tokens[name]) // CHUNK) for name in ("format.md", "structure.md")
    ]

    # In another order, at offsets that are no multiples of anything.
    prompt, offsets = engine.tokens("Read these and answer the question.", is_first=True), {}
    for name in ("structure.md", "format.md"):
        prompt += engine.tokens("\n\n")
        offsets[name] = len(prompt)
        prompt += tokens[name]
    prompt += engine.tokens("\n\nQuestion: what is a chunk?")
    before = server.peek()
    engine.complete(prompt=prompt, kv_transfer_params={"cachetier": {"blend": True}})
    after = server.wait_for(lambda stats: stats["requests"]["blended"] == before["requests"]["blended"] + 1)
    loads = {name: (offsets[name] + 16, offsets[name] + len(tokens[name]) // CHUNK * CHUNK) for name in texts}
    loaded = sum(end - start for start, end in loads.values())
    assert after["tokens"]["blend"]["loaded"] - before["tokens"]["blend"]["loaded"] == loaded

    (tmp_path / "prompt.jsonl").write_text(json.dumps({"token_ids": prompt}))
    explain = ("explain", "--url", engine.url, "--socket", server.socket)
    said = [" ".join(line.split()) for line in cachetier(*explain, tmp_path / "prompt.jsonl").splitlines()]
    assert "found 2 of 2 registered documents" in said
    for name, (start, end) in loads.items():
        assert f"{start:,} to {end:,} load document '{name}', from host memory" in said
    assert any(line.startswith(f"would load {loaded:,} of {len(prompt):,} tokens (0 exactly,") for line in said)


def test_a_document_that_was_glued_to_the_text_before_it_is_named_by_the_log_and_by_explain(both, tmp_path):
    engine, server = both
    text = (ROOT / "docs" / "goals.md").read_text()[2:2500].strip()
    (tmp_path / "goals.txt").write_text(text)
    warm(engine, server, "--document", tmp_path / "goals.txt")
    head, alone = "Read this: ", engine.tokens(text)
    glued = engine.tokens(head + text, is_first=True)
    at = next(n for n in range(len(glued)) if glued[n + 8 : n + 60] == alone[8:60])
    assert glued[at] != alone[0], "the tokenizer was expected to glue these"
    before = server.peek()["requests"]["blended"]
    engine.complete(prompt=head + text, kv_transfer_params={"cachetier": {"blend": True}})
    (tmp_path / "prompt.txt").write_text(head + text)
    said = cachetier("explain", "--url", engine.url, "--socket", server.socket, tmp_path / "prompt.txt")
    assert f"'{tmp_path / 'goals.txt'}' differs at token 1 (it would begin at the prompt's token {at})" in said
    assert "the tokenizer glued its first token to what stands before it" in said
    assert server.peek()["requests"]["blended"] == before
    assert "registered documents in request" in engine.log.read_text()
