"""Bearer tokens: which are refused as too weak, and what shows the right one."""

from pathlib import Path

import pytest

from cachetier.core.bearer import carries_token, read_token
from cachetier.core.errors import ConfigError

TOKEN = "0123456789abcdef-token"


def test_the_token_is_the_file_without_the_white_space_around_it(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"  {TOKEN}\n")
    assert read_token(str(tmp_path / "token")) == TOKEN


@pytest.mark.parametrize("content", [None, "", "short", "line\nbreak-line-break", "\xfc" * 20])
def test_unusable_token_file_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=str(path)):
        read_token(str(path))


@pytest.mark.parametrize(
    "header", ["", "Bearer", TOKEN, f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", f"Basic {TOKEN}", "\udcff"]
)
def test_only_the_whole_token_counts(header: str) -> None:
    assert carries_token(f"Bearer {TOKEN}", TOKEN)
    assert not carries_token(header, TOKEN)
