"""How long and how fast to train."""

from dataclasses import dataclass

# For sixty questions: more passes, a gentler start, more pictures to measure on.
FEW = {
    "epochs": 8,
    "batch_size": 8,
    "warmup": 0.1,
    "label_smoothing": 0.1,
    "validation_fraction": 0.2,
}

NOT_THE_RESULT = ("workers", "save_minutes")  # settings that a resumed run may change


@dataclass(frozen=True)
class TrainSettings:
    """How long and how fast to train. The defaults suit a few thousand questions;
    ``choose(few=True)`` sixty."""

    epochs: int = 1
    """Passes over the training questions; each writes a weights file."""
    batch_size: int = 16
    """Questions a step on one device."""
    accumulation: int = 1
    """Steps whose gradients are added before the weights move."""
    learning_rate: float = 2e-4
    """Peak rate of the adapters."""
    head_learning_rate: float = 2e-4
    """Peak rate of the head, which starts from good rows and needs no more."""
    weight_decay: float = 0.01
    warmup: float = 0.05
    """Share of all steps in which the rate rises to its peak; then it falls along a cosine."""
    clip: float = 1.0
    """Longest gradient that moves the weights; longer ones are scaled down."""
    shuffle_choices: bool = True
    """Show the choices in a fresh order in every epoch, so that no letter is learned by heart."""
    label_smoothing: float = 0.05
    """Share of the target spread over all choices: keeps the probabilities honest on few
    questions."""
    average: float = 0.05
    """Share of all steps that the moving average of the weights looks back; 0 takes the last
    weights as they are."""
    patience: int = 0
    """Epochs without a better validation accuracy after which training stops; 0 never stops
    early."""
    validation_fraction: float = 0.1
    """Share of the distinct pictures whose questions are only for measuring."""
    seed: int = 0
    deterministic: bool = False
    """Use only operations that give the same bits each time, even where a GPU has quicker ones."""
    workers: int = 0
    """Processes that load pictures beside the training one."""
    save_minutes: float = 5.0
    """Time between two saved states, the most that a disconnect costs."""

    @classmethod
    def choose(cls, few: bool = False, **changes) -> "TrainSettings":
        """The defaults or, if ``few``, the profile for some sixty questions; a change that is None
        changes nothing."""
        profile = FEW if few else {}
        return cls(
            **profile | {name: value for name, value in changes.items() if value is not None}
        )
