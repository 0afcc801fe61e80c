"""What was asked and what was measured: the rows that the long checks show and keep."""

from collections.abc import Sequence
from typing import NamedTuple

VERDICTS = {True: "ok", False: "FAIL", None: ""}


class Row(NamedTuple):
    """One thing that was asked and measured."""

    what: str
    asked: str
    measured: str
    ok: bool | None = None
    """None where nothing is asked, or nothing could be run."""

    def shown(self) -> dict[str, str]:
        """The row as texts, by column."""
        texts = self._asdict() | {"verdict": VERDICTS[self.ok]}
        del texts["ok"]
        return texts


def at_least(what: str, bound: float, value: float, form: str = ".2f") -> Row:
    return Row(what, f"at least {bound}", format(value, form), value >= bound)


def at_most(what: str, bound: float, value: float, form: str = ".2f") -> Row:
    return Row(what, f"at most {bound}", format(value, form), value <= bound)


def markdown(rows: Sequence[dict[str, object]]) -> str:
    """A table with a line for each of ``rows``, which all have the same keys."""
    lines = [f"| {' | '.join(rows[0])} |", f"|{'---|' * len(rows[0])}"]
    for row in rows:
        lines.append(f"| {' | '.join(map(str, row.values()))} |")
    return "\n".join(lines)
