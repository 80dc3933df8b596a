"""Weights out: one file for mimscale, timm, transformers or the released code, written tensor by tensor.

No step holds more than one tensor, except for ``--to released``, whose format (torch's) is written from a whole state.
"""

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from mimscale.models.factory import create_encoder
from mimscale.models.preprocessing import Preprocessing
from mimscale.models.swin_v2 import SwinTransformerV2
from mimscale.models.vit import VisionTransformer
from mimscale.models.weights import KINDS
from mimscale.models.weights.released import all_weights, load_state, read_checkpoint, saved_buffers

SETTINGS_KEY, IMAGES_KEY = "mimscale.encoder", "mimscale.images"
Read = Callable[[str], torch.Tensor]


class Part(NamedTuple):
    """One tensor of a file: its name there, and where it comes from.

    Attributes:
        name: in the file.
        source: name of a parameter of the model, or the tensor itself.
        rows: the rows of the parameter that are meant; None for all.
    """

    name: str
    source: str | torch.Tensor
    rows: slice | None = None


class ExportError(ValueError):
    """A model that the wanted format cannot hold, or a place that cannot be written; the message says which."""


def encoder_parts(names: list[str]) -> list[Part]:
    """List an encoder's own names, of a model's parameter names."""
    return [Part(name.removeprefix("encoder."), name) for name in names if name.startswith("encoder.")]


def timm_parts(model: Any, names: list[str]) -> list[Part]:
    """Give an encoder the names of timm's SwinV2 or VisionTransformer, which merge at the beginning of a stage.

    Raises:
        ExportError: an encoder with extra norms.
    """
    if isinstance(model.encoder, VisionTransformer):
        released = model.to_released({name: name for name in names})
        return [Part(n, s) for n, s in released.items() if n != "mask_token" and not n.startswith("decoder_")]
    _refuse_extra_norms(names, "timm")
    parts = []
    for part in encoder_parts(names):
        pieces = part.name.split(".")
        if "downsample" in pieces:
            pieces[1] = str(int(pieces[1]) + 1)
        if pieces[0] != "mask_token":
            parts.append(part._replace(name=".".join(pieces)))
    return parts


