"""The two ways in which data can be wrong: a whole data set, or one sample of it."""


class ShardError(ValueError):
    """A data set that cannot be used as it stands; the message names the file and what to do."""


class DamagedSample(ValueError):
    """One sample that cannot be used: reading continues with another.

    Attributes:
        reason: what was wrong, in one line.
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason
