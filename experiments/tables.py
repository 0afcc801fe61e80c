"""Markdown tables, for the pages that the experiments write."""

from collections.abc import Sequence


def markdown(rows: Sequence[dict[str, object]]) -> str:
    """A table with a line for each of ``rows``, which all have the same keys."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    for row in rows:
        lines.append([str(cell) for cell in row.values()])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
