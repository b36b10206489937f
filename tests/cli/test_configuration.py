"""docs/configuration.md lists exactly the settings that there are, with their defaults and texts."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from cachetier.core.config import ConnectorConfig, ServerConfig
from cachetier.core.units import format_bytes

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def table_of(kind: Any) -> str:
    """Return the Markdown table of the settings of `kind`, as it has to stand in the page."""
    rows = ["| setting | default | meaning |", "| --- | --- | --- |"]
    for field in dataclasses.fields(kind):
        is_size = field.metadata.get("size") and field.default
        default = format_bytes(field.default) if is_size else field.default
        rows.append(f"| `{field.name}` | {default or ''} | {field.metadata['help']} |")
    return "\n".join(rows)


@pytest.mark.parametrize("kind", [ServerConfig, ConnectorConfig])
def test_page_has_the_table_of_all_settings(kind: Any) -> None:
    assert table_of(kind) in PAGE.read_text(), f"put this into {PAGE.name}:\n{table_of(kind)}"


def test_page_names_no_other_settings() -> None:
    rows = [line.split("`")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert rows == [field.name for kind in (ServerConfig, ConnectorConfig) for field in dataclasses.fields(kind)]
