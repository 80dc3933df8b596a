"""SwinV2 in the names of other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mimscale.models.encoder import Part
from mimscale.models.weights.parts import ExportError, encoder_parts, timm_usage


def _refuse_extra_norms(names: list[str], where: str) -> None:
    if any(".norm3." in name for name in names):
        raise ExportError(f"{where} has no SwinV2 with extra norms; export --to safetensors or --to released")


class SwinTimm:
    """timm's SwinV2, which merges at the beginning of a stage."""

    def parts(self, model: Any, names: list[str]) -> list[Part]:
        """The encoder without its mask token.

        Raises:
            ExportError: an encoder with extra norms.
        """
        _refuse_extra_norms(names, "timm")
        parts = []
        for part in encoder_parts(names):
            pieces = part.name.split(".")
            if "downsample" in pieces:
                pieces[1] = str(int(pieces[1]) + 1)
            if pieces[0] != "mask_token":
                parts.append(part._replace(name=".".join(pieces)))
        return parts

    def config(self, model: Any) -> None:
        """None: timm is told by its caller."""

    def usage(self, output: Path, encoder: Any) -> str:
        """A call of ``timm.create_model``."""
        own = {"window_size": encoder.window_size, "depths": encoder.depths, "num_heads": encoder.num_heads}
        return timm_usage("swinv2_base_window12_192", output, encoder, own)


_NAMES = (
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


class SwinHuggingFace:
    """SimMIM as transformers' ``Swinv2ForMaskedImageModeling``."""

    def parts(self, model: Any, names: list[str]) -> list[Part]:
        """Encoder and decoder.

        Raises:
            ExportError: a model that has no counterpart there.
        """
        _refuse_extra_norms(names, "transformers")
        if any(name.startswith("decoder.blocks.") for name in names):
            raise ExportError("transformers has no decoder of blocks; export --to safetensors or --to timm")
        parts = []
        for name in names:
            renamed = name
            for ours, theirs in _NAMES:
                renamed = renamed.replace(ours, theirs, 1)
            if name.endswith(".attn.qkv.weight"):
                dim = model.encoder.embed_dim * 2 ** int(name.split(".")[2])
                stem = renamed.replace(".attn.qkv.weight", ".attention.self.")
                for i, which in enumerate(("query", "key", "value")):
                    parts.append(Part(f"{stem}{which}.weight", name, slice(i * dim, (i + 1) * dim)))
            else:
                parts.append(Part(renamed, name))
        return parts

    def config(self, model: Any) -> dict[str, Any]:
        """transformers' own configuration."""
        encoder = model.encoder
        trained = encoder.made_from.get("pretrained_window_size")
        height, width = encoder.img_size
        return {
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

    def usage(self, output: Path, encoder: Any) -> str:
        """A call of ``from_pretrained``."""
        return f'model = transformers.Swinv2Model.from_pretrained("{output}")'
