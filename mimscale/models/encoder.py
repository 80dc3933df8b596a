"""What an encoder is: the contract that SwinV2 and ViT keep, and that an encoder of anyone's package keeps.

An encoder speaks timm's dialect (``no_weight_decay``, ``group_matcher``, ``set_grad_checkpointing``, ``feature_info``), takes
images of its ``img_size`` at least, and hides what is masked from itself: by a mask token (``mask_token``), or by encoding the
visible patches alone (``takes_visible``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mimscale.models.recompute import Checkpoint
from mimscale.models.settings import EncoderSettings

SET_LATER = ("made_from", "preprocessing")


class Part(NamedTuple):
    """One tensor of a file: its name there, and where it comes from.

    Attributes:
        name: in the file.
        source: name of a parameter of the model, or the tensor itself.
        rows: the rows of the parameter that are meant; None for all.
    """

    name: str
    source: str | Tensor
    rows: slice | None = None


class Form(Protocol):
    """A format of another library, in which weights of a family of encoders can be written."""

    def parts(self, model: Any, names: list[str]) -> list[Part]:
        """The tensors of the file.

        Args:
            model: the objective, with its ``encoder``.
            names: of its parameters.

        Raises:
            ValueError: the format has no counterpart for this model.
        """

    def config(self, model: Any) -> dict[str, Any] | None:
        """What is written to ``config.json`` beside the weights, in a folder; ``None`` for a file of weights alone."""

    def usage(self, output: Path, encoder: Any) -> str:
        """A line of Python that uses what was written."""


class Encoder(nn.Module, ABC):
    """Images to features.

    The constructor takes, by name, what ``Settings.arguments`` gives, and ``img_size``, ``drop_path``, ``num_classes`` (0 for
    no classifier), ``in_chans`` and ``mask_token`` (whether it owns one). Parameters set their own starting values in the
    constructors of the modules that own them: ZeRO-3 partitions a module when its constructor returns, and what is written
    later is lost. Blocks are named ``...blocks.N...``, the classifier ``head``.

    Attributes:
        Settings: the ``model`` section of recipes that name it.
        sizes: arguments of the constructor by registered name, where one class has several names.
        exports: formats beside safetensors, by name.
        takes_visible: whether ``forward`` takes ``visible``.
        img_size: height and width of the images it is made for, pixels.
        in_chans: channels of the images.
        patch_size: side of what becomes one token first, pixels; masks are made of whole patches.
        stride: pixels of the image that a feature of the last map stands for, a side.
        num_features: channels of the last map.
        num_classes: outputs of the classifier; 0 for none.
        feature_info: for every map of the pyramid its channels (``num_chs``) and stride (``reduction``).
        mask_token: what stands for masked patches; ``None`` without.
        blocks: what can be recomputed and compiled, one after the other.
        made_from: the arguments of ``create_encoder`` that make it again, set by that.
        preprocessing: how the images of its run or file are made, set where that is known.
    """

    Settings: ClassVar[type[EncoderSettings]]
    sizes: ClassVar[Mapping[str, Any]] = {}
    exports: ClassVar[Mapping[str, Form]] = {}
    takes_visible: ClassVar[bool] = False

    img_size: tuple[int, int]
    in_chans: int
    patch_size: int
    stride: int
    num_features: int
    num_classes: int
    feature_info: list[dict[str, Any]]
    mask_token: nn.Parameter | None
    made_from: dict[str, Any]
    preprocessing: Any

    @abstractmethod
    def forward(self, images: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: D417
        """Run the encoder; every use goes through here, so that ZeRO-3 gathers the parameters it owns.

        ``forward(images, mask=None, draw_keys=None, output="logits")``, with ``visible=None`` instead of ``mask`` or beside it
        where ``takes_visible``.

        Args:
            images: (B, in_chans, H, W), normalised, any floating dtype whatever the weights'; H and W multiples of the patch.
            mask: (B, h, w) bool, True where the mask token replaces what is in that cell of the image; cells are whole patches.
            draw_keys: (B,) int64 that everything drawn at random derives from, so that a sample is treated alike on any rank;
                None draws from torch's generator.
            output: "logits" (B, num_classes), or pooled features (B, num_features) where there is no classifier; "map" (B,
                num_features, H/stride, W/stride) after the final norm; "pyramid" a list of maps, as ``feature_info`` says;
                where ``takes_visible``, "tokens" (B, 1 + K, num_features).
            visible: (B, K) int64, the patches that are encoded, counted row by row; None for all.

        Returns:
            As ``output`` says.

        Raises:
            ValueError: an image, mask or output that it does not take.
        """

    @abstractmethod
    def no_weight_decay(self) -> set[str]:
        """Name the parameters with more than one dimension that weight decay leaves alone."""

    @abstractmethod
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group parameters into layers, as timm does: "stem", then "blocks"; what neither matches is the last layer."""

    @abstractmethod
    def set_grad_checkpointing(
        self,
        enable: bool = True,
        every: int = 1,
        attention_only: bool = False,
        checkpoint_fn: Checkpoint | None = None,
    ) -> None:
        """Recompute blocks in the backward pass instead of storing their activations.

        Args:
            enable: False stores everything.
            every: recompute every k-th block only.
            attention_only: recompute only the attention branch of those blocks, where they have one.
            checkpoint_fn: called as ``checkpoint_fn(function, *tensors)``; by default torch's, run to the end.

        Raises:
            ValueError: ``every`` below 1.
        """

    @property
    def trained_at(self) -> dict[str, Any]:
        """At which size positions are taken to have been trained, which no shape shows: as keys of the ``model`` section."""
        return {}

    def compile_blocks(self, **options: Any) -> None:
        """Compile every block by itself (``torch.compile``): minutes at the first step, faster after it."""
        for block in self.blocks:  # type: ignore[union-attr]
            block.compile(**{"dynamic": False, **options})

    def check(self) -> None:
        """Raise unless the constructor has set every attribute.

        Raises:
            ValueError: naming those that are missing.
        """
        wanted = [n for n in Encoder.__annotations__ if n not in SET_LATER and not hasattr(self, n)]
        wanted += [] if hasattr(self, "blocks") else ["blocks"]
        if wanted:
            raise ValueError(f"{type(self).__qualname__} does not set {', '.join(wanted)}; see mimscale.models.Encoder")


def as_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Turn tokens (B, h * w, C), row by row, into a map (B, C, h, w)."""
    return tokens.transpose(1, 2).reshape(len(tokens), -1, *size)


def spread_mask(mask: Tensor, grid: tuple[int, int], images: torch.Size) -> Tensor:
    """Give every token the mask of the cell that it lies in.

    Args:
        mask: (B, h, w), True = masked.
        grid: rows and columns of tokens.
        images: shape of the images, for the error.

    Returns:
        (B, rows, columns) bool.

    Raises:
        ValueError: cells that are not the same whole number of tokens in each direction.
    """
    cells = zip(grid, mask.shape[1:], strict=False)
    rows, columns = (side // count if count and not side % count else 0 for side, count in cells)
    if mask.ndim != 3 or len(mask) != images[0] or not rows or rows != columns:
        raise ValueError(
            f"mask must be (B, h, w) with h and w dividing the {grid[0]} x {grid[1]} patches of images {tuple(images)} alike, "
            f"not {tuple(mask.shape)}"
        )
    return mask.bool().repeat_interleave(rows, 1).repeat_interleave(columns, 2)
