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
from safetensors import SafetensorError, safe_open

from mimscale.files import write_beside, write_text
from mimscale.models.encoder import Encoder, Part
from mimscale.models.factory import create_encoder
from mimscale.models.preprocessing import Preprocessing
from mimscale.models.weights.parts import ExportError, encoder_parts
from mimscale.models.weights.released import all_weights, load_state, read_checkpoint, saved_buffers
from mimscale.registry import encoders

SETTINGS_KEY, IMAGES_KEY, PACKAGE_KEY = "mimscale.encoder", "mimscale.images", "mimscale.package"
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
            file.write(_tensor(part, read).numpy().data)


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
        raise ExportError(f"--to {kind}: a {encoder.made_from['name']} can be written as {', '.join(kinds(encoder))}")
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
    """Read from a file of ``mimscale export RUN --to safetensors`` what makes its encoder; ``None`` for other files."""
    try:
        return _settings(_metadata(path)[SETTINGS_KEY])
    except (OSError, SafetensorError, KeyError):
        return None


def _metadata(path: str | Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _settings(text: str) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in json.loads(text).items()}


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
    try:
        metadata = _metadata(path)
        settings = _settings(metadata[SETTINGS_KEY])
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error})") from None
    except KeyError:
        raise ValueError(
            f"{path} does not say which encoder it holds: it was not written by mimscale export --to safetensors; "
            "make the encoder with create_encoder and use load_released"
        ) from None
    if settings["name"] not in encoders:
        package = metadata.get(PACKAGE_KEY, "").partition(".")[0]
        what = f"'{package}', " if package.isidentifier() else ""
        # A file may say which package it needs, but what a file says is never imported.
        raise ValueError(
            f"{path} holds the encoder '{settings['name']}', which is not registered: first import the package {what}"
            "which has it"
        )
    said = metadata.get(IMAGES_KEY)
    images = Preprocessing.from_json(json.loads(said)) if said else None
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
        kept["num_classes"] = had
    else:
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
    with torch.device("meta"):
        encoder: Any = create_encoder(**kept)
    if kept["num_classes"] or len(list(encoder.buffers())) > len(saved_buffers(encoder)):
        encoder = create_encoder(**kept)  # a new classifier keeps its starting values, and tables are worked out
    else:
        encoder.to_empty(device="cpu")
    load_state(encoder, state, source)
    if images is not None:
        encoder.preprocessing = images.at(encoder.img_size[0]) if "img_size" in overrides else images
    return encoder.eval() if asked else without_head(encoder.eval())


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
