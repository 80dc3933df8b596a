"""The two ways in which data can be wrong: a whole data set, or one sample of it."""

from mimscale.wording import Escaped, escaped


class ShardError(Escaped, ValueError):
    """A data set that cannot be used as it stands; the message names the file and what to do."""


class DamagedSample(ValueError):
    """One sample that cannot be used: reading continues with another.

    Attributes:
        reason: what was wrong, in one line, escaped.
    """

    def __init__(self, reason: str):
        self.reason = escaped(reason).replace("\n", "\\n")
        super().__init__(self.reason)
