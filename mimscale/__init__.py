"""mimscale: masked image modelling at scale, on DeepSpeed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from mimscale.models.encoder import Encoder
    from mimscale.transfer.load import Transform

__version__ = "0.1.0"


def load(source: str | Path, **overrides: Any) -> Encoder:
    """The encoder of a run, or of a file that ``mimscale export RUN --to safetensors`` wrote.

    Args:
        source: RUN or RUN@STEP, of a pre-training or a fine-tuning, or FILE.
        **overrides: of the encoder's settings, as in ``mimscale.models.create_encoder``: ``num_classes=1000`` to fine-tune
            (the number that it was fine-tuned with brings its classifier), ``img_size=224, window_size=14,
            pretrained_window_size=12`` for larger images.

    Returns:
        The encoder in eval mode: ``encoder(images)`` gives pooled features, ``encoder(images, output="map")`` a map.

    Raises:
        ValueError: no such run or file, a damaged one, or overrides that its weights do not fit.
    """
    from mimscale.transfer.load import load_encoder

    return load_encoder(source, **overrides)


def transform(encoder: Encoder) -> Transform:
    """What makes images for ``encoder`` of pictures: Pillow's, or uint8 (height, width, 3).

    It resizes, cuts the centre and normalises as the run or file says that the encoder was loaded from: a picture becomes
    (3, S, S) in fp32, a list of N of them (N, 3, S, S).
    """
    from mimscale.transfer.load import Transform

    return Transform(encoder)
