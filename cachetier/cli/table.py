"""Tables for people."""

from collections.abc import Sequence


def as_table(rows: Sequence[Sequence[str]], num_text_columns: int) -> str:
    """Return `rows`, the first of which are headings, in columns; but for the first ones they are aligned right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(_aligned(row, widths, num_text_columns)).rstrip() for row in rows)


def _aligned(row: Sequence[str], widths: Sequence[int], num_text_columns: int) -> list[str]:
    return [
        text.ljust(width) if column < num_text_columns else text.rjust(width)
        for column, (text, width) in enumerate(zip(row, widths, strict=True))
    ]
