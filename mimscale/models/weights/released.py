"""Weights in: the checkpoints that the papers' authors released, in their names, all or nothing."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file

from mimscale.models.weights.safetensors_header import read_header
from mimscale.models.weights.torch_file import read_torch
from mimscale.wording import Escaped, counted, printable

# Tables that follow from sizes alone; the released code stored them beside the weights.
_TABLES = ("relative_coords_table", "relative_position_index", "attn_mask")

# Of what does not fit, so many are listed.
LISTED = 40

Gather = Callable[[list[nn.Parameter]], AbstractContextManager]


class CheckpointMismatch(Escaped, ValueError):
    """A checkpoint does not fit the model; the message lists the names that do not, ten of them at most."""


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
    where = printable(path)
    if not path.exists():
        raise ValueError(f"no checkpoint at {where}")
    try:
        stored: Any = _read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    except (OSError, ValueError) as error:
        reason = printable(getattr(error, "strerror", None) or error)
        raise ValueError(
            f"{where} is not a file of weights that can be read safely ({reason}); "
            'a torch file must hold tensors only: save it again as {"model": state_dict}'
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(stored, Mapping) and isinstance(stored.get(key), Mapping):
            stored = stored[key]
            break
    if not isinstance(stored, Mapping) or not stored or not all(isinstance(v, torch.Tensor) for v in stored.values()):
        raise ValueError(f'{where} holds no dict of tensors, neither bare nor under "model"')
    if not all(isinstance(name, str) for name in stored):
        raise ValueError(f"{where} holds tensors whose names are no text")
    told, size = sum(value.numel() * value.element_size() for value in stored.values()), path.stat().st_size
    # A tensor may repeat its numbers, so that a small file tells of any size; tied weights are there twice at most.
    if told > 2 * size:
        raise ValueError(f"{where} tells of {counted(told, 'byte')} of tensors in {counted(size, 'byte')}")
    return dict(stored)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    read_header(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from None


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
    problems += [
        f"another type: {name} is {value.dtype} in the file, {parameters[name].dtype} in the model"
        for name, value in state.items()
        if name in shapes and not value.is_meta and value.is_floating_point() != parameters[name].is_floating_point()
    ]
    if problems:
        listed = "\n  ".join(printable(problem) for problem in problems[:LISTED])
        more = f"\n  and {len(problems) - LISTED:,} more" if len(problems) > LISTED else ""
        raise CheckpointMismatch(
            f"{printable(source)} does not fit this {type(model).__name__}; nothing was loaded:\n  {listed}{more}"
            f"{_hint(state, shapes)}"
        )
    return {name: value for name, value in state.items() if name in shapes}


def check_finite(state: Mapping[str, torch.Tensor], source: str) -> None:
    """See that all weights are numbers in fp32.

    Raises:
        CheckpointMismatch: some are NaN or infinite; the first tensors are named.
    """
    broken = [name for name, value in state.items() if value.is_floating_point() and not _finite(value)]
    if broken:
        named = ", ".join(printable(name, 100) for name in broken[:5])
        raise CheckpointMismatch(
            f"{printable(source)} holds NaN or infinity in {counted(len(broken), 'tensor')} ({named}); nothing was "
            "loaded: take an earlier checkpoint, or the file anew"
        )


def _finite(value: torch.Tensor) -> bool:
    # In parts, so that a large tensor is not doubled.
    return all(bool(torch.isfinite(part.float()).all()) for part in value.detach().reshape(-1).split(1 << 24))


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
    check_finite(matched, source)
    parameters = all_weights(model)
    with torch.no_grad():
        for name, value in matched.items():
            with gather([parameters[name]]) if gather else nullcontext():
                parameters[name].copy_(value)
    return sorted(matched)
