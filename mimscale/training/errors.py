"""What ends a training: errors whose message is what the user sees."""


class TrainingError(RuntimeError):
    """Training cannot continue; the message names the step, the cause and what to do."""


class CorruptedUpdateError(TrainingError):
    """An update went wrong after it had reached the weights."""


class RankLocalError(RuntimeError):
    """Something that happened to this rank alone, so that this rank has to report it."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or used; the message names it and what to do."""
