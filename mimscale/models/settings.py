"""What a recipe says of an encoder: its ``model`` section, one class for each family, without torch."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

from pydantic import Field

from mimscale.models.sizes import SWIN_SIZES, VIT_SIZES
from mimscale.schema import Decay, Section, Side, Width, key

# Blocks of a stage and of all, heads of a block, and the side of its windows.
BLOCKS = 256
Blocks = Annotated[int, Field(gt=0, le=BLOCKS)]
# Entries of the masks of one stage: one for every pair of tokens of every window.
MASKS = 2**26
Heads = Annotated[int, Field(gt=0, le=1024)]
Stages = Field(min_length=1, max_length=8)
Window = Annotated[int, Field(gt=0, le=128)]
TrainedWindow = Annotated[int, Field(ge=0, le=128)]


class EncoderSettings(Section):
    """Keys of every encoder; a family derives its own from this and gives it to its class as ``Settings``."""

    # The section of a fine-tuning recipe, where it is not this one.
    transfer: ClassVar[type[EncoderSettings] | None] = None
    # Keys that change the shapes of parameters: what is fine-tuned from a pre-training has the same.
    shape_keys: ClassVar[tuple[str, ...]] = ()
    # How the paper pre-trains the family, as sections of a recipe, where that is not the default.
    paper: ClassVar[dict[str, dict[str, Any]]] = {}

    name: str = key(..., "Which encoder, and of what size.")
    drop_path: Decay = key(
        0.1,
        "Drop rate of the last block's residual branches; rates rise linearly from 0 at the first.",
        "released code",
    )

    @property
    def patch(self) -> int:
        """Side in pixels of what becomes one token first: masks are made of whole patches.

        Raises:
            NotImplementedError: a family that does not say.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say its encoder's patch")

    @property
    def pyramid(self) -> list[int]:
        """Channels of each map of a feature pyramid, strides 4, 8, 16, ...; empty where all maps have one stride."""
        return []

    @property
    def architecture(self) -> dict[str, Any]:
        """The encoder's columns in Table 1: base_channels, depth, heads, window; empty for another kind of encoder."""
        return {}

    def arguments(self, image_size: int, any_size: bool = False) -> dict[str, Any]:
        """What its constructor takes, by name.

        Args:
            image_size: side of the training images, pixels.
            any_size: images of other sizes come too, as in detection.

        Raises:
            ValueError: keys that do not go together.
        """
        given = {name: getattr(self, name) for name in self.shape_keys}
        sizes = {n: list(v) if isinstance(v, tuple) else v for n, v in given.items() if v is not None}
        return {"img_size": image_size, "drop_path": self.drop_path, **sizes}


