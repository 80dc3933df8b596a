"""Layer-wise learning rates: the nearer a layer is to the input, the less it moves."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from timm.models import group_parameters
from torch import nn


def layer_ids(encoder: nn.Module) -> dict[str, int]:
    """The layer of every parameter of an encoder, by name.

    The patch embedding (and what else makes tokens) is 0, block j is j + 1, a merging layer belongs to the last block of
    its stage; norm and head come last, one after the last block (25 for the paper's SwinV2).
    """
    return group_parameters(encoder, encoder.group_matcher(), reverse=True)  # type: ignore


def layer_decay_groups(module: nn.Module, layer_decay: float, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups, one for each rate and kind of parameter.

    A parameter of layer i has ``lr_scale = layer_decay ** (last - i)``, of the schedule's peak or of its every rate
    (``finetune.layer_decay_of``); parameters outside the encoder are of the last layer. 1-D parameters, biases and what the
    encoder's ``no_weight_decay`` names do not decay.

    Args:
        module: has an ``encoder`` that speaks timm's dialect.
        layer_decay: the rate of a layer over that of the next one.
        weight_decay: of the parameters that decay.
    """
    ids = layer_ids(module.encoder)  # type: ignore[arg-type]
    last = 1 + max(ids[name] for name in ids if ".blocks." in f".{name}")
    exempt = module.encoder.no_weight_decay()  # type: ignore[union-attr, operator]
    members: dict[tuple[float, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in module.named_parameters():
        inner = name.removeprefix("encoder.")
        layer = ids[inner] if name.startswith("encoder.") else last
        # Under ZeRO-3 the parameter here is an empty placeholder; its real shape is beside it.
        ndim = len(getattr(parameter, "ds_shape", parameter.shape))
        kept = ndim <= 1 or inner.endswith("bias") or (name != inner and inner in exempt)
        members[layer_decay ** (last - layer), not kept].append(parameter)
    return [
        {"params": parameters, "lr_scale": scale, "weight_decay": weight_decay if decays else 0.0}
        for (scale, decays), parameters in sorted(members.items(), key=lambda item: item[0])
    ]
