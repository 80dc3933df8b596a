"""What ends a training: errors whose message is what the user sees."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or used; the message names it and what to do."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the step, the cause and what to do.

    Attributes:
        ranks: where the cause lies, as far as that is known.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()):
        super().__init__(message)
        self.ranks = ranks


class CorruptedUpdateError(TrainingError):
    """An update went wrong after it had reached the weights."""


class RankLocalError(RuntimeError):
    """Something that happened to this rank alone, so that this rank has to say it."""
