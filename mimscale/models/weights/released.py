"""Weights in: the checkpoints that the papers' authors released, in their names, all or nothing."""

import argparse
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file

# Tables that follow from sizes alone; the released code stored them beside the weights.
_TABLES = ("relative_coords_table", "relative_position_index", "attn_mask")

Gather = Callable[[list[nn.Parameter]], AbstractContextManager]


class CheckpointMismatch(ValueError):
    """A checkpoint does not fit the model; the message lists every name that does not."""


def read_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """Read the weights of a file, without running anything that is in it.

    Args:
        path: a ``.safetensors`` file, or a torch file that holds a dict of tensors, bare or under "model" or
            "state_dict".

    Returns:
        Name to tensor, as stored; memory-mapped where the format allows.

    Raises:
        ValueError: no such file, or not a file of weights.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}")
    try:
        stored: Any = load_file(path) if path.suffix == ".safetensors" else _read_torch(path)
    except (pickle.UnpicklingError, RuntimeError, SafetensorError, EOFError, KeyError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path} is not a file of weights that can be read safely ({reason}); "
            'a torch file must hold tensors only: save it again as {"model": state_dict}'
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(stored, Mapping) and isinstance(stored.get(key), Mapping):
            stored = stored[key]
            break
    if not isinstance(stored, Mapping) or not stored or not all(isinstance(v, torch.Tensor) for v in stored.values()):
        raise ValueError(f'{path} holds no dict of tensors, neither bare nor under "model"')
    return dict(stored)


def _read_torch(path: Path) -> Any:
    # The released training code stored its settings beside the weights; a plain dict stands in for their class.
    allowed: list[Any] = [(OrderedDict, "yacs.config.CfgNode"), argparse.Namespace]
    with torch.serialization.safe_globals(allowed):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # torch's format before 1.6


def saved_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """What a module learns outside its parameters (a batch norm's running statistics), by name; alike on all ranks."""
    stored = module.state_dict()
    return {name: buffer for name, buffer in module.named_buffers() if name in stored}


def all_weights(module: nn.Module) -> dict[str, Any]:
    """Parameters and saved buffers, by name."""
    return dict(module.named_parameters()) | saved_buffers(module)


def released_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give stored weights the names of the models here: tables left out, older spellings replaced."""
    named = {}
    for name, value in state.items():
        name = name.removeprefix("module.").replace("rpe_mlp", "cpb_mlp")
        if name.rsplit(".", 1)[-1] not in _TABLES:
            named[name] = value
    return named


def match_checkpoint(model: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """Pair every parameter of ``model`` with its stored value, or say what is in the way.

    Into an encoder by itself, a pre-training checkpoint brings its encoder: the decoder stays behind, and so does the
    mask token where the encoder has none; a classifier keeps its starting values. Of a fine-tuned checkpoint, the
    classifier stays behind where the encoder has none. All else must fit exactly.

    Args:
        model: SimMIM, MAE or an encoder.
        state: stored weights, in the names of the models here.
        source: of the weights, for the error.

    Returns:
        Parameter name to stored tensor.

    Raises:
        CheckpointMismatch: listing the names that are missing, not wanted, or of another shape.
    """
    parameters = all_weights(model)
    # A parameter that ZeRO-3 has partitioned shows its real shape under another name.
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
    renamed: Any = getattr(model, "from_released", dict)
    state = renamed(state)
    optional: set[str] = set()
    if not any(name.startswith("encoder.") for name in parameters):
        state = _encoder_part(dict(state), parameters)
        if not any(name.startswith("head.") for name in state):
            optional = {name for name in parameters if name.startswith(("head.", "fc_norm."))}
    try:
        for name, module in model.named_modules():
            drop_tables: Any = getattr(module, "drop_tables", None)
            if drop_tables is not None:
                drop_tables(state, f"{name}." if name else "")
    except ValueError as error:
        raise CheckpointMismatch(f"{source} does not fit this {type(model).__name__}: {error}") from None
    missing = [name for name in shapes if name not in state and name not in optional]
    problems = [f"missing in the file: {name} {shapes[name]}" for name in missing]
    problems += [
        f"not in the model: {name} {tuple(value.shape)}" for name, value in state.items() if name not in shapes
    ]
    problems += [
        f"another shape: {name} is {tuple(value.shape)} in the file, {shapes[name]} in the model"
        for name, value in state.items()
        if name in shapes and tuple(value.shape) != shapes[name]
    ]
    if problems:
        listed = "\n  ".join(problems)
        raise CheckpointMismatch(
            f"{source} does not fit this {type(model).__name__}; nothing was loaded:\n  {listed}{_hint(state, shapes)}"
        )
    return {name: value for name, value in state.items() if name in shapes}


def _encoder_part(state: dict[str, torch.Tensor], wanted: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Keep of a checkpoint what an encoder by itself takes; ``wanted`` are the encoder's own names."""
    if any(name.startswith("encoder.") for name in state):
        state = {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}
    elif "decoder_embed.weight" in state:
        state = {n: value for n, value in state.items() if n != "mask_token" and not n.startswith("decoder_")}
    has_head = any(name.startswith("head.") for name in state)
    left = []
    if not any(name.startswith("head.") for name in wanted):
        left += ["head."]
    if not has_head and "norm.weight" not in wanted:
        left += ["norm."]  # a ViT that pools norms after pooling, by a norm of its own
    if "mask_token" not in wanted:
        left += ["mask_token"]
    return {name: value for name, value in state.items() if not name.startswith(tuple(left))}


def _hint(state: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Say what to do about the mismatches that have one known cause."""

    def has(names: Mapping, part: str) -> bool:
        return any(part in name for name in names)

    if has(state, ".norm3.") and not has(shapes, ".norm3."):
        return "\nThe file has an extra norm in some blocks: make the encoder with extra_norm_every=6."
    if has(shapes, ".norm3.") and not has(state, ".norm3."):
        return "\nThe file has no extra norms: make the encoder with extra_norm_every=0."
    if has(shapes, "mask_token") and not has(state, "mask_token"):
        return "\nThe file has no mask token: make the encoder with mask_token=False."
    return ""


def load_released(model: nn.Module, path: str | Path, gather: Gather | None = None) -> list[str]:
    """Load a checkpoint in the released names, strictly: either everything fits, or nothing changes.

    Takes the authors' SimMIM and fine-tuned SwinV2 checkpoints, and MAE's, bare or under "model". Windows may differ
    (12 at pre-training, 14 at fine-tuning): the position bias is evaluated anew, so nothing is interpolated; give the
    encoder its ``pretrained_window_size``.

    Args:
        model: SimMIM, MAE, or an encoder by itself, which takes the encoder of a pre-training checkpoint.
        path: of the file, torch's or safetensors.
        gather: for parameters that are partitioned: a context manager that makes a list of them whole while it is open.

    Returns:
        The names of the parameters that were loaded.

    Raises:
        ValueError: not a file of weights.
        CheckpointMismatch: (a ValueError) listing all that does not fit.
    """
    return load_state(model, released_names(read_checkpoint(path)), str(path), gather)


def load_state(
    model: nn.Module, state: Mapping[str, torch.Tensor], source: str, gather: Gather | None = None
) -> list[str]:
    """Load weights in the names of the models here, as :func:`load_released` does; ``source`` is theirs, for the error."""
    matched = match_checkpoint(model, state, source)
    parameters = all_weights(model)
    with torch.no_grad():
        for name, value in matched.items():
            with gather([parameters[name]]) if gather else nullcontext():
                parameters[name].copy_(value)
    return sorted(matched)
