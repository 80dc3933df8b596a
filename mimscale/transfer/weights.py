"""Starting weights: the encoder of a run or a file, exactly, or an error that lists what does not fit.

Dropped by name, because a task has none of them: decoders, the mask token, the optimizer's moments, and the head (and the
pooling norm that belongs to it) of whatever the source was trained for. New by name: the task's own head. Anything else
that is missing or left over is an error.

SwinV2's position bias is a function of coordinates, evaluated anew for a window of another size, so weights move from 192 px
and window 12 to 224 px and window 14 as they are; the encoder only has to know which window they were trained in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimscale.models import create_encoder
from mimscale.models.fitting import windows_at
from mimscale.models.swin_v2 import SwinTransformerV2
from mimscale.models.vit import VisionTransformer
from mimscale.models.weights.export import exported_settings
from mimscale.models.weights.released import match_checkpoint, read_checkpoint, released_names
from mimscale.training.checkpoint import CheckpointError
from mimscale.training.recipe import RecipeError
from mimscale.transfer.load import is_run, load_run
from mimscale.transfer.recipe import FinetuneRecipe, TransferModel

HEADS = ("head.", "fc_norm.")


def make_encoder(recipe: FinetuneRecipe, image_size: int, num_classes: int = 0, pad_windows: bool = False) -> Any:
    """The recipe's encoder, without a mask token.

    Args:
        recipe: its ``model`` section.
        image_size: side of the training images, pixels.
        num_classes: outputs of the classifier; 0 for none.
        pad_windows: SwinV2: pad maps that the window does not divide, for images of any size.

    Raises:
        RecipeError: the sizes do not fit together; the message says what would.
    """
    model = recipe.model
    settings: dict[str, Any] = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in model.model_dump(include={"embed_dim", "depths", "num_heads", "depth"}).items()
        if value is not None
    }
    if model.name.startswith("swin"):
        settings |= {
            "img_size": image_size,
            "window_size": model.window_size,
            "pretrained_window_size": _pretrained_windows(model),
            "mask_token": False,
            "extra_norm_every": model.extra_norm_every,
            "pad_windows": pad_windows,
        }
    else:
        settings["img_size"] = model.pretrained_image_size or image_size
    try:
        return create_encoder(model.name, drop_path=model.drop_path, num_classes=num_classes, **settings)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"model in the recipe: {error}") from None


def task_encoder(recipe: Any, num_classes: int = 0) -> Any:
    """The encoder that a recipe's task trains, at the size of its training images; see :func:`make_encoder`."""
    return make_encoder(recipe, recipe.data.image_size, num_classes, recipe.pad_windows)


def _pretrained_windows(model: TransferModel) -> int | tuple[int, ...]:
    """The window of each stage at pre-training, which the task's own maps do not tell; 0 for the task's own.

    Raises:
        RecipeError: one window, but not for which images.
    """
    window = model.pretrained_window_size
    if not isinstance(window, int) or not window:
        return window
    if model.pretrained_image_size is None:
        raise RecipeError(
            f"model.pretrained_window_size={window} takes model.pretrained_image_size, the side of the images that it was "
            f"pre-trained on (192 in the paper): windows were clipped to the maps of those images"
        )
    return windows_at(model.pretrained_image_size, window)


def encoder_weights(source: str, encoder: Any) -> Callable[[str], Tensor | None]:
    """Weights for every parameter of ``encoder`` but its head.

    Args:
        source: RUN, RUN@STEP or FILE.
        encoder: as :func:`make_encoder` makes it; may be on the meta device.

    Returns:
        Parameter name of the encoder to its weight on the CPU, read when it is asked for; ``None`` for the head's.

    Raises:
        CheckpointError: the run has no such checkpoint, or it is damaged; or it was trained at another size.
        RecipeError: there is no such run or file, or it is no file of weights.
        CheckpointMismatch: listing all that is missing or left over.
    """
    if not is_run(source):
        if not Path(source).is_file():
            raise RecipeError(f"finetune.from={source}: there is no such run or file")
        try:
            stored = read_checkpoint(source)
        except ValueError as error:
            raise RecipeError(f"finetune.from: {error}") from None
        matched = _match(encoder, released_names(stored), source)
        exported = exported_settings(source)
        if exported is not None:
            with torch.device("meta"):
                _check_sizes(source, create_encoder(**exported), encoder)
        elif (windows := _stored_windows(stored)) is not None:
            _check_windows(source, windows, encoder)
        return matched.get
    run = load_run(source)
    checkpoint, prefix = run.checkpoint, run.prefix
    _check_sizes(str(checkpoint.path), run.meta_module.encoder, encoder)
    shapes = {
        name.removeprefix(prefix): torch.empty(shape, device="meta")
        for name, shape in checkpoint.manifest["shapes"].items()
        if name.startswith(prefix)
    }
    wanted = _match(encoder, shapes, str(checkpoint.path))
    return lambda name: checkpoint.trained(prefix + name) if name in wanted else None


def _match(encoder: Any, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Pair the encoder's parameters with stored ones, all heads left out."""
    bare = {name: value for name, value in state.items() if not name.removeprefix("encoder.").startswith(HEADS)}
    return match_checkpoint(encoder, bare, source)


def _check_sizes(source: str, before: Any, encoder: Any) -> None:
    """Compare the sizes that weights were trained at, which no shape shows, with what ``encoder`` takes them for.

    Args:
        source: of the weights, for the error.
        before: the encoder that they were trained in.
        encoder: the task's.

    Raises:
        CheckpointError: positions would be evaluated as if they had been trained at another size.
    """
    if isinstance(before, SwinTransformerV2) and isinstance(encoder, SwinTransformerV2):
        _check_windows(source, [rows for rows, _ in before.references], encoder)
        return
    both_vit = isinstance(before, VisionTransformer) and isinstance(encoder, VisionTransformer)
    if both_vit and before.img_size != encoder.img_size:
        raise CheckpointError(
            f"{source} was trained on images of {before.img_size[0]} px, but the recipe has it of "
            f"{encoder.img_size[0]}: set model.pretrained_image_size={before.img_size[0]}"
        )


def _check_windows(source: str, trained: list[int], encoder: Any) -> None:
    taken = [rows for rows, _ in encoder.references]
    if trained != taken:
        raise CheckpointError(
            f"{source} was trained in windows of {trained}, but the recipe has it of {taken}: set "
            f"model.pretrained_window_size={trained}"
        )


def _stored_windows(state: Mapping[str, Tensor]) -> list[int] | None:
    """The windows that the tables of a released SwinV2 were made for, one for each stage; ``None`` where none are stored.

    A table's last entry is that of the largest offset, w - 1: log2(1 + 8 (w - 1) / (r - 1)) / 3 for a bias that was trained
    in windows of r.
    """
    windows = []
    for name, table in sorted(state.items()):
        if name.endswith(".blocks.0.attn.relative_coords_table"):
            reach = 2 ** (3 * float(table.flatten()[-1])) - 1
            if reach <= 0:
                return None
            windows.append(1 + round(8 * ((table.shape[1] + 1) // 2 - 1) / reach))
    return windows or None
