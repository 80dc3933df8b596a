"""The two ways in which data can be wrong: a whole data set, or one sample of it."""

from mimscale.wording import escaped


class ShardError(ValueError):
    """A data set that cannot be used as it stands; the message names the file and what to do.

    Names of files and keys in it are other people's: what no terminal should get is escaped.
    """

    def __init__(self, message: str):
        super().__init__(escaped(message))


class DamagedSample(ValueError):
    """One sample that cannot be used: reading continues with another.

    Attributes:
        reason: what was wrong, in one line, escaped as in :class:`ShardError`.
    """

    def __init__(self, reason: str):
        self.reason = escaped(reason).replace("\n", "\\n")
        super().__init__(self.reason)