_HUGGINGFACE = (
    ("encoder.patch_embed.proj.", "swinv2.embeddings.patch_embeddings.projection."),
    ("encoder.patch_embed.norm.", "swinv2.embeddings.norm."),
    ("encoder.mask_token", "swinv2.embeddings.mask_token"),
    ("encoder.norm.", "swinv2.layernorm."),
    ("encoder.layers.", "swinv2.encoder.layers."),
    (".attn.cpb_mlp.", ".attention.self.continuous_position_bias_mlp."),
    (".attn.logit_scale", ".attention.self.logit_scale"),
    (".attn.q_bias", ".attention.self.query.bias"),
    (".attn.v_bias", ".attention.self.value.bias"),
    (".attn.proj.", ".attention.output.dense."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
)


def huggingface_parts(model: Any, names: list[str]) -> tuple[list[Part], dict[str, Any]]:
    """Give SimMIM the names of transformers' ``Swinv2ForMaskedImageModeling``, and its configuration.

    Raises:
        ExportError: a model that has no counterpart there.
    """
    encoder = model.encoder
    if isinstance(encoder, VisionTransformer):
        raise ExportError("--to huggingface is for SwinV2; a ViT goes --to timm or --to released")
    _refuse_extra_norms(names, "transformers")
    if any(name.startswith("decoder.blocks.") for name in names):
        raise ExportError("transformers has no decoder of blocks; export --to safetensors or --to timm")
    parts = []
    for name in names:
        renamed = name
        for ours, theirs in _HUGGINGFACE:
            renamed = renamed.replace(ours, theirs, 1)
        if name.endswith(".attn.qkv.weight"):
            dim = encoder.embed_dim * 2 ** int(name.split(".")[2])
            stem = renamed.replace(".attn.qkv.weight", ".attention.self.")
            for i, which in enumerate(("query", "key", "value")):
                parts.append(Part(f"{stem}{which}.weight", name, slice(i * dim, (i + 1) * dim)))
        else:
            parts.append(Part(renamed, name))
    trained = encoder.made_from.get("pretrained_window_size")
    height, width = encoder.img_size
    config = {
        "architectures": ["Swinv2ForMaskedImageModeling"],
        "model_type": "swinv2",
        "image_size": height if height == width else [height, width],
        "patch_size": encoder.patch_size,
        "num_channels": encoder.in_chans,
        "embed_dim": encoder.embed_dim,
        "depths": list(encoder.depths),
        "num_heads": list(encoder.num_heads),
        "window_size": encoder.window_size,
        "pretrained_window_sizes": [r[0] if trained else 0 for r in encoder.references],
        "drop_path_rate": encoder.drop_path,
        "encoder_stride": encoder.stride,
    }
    return parts, config


def released_parts(model: Any, names: list[str]) -> list[Part]:
    """Give a model the names of its authors' release."""
    if isinstance(model.encoder, VisionTransformer):
        return [Part(name, source) for name, source in model.to_released({n: n for n in names}).items()]
    return [Part(name, name) for name in names]


def _refuse_extra_norms(names: list[str], where: str) -> None:
    if any(".norm3." in name for name in names):
        raise ExportError(f"{where} has no SwinV2 with extra norms; export --to safetensors or --to released")


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
    with _beside(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for part in parts:
            file.write(_tensor(part, read).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _tensor(part: Part, read: Read) -> torch.Tensor:
    tensor = read(part.source) if isinstance(part.source, str) else part.source
    tensor = tensor if part.rows is None else tensor[part.rows]
    return tensor.detach().to("cpu", torch.float32).contiguous()


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Give a place to write to beside ``path``, which takes its place at the end, or is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def export_weights(model: Any, kind: str, output: Path, read: Read | None = None) -> list[Path]:
    """Write a model's weights.

    Args:
        model: SimMIM or MAE, or what was fine-tuned, with its ``encoder``; may be on the meta device if ``read`` is given.
        kind: one of ``KINDS``; "safetensors" takes the encoder alone, with its classifier where it has one.
        output: a file, or for "huggingface" a folder.
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
    if kind == "safetensors":
        settings = {SETTINGS_KEY: json.dumps(model.encoder.made_from), "format": "pt"}
        images = getattr(model.encoder, "preprocessing", None)
        if images is not None:
            settings[IMAGES_KEY] = json.dumps(asdict(images))
        write_safetensors(output, encoder_parts(names), shapes, read, settings)
        return [output]
    if kind in KINDS and not hasattr(model, "reconstruct"):
        raise ExportError(f"--to {kind} is for a pre-training; a fine-tuned encoder goes --to safetensors")
    if kind == "timm":
        write_safetensors(output, timm_parts(model, names), shapes, read, {"format": "pt"})
        return [output]
    if kind == "huggingface":
        parts, config = huggingface_parts(model, names)
        write_safetensors(output / "model.safetensors", parts, shapes, read, {"format": "pt"})
        with _beside(output / "config.json") as temporary:
            temporary.write_text(json.dumps(config, indent=2) + "\n")
        return [output / "config.json", output / "model.safetensors"]
    if kind == "released":
        state = {part.name: _tensor(part, read) for part in released_parts(model, names)}
        with _beside(output) as temporary:
            torch.save({"model": state}, temporary)
        return [output]
    raise ExportError(f'--to is one of {", ".join(KINDS)}, not "{kind}"')


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


def load(path: str | Path, **overrides: Any) -> SwinTransformerV2 | VisionTransformer:
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
    said = metadata.get(IMAGES_KEY)
    images = Preprocessing.from_json(json.loads(said)) if said else None
    return remade(settings, overrides, read_checkpoint(path), str(path), images)


def remade(
    settings: Mapping[str, Any],
    overrides: Mapping[str, Any],
    state: Mapping[str, torch.Tensor],
    source: str,
    images: Preprocessing | None,
) -> Any:
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


def usage(kind: str, output: Path, encoder: Any) -> str:
    """Say how to use what was written."""
    if kind == "safetensors":
        return f'encoder = mimscale.load("{output}")'
    if kind == "huggingface":
        return f'model = transformers.Swinv2Model.from_pretrained("{output}")'
    if kind == "released":
        return f'load_released(model, "{output}"), or the released code\'s own loading'
    settings = {"num_classes": 0, "img_size": encoder.img_size, "embed_dim": encoder.embed_dim}
    if isinstance(encoder, VisionTransformer):
        name = "vit_base_patch16_224"
        settings |= {"patch_size": encoder.patch_size, "depth": encoder.depth, "num_heads": encoder.num_heads}
    else:
        name = "swinv2_base_window12_192"
        settings |= {"window_size": encoder.window_size, "depths": encoder.depths, "num_heads": encoder.num_heads}
    given = ", ".join(f"{key}={value}" for key, value in settings.items())
    return f'model = timm.create_model("{name}", {given}, checkpoint_path="{output}")'
