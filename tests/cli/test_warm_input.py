"""What can be a prompt becomes one, once and in order; what cannot is named and does not end the stream."""

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachetier.cli.warm_input import (
    CHAT_PATH,
    COMPLETIONS_PATH,
    PROMPTS,
    Prompt,
    Rejected,
    check_inputs,
    parse_line,
    read_inputs,
)
from cachetier.core.errors import ConfigError


def read_prompts(inputs: list[str]) -> Iterator[Prompt | Rejected]:
    return read_inputs(inputs, PROMPTS)


MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    ("line", "path", "body"),
    [
        ({"messages": MESSAGES}, CHAT_PATH, {"messages": MESSAGES}),
        ({"prompt": "Once"}, COMPLETIONS_PATH, {"prompt": "Once"}),
        ({"token_ids": [1, 2]}, COMPLETIONS_PATH, {"prompt": [1, 2]}),
        ({"prompt": "Once", "cache_salt": "s"}, COMPLETIONS_PATH, {"prompt": "Once", "cache_salt": "s"}),
    ],
)
def test_each_kind_of_line_becomes_the_request_that_the_engine_expects(line: dict, path: str, body: dict) -> None:
    assert parse_line(json.dumps(line).encode(), "f:1") == Prompt("f:1", path, body)


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("not json", "malformed"),
        ('{"prompt": "a", "token_ids": [1]}', "prompt and token_ids"),
        ("{}", "none"),
        ('{"cache_salt": "s"}', "none"),
        ('{"prompt": 7}', "str"),
        ('{"token_ids": ["a"]}', "int"),
        ('{"messages": MESSAGES, "tools": []}'.replace("MESSAGES", json.dumps(MESSAGES)), "tools"),
        ("[1, 2]", "object"),
        ('{"prompt": "\\ud800"}', ""),
    ],
)
def test_a_line_that_is_no_prompt_is_rejected_with_the_reason(line: str, word: str) -> None:
    rejected = parse_line(line.encode(), "f:9")
    assert isinstance(rejected, Rejected)
    assert not rejected.is_empty
    assert word in rejected.reason


@given(st.binary(max_size=200))
def test_no_bytes_make_the_parser_fail(line: bytes) -> None:
    assert isinstance(parse_line(line, "f:1"), Prompt | Rejected)


@pytest.mark.parametrize("line", ['{"prompt": ""}', '{"token_ids": []}', '{"messages": []}'])
def test_an_empty_prompt_is_no_failure(line: str) -> None:
    assert parse_line(line.encode(), "f:1") == Rejected("f:1", f"{next(iter(json.loads(line)))} is empty", True)


def test_a_folder_gives_its_texts_in_order_and_nothing_else(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "c.py", "sub/d.txt", "sub/deeper/e.md", "sub/again/f.md", "sub/zoo/g.md", "x.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    texts = [item.body["prompt"] for item in read_prompts([str(tmp_path)])]  # type: ignore[union-attr]
    assert texts == ["a.md", "b.txt", "sub/d.txt", "sub/again/f.md", "sub/deeper/e.md", "sub/zoo/g.md"]


def test_files_count_lines_skip_blank_ones_and_go_on_after_a_bad_one(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_bytes(b'{"prompt": "a"}\n\n  \nrubbish\n{"prompt": "b"}')
    items = list(read_prompts([str(file)]))
    assert [item.source for item in items] == [f"{file}:1", f"{file}:4", f"{file}:5"]
    assert [type(item) for item in items] == [Prompt, Rejected, Prompt]


def test_a_file_that_cannot_be_read_as_text_is_rejected_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "b.txt").write_text("good")
    (tmp_path / "c.txt").write_text("")
    bad, good, empty = read_prompts([str(tmp_path)])
    assert isinstance(bad, Rejected)
    assert not bad.is_empty
    assert isinstance(good, Prompt)
    assert isinstance(empty, Rejected)
    assert empty.is_empty


def test_a_folder_without_texts_is_a_failure(tmp_path: Path) -> None:
    (item,) = read_prompts([str(tmp_path)])
    assert isinstance(item, Rejected)
    assert "*.md" in item.reason


def test_a_file_is_read_no_further_than_its_prompts_are_taken(tmp_path: Path) -> None:
    fifo = tmp_path / "endless.jsonl"
    os.mkfifo(fifo)
    writer = os.open(fifo, os.O_RDWR)  # keeps the pipe open: reading to its end would never return
    os.write(writer, b'{"prompt": "a"}\n{"prompt": "b"}\n')
    taken = list(itertools.islice(read_prompts([str(fifo)]), 2))
    os.close(writer)
    assert [item.body["prompt"] for item in taken] == ["a", "b"]  # type: ignore[union-attr]


def test_inputs_that_do_not_exist_are_refused_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        check_inputs([str(tmp_path), str(tmp_path / "missing")])
    with pytest.raises(ConfigError, match="only once"):
        check_inputs(["-", "-"])


def test_a_digest_depends_on_what_is_sent_and_not_on_where_it_was_read() -> None:
    prompt = Prompt("a:1", COMPLETIONS_PATH, {"prompt": "x", "cache_salt": "s"})
    same = Prompt("b:7", COMPLETIONS_PATH, {"cache_salt": "s", "prompt": "x"})
    assert prompt.digest("m") == same.digest("m")
    others = [
        Prompt("a:1", COMPLETIONS_PATH, {"prompt": "y", "cache_salt": "s"}),
        Prompt("a:1", COMPLETIONS_PATH, {"prompt": "x", "cache_salt": "t"}),
        Prompt("a:1", COMPLETIONS_PATH, {"prompt": "x"}),
        Prompt("a:1", CHAT_PATH, {"prompt": "x", "cache_salt": "s"}),
    ]
    assert len({prompt.digest("m"), prompt.digest("other"), *(other.digest("m") for other in others)}) == 6