class SwinSettings(EncoderSettings):
    """A SwinV2 (Table 1); ``null`` takes the named size's own value."""

    shape_keys = ("embed_dim", "depths", "num_heads")

    window_size: Window = key(12, "Side of the attention's windows, in tokens.", "section 3.4")
    pretrained_window_size: TrainedWindow | tuple[TrainedWindow, TrainedWindow, TrainedWindow, TrainedWindow] = key(
        0, "Window at pre-training, where that differed: one number, or one for each stage; 0: the same."
    )
    embed_dim: Width | None = key(None, "Channels of the first stage; null: the named size's.", "Table 1")
    depths: Annotated[tuple[Blocks, ...], Stages] | None = key(
        None, "Blocks of each stage; null: the named size's.", "Table 1"
    )
    num_heads: Annotated[tuple[Heads, ...], Stages] | None = key(
        None, "Attention heads of each stage; null: the named size's.", "Table 1"
    )

    @property
    def patch(self) -> int:
        """SwinV2's patches have 4 pixels a side."""
        return 4

    @property
    def pyramid(self) -> list[int]:
        """Each stage has twice the channels of the one before."""
        size = SWIN_SIZES.get(self.name)
        depths = self.depths or (size.depths if size else ())
        return [(self.embed_dim or (size.embed_dim if size else 0)) * 2**stage for stage in range(len(depths))]

    @property
    def architecture(self) -> dict[str, Any]:
        """Table 1's columns."""
        size = SWIN_SIZES[self.name]
        return {
            "base_channels": self.embed_dim or size.embed_dim,
            "depth": "-".join(map(str, self.depths or size.depths)),
            "heads": "-".join(map(str, self.num_heads or size.num_heads)),
            "window": self.window_size,
        }

    def arguments(self, image_size: int, any_size: bool = False) -> dict[str, Any]:
        """See :meth:`EncoderSettings.arguments`."""
        side = max(1, image_size // self.patch)
        window = min(self.window_size, side)
        if (side * window) ** 2 > MASKS:
            raise ValueError(
                f"model.window_size={self.window_size} with images of {image_size} pixels takes masks of attention of "
                f"{(side * window) ** 2 / 2**30:.2g} GiB in each stage; take a window of at most {math.isqrt(MASKS) // side}"
            )
        if self.depths and sum(self.depths) > BLOCKS:
            raise ValueError(
                f"model.depths={list(self.depths)} are {sum(self.depths)} blocks, more than {BLOCKS} in all"
            )
        windows = {"window_size": self.window_size, "pretrained_window_size": self.pretrained_window_size}
        return super().arguments(image_size) | windows


class SwinTransferSettings(SwinSettings):
    """A SwinV2 at a task's size.

    Its position bias was trained in windows of ``pretrained_window_size``, clipped to the maps of images of
    ``pretrained_image_size``; four numbers give the windows of the stages themselves, 0 the task's own.
    """

    window_size: Window = key(14, "Side of the attention's windows, in tokens.", "section 3.5")
    pretrained_image_size: Side | None = key(
        None, "Side of the images that the weights were pre-trained on, pixels; goes with one pretrained_window_size."
    )
    extra_norm_every: Annotated[int, Field(ge=0, le=256)] = key(
        0, "One more norm after every so many blocks, as some released weights have; 0: none.", "released code"
    )

    def arguments(self, image_size: int, any_size: bool = False) -> dict[str, Any]:
        """See :meth:`EncoderSettings.arguments`."""
        return super().arguments(image_size) | {
            "pretrained_window_size": self._trained_windows(),
            "extra_norm_every": self.extra_norm_every,
            "pad_windows": any_size,
        }

    def _trained_windows(self) -> int | tuple[int, ...]:
        """The window of each stage at pre-training, which the task's own maps do not tell; 0 for the task's own."""
        window = self.pretrained_window_size
        if not isinstance(window, int) or not window:
            return window
        if self.pretrained_image_size is None:
            raise ValueError(
                f"model.pretrained_window_size={window} takes model.pretrained_image_size, the side of the images that it "
                f"was pre-trained on (192 in the paper): windows were clipped to the maps of those images"
            )
        from mimscale.models.fitting import windows_at

        return windows_at(self.pretrained_image_size, window)


class VitSettings(EncoderSettings):
    """A ViT of MAE's; ``null`` takes the named size's own value."""

    shape_keys = ("embed_dim", "depth", "num_heads")
    paper: ClassVar[dict[str, dict[str, Any]]] = {"mim": {"objective": "mae"}, "data": {"image_size": 224}}

    embed_dim: Width | None = key(None, "Channels; null: the named size's.", "MAE")
    depth: Blocks | None = key(None, "Blocks; null: the named size's.", "MAE")
    num_heads: Heads | None = key(None, "Attention heads of every block; null: the named size's.", "MAE")

    @property
    def patch(self) -> int:
        """16 pixels a side, 14 for ViT-H."""
        return VIT_SIZES[self.name].patch_size


class VitTransferSettings(VitSettings):
    """A ViT at a task's size."""

    pretrained_image_size: Side | None = key(
        None, "Side of the images that its positions were trained at, pixels; null: the task's own."
    )
    learned_positions: bool = key(
        False,
        "Train the positions, as MAE's fine-tuning does; they start at the source's, or else at the fixed sine-cosine ones.",
    )

    def arguments(self, image_size: int, any_size: bool = False) -> dict[str, Any]:
        """See :meth:`EncoderSettings.arguments`."""
        learned = {"learned_positions": True} if self.learned_positions else {}
        return super().arguments(self.pretrained_image_size or image_size) | learned


SwinSettings.transfer, VitSettings.transfer = SwinTransferSettings, VitTransferSettings
