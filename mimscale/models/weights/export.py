"""Weights out: one file for mimscale, timm, transformers or the released code, written tensor by tensor.

No step holds more than one tensor, except for ``--to released``, whose format (torch's) is written from a whole state.
"""

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mimscale.files import parse_json, write_beside, write_text
from mimscale.models.encoder import Encoder, Part
from mimscale.models.factory import create_encoder
from mimscale.models.preprocessing import Preprocessing
from mimscale.models.weights.parts import ExportError, encoder_parts
from mimscale.models.weights.released import (
    all_weights,
    load_state,
    match_checkpoint,
    read_checkpoint,
    saved_buffers,
)
from mimscale.models.weights.safetensors_header import Header, read_header
from mimscale.registry import encoders
from mimscale.wording import counted, printable

SETTINGS_KEY, IMAGES_KEY, PACKAGE_KEY = "mimscale.encoder", "mimscale.images", "mimscale.package"
# Of what a file says of its encoder: characters, the largest number, and bytes of tables that follow from it.
LONGEST_SETTINGS, LARGEST_SETTING, LARGEST_TABLES = 1 << 16, 1 << 20, 1 << 29
Read = Callable[[str], torch.Tensor]


def write_safetensors(
    path: Path, parts: list[Part], shapes: Mapping[str, tuple[int, ...]], read: Read, metadata: Mapping[str, str]
) -> None:
    """Write tensors to a safetensors file one after the other, in fp32, and put it in place when it is whole.

    Args:
        path: of the file.
        parts: what is in it.
        shapes: of the model's parameters.
        read: gives a parameter by name.
        metadata: strings to be kept with it.

    Raises:
        ExportError: a tensor is not of its shape.
        OSError: it cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for part in parts:
        shape = list(shapes[part.source] if isinstance(part.source, str) else part.source.shape)
        if part.rows is not None:
            shape[0] = part.rows.stop - part.rows.start
        start, end = end, end + 4 * int(torch.Size(shape).numel())
        header[part.name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with write_beside(path, durable=True) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for part in parts:
            tensor = _tensor(part, read)
            if list(tensor.shape) != header[part.name]["shape"]:
                raise ExportError(f"{printable(part.name)} has the shape {tuple(tensor.shape)}, not the model's")
            file.write(tensor.numpy().data)


def _tensor(part: Part, read: Read) -> torch.Tensor:
    tensor = read(part.source) if isinstance(part.source, str) else part.source
    tensor = tensor if part.rows is None else tensor[part.rows]
    return tensor.detach().to("cpu", torch.float32).contiguous()


def export_weights(model: Any, kind: str, output: Path, read: Read | None = None) -> list[Path]:
    """Write a model's weights.

    Args:
        model: SimMIM or MAE, or what was fine-tuned, with its ``encoder``; may be on the meta device if ``read`` is given.
        kind: one of :func:`kinds`; "safetensors" takes the encoder alone, with its classifier where it has one.
        output: a file, or a folder for a format that has a ``config.json``.
        read: gives a parameter by name; by default the model's own.

    Returns:
        The files that were written.

    Raises:
        ExportError: an unknown kind, or one that cannot hold this model.
        OSError: a file cannot be written.
    """
    parameters = all_weights(model)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    read = read or parameters.__getitem__
    names = list(parameters)
    encoder = model.encoder
    if kind == "safetensors":
        settings = {SETTINGS_KEY: json.dumps(encoder.made_from), "format": "pt"}
        images = getattr(encoder, "preprocessing", None)
        if images is not None:
            settings[IMAGES_KEY] = json.dumps(asdict(images))
        if encoder.made_from["name"] in encoders.others():
            settings[PACKAGE_KEY] = type(encoder).__module__
        write_safetensors(output, encoder_parts(names), shapes, read, settings)
        return [output]
    if kind not in kinds(encoder):
        raise ExportError(
            f"--to {printable(kind, 60)}: a {encoder.made_from['name']} can be written as {', '.join(kinds(encoder))}"
        )
    if not hasattr(model, "reconstruct"):
        raise ExportError(f"--to {kind} is for a pre-training; a fine-tuned encoder goes --to safetensors")
    if kind == "released":
        named = model.to_released({name: name for name in names})
        state = {name: _tensor(Part(name, source), read) for name, source in named.items()}
        with write_beside(output) as temporary, temporary.open("wb") as file:
            torch.save({"model": state}, file)  # under a path it would keep that path's name inside
        return [output]
    form = encoder.exports[kind]
    parts, config = form.parts(model, names), form.config(model)
    if config is None:
        write_safetensors(output, parts, shapes, read, {"format": "pt"})
        return [output]
    write_safetensors(output / "model.safetensors", parts, shapes, read, {"format": "pt"})
    write_text(output / "config.json", json.dumps(config, indent=2) + "\n")
    return [output / "config.json", output / "model.safetensors"]


def kinds(encoder: Encoder) -> list[str]:
    """What a pre-training of an encoder can be exported to."""
    return ["safetensors", *encoder.exports, "released"]


def ending(kind: str, model: Any) -> str:
    """What the name of an exported file ends in; "" for a folder."""
    form = model.encoder.exports.get(kind)
    if form is not None and form.config(model) is not None:
        return ""
    return ".pth" if kind == "released" else ".safetensors"


def exported_settings(path: str | Path) -> dict[str, Any] | None:
    """Read from a file of ``mimscale export RUN --to safetensors`` what makes its encoder; ``None`` for other files.

    Raises:
        ValueError: it says what, but in settings that make no encoder.
    """
    if Path(path).suffix != ".safetensors":
        return None
    said = _header(path).metadata.get(SETTINGS_KEY)
    return None if said is None else _settings(said, printable(path))


def _header(path: str | Path) -> Header:
    try:
        return read_header(path)
    except (OSError, ValueError) as error:
        reason = printable(getattr(error, "strerror", None) or error)
        raise ValueError(f"{printable(path)} cannot be read as safetensors ({reason})") from None


def _object(text: str, what: str) -> dict[str, Any]:
    """A JSON object, its lists as tuples."""
    try:
        values = parse_json(text) if len(text) <= LONGEST_SETTINGS else None
    except ValueError as error:
        raise ValueError(f"{what} are no JSON: {printable(error)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{what} are no JSON object of {LONGEST_SETTINGS:,} characters at most")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _settings(text: str, where: str) -> dict[str, Any]:
    """The arguments of ``create_encoder`` in a file: plain, and of a size that an encoder may have."""
    settings = _object(text, f"the settings of the encoder in {where}")
    if not isinstance(settings.get("name"), str):
        raise ValueError(f"the settings of the encoder in {where} lack its name")
    for key, value in settings.items():
        for part in value if isinstance(value, tuple) else (value,):
            numeric = isinstance(part, int | float)
            if (numeric and not abs(part) <= LARGEST_SETTING) or not (numeric or part is None or isinstance(part, str)):
                raise ValueError(
                    f"the settings of the encoder in {where} have {printable(key, 60)}={printable(value, 60)}, which is no "
                    f"number up to {LARGEST_SETTING:,}, text, or list of them"
                )
    return settings


def _preprocessing(text: str | None, where: str) -> Preprocessing | None:
    if text is None:
        return None
    try:
        return Preprocessing.from_json(_object(text, "they"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} does not say how its images are made ({IMAGES_KEY}: {printable(error)})") from None


def load(path: str | Path, **overrides: Any) -> Encoder:
    """Make the encoder of an exported file, with its weights, ready to give features of images of any size.

    Args:
        path: a file that ``mimscale export RUN --to safetensors`` wrote.
        **overrides: of the encoder's settings, as in ``create_encoder``: ``num_classes=1000`` to fine-tune,
            ``img_size=224, window_size=14, pretrained_window_size=12`` for larger images.

    Returns:
        The encoder in eval mode: ``encoder(images)`` gives pooled features, ``encoder(images, output="map")`` a map.

    Raises:
        ValueError: not such a file, or overrides that its weights do not fit.
    """
    path = Path(path)
    where = printable(path)
    metadata = _header(path).metadata
    if SETTINGS_KEY not in metadata:
        raise ValueError(
            f"{where} does not say which encoder it holds: it was not written by mimscale export --to safetensors; "
            "make the encoder with create_encoder and use load_released"
        )
    settings = _settings(metadata[SETTINGS_KEY], where)
    if settings["name"] not in encoders:
        package = metadata.get(PACKAGE_KEY, "").partition(".")[0]
        what = f"'{package}', " if package.isidentifier() else ""
        # A file may say which package it needs, but what a file says is never imported.
        raise ValueError(
            f"{where} holds the encoder '{printable(settings['name'], 60)}', which is not registered: first import the "
            f"package {what}which has it"
        )
    images = _preprocessing(metadata.get(IMAGES_KEY), where)
    return remade(settings, overrides, read_checkpoint(path), str(path), images)


def remade(
    settings: Mapping[str, Any],
    overrides: Mapping[str, Any],
    state: Mapping[str, torch.Tensor],
    source: str,
    images: Preprocessing | None,
) -> Encoder:
    """Make an encoder again from its weights, perhaps with other settings.

    Args:
        settings: arguments of ``create_encoder``.
        overrides: of them. Its classifier stays behind, unless ``num_classes`` is the number that it has.
        state: weights in the names of the models here.
        source: of the weights, for the error.
        images: how its images are made, if that is known.

    Returns:
        The encoder in eval mode on the CPU.

    Raises:
        ValueError: overrides that the weights do not fit.
    """
    asked, had = overrides.get("num_classes"), settings.get("num_classes")
    kept = {**settings, **overrides}
    if asked is None or asked == had:
        # A classifier that the weights lack is not made only to be taken away.
        kept["num_classes"] = had if asked or any(name.startswith("head.") for name in state) else 0
    else:
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
    # On the meta device first: what the settings ask for must be what the weights are, before memory is taken for it.
    encoder: Any = on_meta(kept, len(state), source)
    match_checkpoint(encoder, state, source)
    if kept["num_classes"] or len(list(encoder.buffers())) > len(saved_buffers(encoder)):
        encoder = create_encoder(**kept)  # a new classifier keeps its starting values, and tables are worked out
    else:
        encoder.to_empty(device="cpu")
    load_state(encoder, state, source)
    if images is not None:
        encoder.preprocessing = images.at(encoder.img_size[0]) if "img_size" in overrides else images
    return encoder.eval() if asked else without_head(encoder.eval())


def on_meta(settings: Mapping[str, Any], tensors: int, source: str) -> Any:
    """Make an encoder on the meta device, of settings from an untrusted place.

    Args:
        settings: arguments of ``create_encoder``.
        tensors: how many there are for it, which bounds its depth.
        source: of the settings, for the error.

    Raises:
        ValueError: they make no encoder, or one that does not go with that many tensors.
    """
    for key in ("depth", "depths"):
        blocks = settings.get(key)
        blocks = blocks if isinstance(blocks, tuple) else (blocks,)
        if sum(part for part in blocks if isinstance(part, int | float)) > tensors:
            raise ValueError(
                f"{printable(source)} says {key}={printable(settings[key], 60)} of {counted(tensors, 'tensor')}"
            )
    try:
        with torch.device("meta"):
            encoder: Any = create_encoder(**settings)
    except (TypeError, ValueError, OverflowError, ZeroDivisionError, RuntimeError) as error:
        # Settings of other types or sizes than an encoder's, told by whatever they come upon first.
        raise ValueError(f"the settings in {printable(source)} make no encoder: {printable(error)}") from None
    tables = sum(buffer.numel() * buffer.element_size() for buffer in encoder.buffers())
    if tables > LARGEST_TABLES:
        raise ValueError(
            f"the settings in {printable(source)} ask for {counted(tables, 'byte')} of position tables, more than "
            f"{LARGEST_TABLES:,}"
        )
    return encoder


def without_head(encoder: Any) -> Any:
    """Take an encoder's classifier away, so that it gives what went into it; a ViT's pooling norm belongs to that."""
    if encoder.num_classes:
        encoder.head, encoder.num_classes = torch.nn.Identity(), 0
    return encoder


def usage(kind: str, output: Path, encoder: Encoder) -> str:
    """Say how to use what was written."""
    if kind == "safetensors":
        return f'encoder = mimscale.load("{output}")'
    if kind == "released":
        return f'load_released(model, "{output}"), or the released code\'s own loading'
    return encoder.exports[kind].usage(output, encoder)
