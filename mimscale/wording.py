"""Numbers in messages."""

from __future__ import annotations


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun: 1 image, 2,000 images, 1 batch, 2 batches.

    Args:
        number: of them.
        noun: of one.
        plural: of several; by default the noun with an s, or es after ch, sh, s and x.
    """
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {plural or noun + ('es' if noun.endswith(('ch', 'sh', 's', 'x')) else 's')}"
