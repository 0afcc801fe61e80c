"""Orders of the choices: every cyclic one, and asking in them."""

from collections.abc import Callable, Sequence

import numpy as np

from bridgeblip.data.questions import Question


def ask_in_orders(
    questions: Sequence[Question],
    single: np.ndarray,
    rows: Sequence[int],
    ask: Callable[[Sequence[int], Sequence[Question]], np.ndarray],
) -> list[list[np.ndarray]]:
    """Return the probabilities (choices,) that each question was given: as written, and ``rows`` in
    every cyclic order of their choices, too, put back to the choices as written.

    Args:
        single: probabilities (questions, choices), asked as written.
        ask: gives the probabilities of rows whose choices stand in another order, shown beside
            them.
    """
    turns = [(row, turn) for row in rows for turn in cyclic_orders(questions[row].choices)[1:]]
    views = [[probabilities] for probabilities in single]
    if not turns:
        return views
    scores = ask([row for row, _ in turns], [questions[row].reordered(turn) for row, turn in turns])
    for (row, turn), seen in zip(turns, scores, strict=True):
        view = seen.copy()
        view[list(turn.values())] = seen[list(turn.keys())]
        views[row].append(view)
    return views


def cyclic_orders(choices: Sequence[str]) -> list[dict[int, int]]:
    """Return every cyclic order of the filled choices, the one as written first, as ``reordered``
    takes it."""
    filled = [i for i, choice in enumerate(choices) if choice]
    return [
        dict(zip(filled, filled[shift:] + filled[:shift], strict=True))
        for shift in range(max(1, len(filled)))
    ]
