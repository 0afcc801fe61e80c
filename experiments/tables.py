"""Markdown tables, for the pages that the experiments write."""

from collections.abc import Sequence


def markdown(rows: Sequence[dict[str, object]]) -> str:
    """A table with a line for each of ``rows``, which all have the same keys."""
    lines = []
    for cells in (list(rows[0]), *(row.values() for row in rows)):
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])
