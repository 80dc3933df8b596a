"""Starting weights: the encoder of a run or a file, exactly, or an error that lists what does not fit.

Dropped by name, because a task has none of them: decoders, the mask token, the optimizer's moments, and the head (and the
pooling norm that belongs to it) of whatever the source was trained for. New by name: the task's own head. Anything else
that is missing or left over is an error.

A ViT's positions are learned (``model.learned_positions``) from the source's, or from the fixed ones.

SwinV2's position bias is a function of coordinates, evaluated anew for a window of another size, so weights move from 192 px
and window 12 to 224 px and window 14 as they are; the encoder only has to know which window they were trained in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimscale.models import Encoder, create_encoder
from mimscale.models.weights.export import exported_settings, on_meta
from mimscale.models.weights.recognise import stored_windows
from mimscale.models.weights.released import check_finite, match_checkpoint, read_checkpoint, released_names
from mimscale.training.checkpoint import CheckpointError
from mimscale.training.recipe import RecipeError
from mimscale.transfer.load import is_run, load_run
from mimscale.transfer.recipe import FinetuneRecipe
from mimscale.wording import printable

HEADS = ("head.", "fc_norm.")


def make_encoder(recipe: FinetuneRecipe, image_size: int, num_classes: int = 0, pad_windows: bool = False) -> Encoder:
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
    try:
        arguments = model.arguments(image_size, any_size=pad_windows)
        return create_encoder(model.name, num_classes=num_classes, mask_token=False, **arguments)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"model in the recipe: {error}") from None


def task_encoder(recipe: Any, num_classes: int = 0) -> Encoder:
    """The encoder that a recipe's task trains, at the size of its training images; see :func:`make_encoder`."""
    return make_encoder(recipe, recipe.data.image_size, num_classes, recipe.pad_windows)


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
        if not Path(source).exists():
            raise RecipeError(f"finetune.from={printable(source)}: there is no such run or file")
        try:
            stored = read_checkpoint(source)
            exported = exported_settings(source)
            said = on_meta(exported, len(stored), source).trained_at if exported is not None else None
        except ValueError as error:
            raise RecipeError(f"finetune.from: {error}") from None
        matched = _match(encoder, released_names(stored), source)
        check_finite(matched, source)
        if said is not None:
            _check_sizes(source, said, encoder)
        elif (windows := stored_windows(stored)) is not None:
            _check_sizes(source, {"pretrained_window_size": windows}, encoder)
        return matched.get
    run = load_run(source)
    checkpoint, prefix = run.checkpoint, run.prefix
    _check_sizes(str(checkpoint.path), run.meta_module.encoder.trained_at, encoder)
    shapes = {
        name.removeprefix(prefix): torch.empty(shape, device="meta")
        for name, shape in checkpoint.manifest["shapes"].items()
        if name.startswith(prefix)
    }
    wanted = _match(encoder, shapes, str(checkpoint.path))
    return lambda name: checkpoint.trained(prefix + name) if name in wanted and name in shapes else None


def _match(encoder: Any, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Pair the encoder's parameters with stored ones, all heads left out."""
    bare = {name: value for name, value in state.items() if not name.removeprefix("encoder.").startswith(HEADS)}
    # Positions that were worked out are stored nowhere; where they are to be learned, they start at that.
    if getattr(encoder, "pos_embed", None) is not None:
        inner = "encoder." if any(name.startswith("encoder.") for name in bare) else ""
        bare.setdefault(f"{inner}pos_embed", encoder.fixed_positions())
    return match_checkpoint(encoder, bare, source)


def _check_sizes(source: str, trained_at: Mapping[str, Any], encoder: Encoder) -> None:
    """Compare the sizes that weights were trained at, which no shape shows, with what ``encoder`` takes them for.

    Args:
        source: of the weights, for the error.
        trained_at: of the encoder that they were trained in.
        encoder: the task's.

    Raises:
        CheckpointError: positions would be evaluated as if they had been trained at another size.
    """
    taken = encoder.trained_at
    for key, value in trained_at.items():
        if key in taken and taken[key] != value:
            raise CheckpointError(
                f"{source} was trained with {key} {value}, but the recipe makes it {taken[key]}: set model.{key}={value}"
            )
