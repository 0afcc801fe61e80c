"""LoRA-Bridge: a sliced InstructBLIP that answers multiple-choice questions about pictures."""

import os
from pathlib import Path

__version__ = "0.1.0"

# The repository, or the folder that the package was installed into.
HOME = Path(__file__).resolve().parent.parent

IN_REPOSITORY = (HOME / "train.ipynb").is_file()

# Large tensors in large pages: loading a bundle waits for the system's page faults most of the
# time. torch reads this at its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


class InputError(ValueError):
    """Input that the user can mend. The message gives the fact, what was expected and the
    remedy."""

    # What the command line ends with.
    exit_code = 2

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the message alone, for no line of code is at fault."""
        return [f"InputError: {self}"]
