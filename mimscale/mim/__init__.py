"""The objectives: SimMIM and MAE, their masks and targets.

Names are imported on first use, so that reading a recipe does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mimscale.mim.masking import expand_mask, hidden_patches, mask_grid

if TYPE_CHECKING:
    from mimscale.mim.mae import MAE
    from mimscale.mim.output import MIMOutput
    from mimscale.mim.simmim import SimMIM
    from mimscale.mim.targets import local_normalise, local_statistics

_HOME = {
    "MAE": "mae",
    "MIMOutput": "output",
    "SimMIM": "simmim",
    "local_normalise": "targets",
    "local_statistics": "targets",
}

__all__ = [
    "MAE",
    "MIMOutput",
    "SimMIM",
    "expand_mask",
    "hidden_patches",
    "local_normalise",
    "local_statistics",
    "mask_grid",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
