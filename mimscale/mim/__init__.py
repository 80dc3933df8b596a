"""The objectives: SimMIM and MAE, their masks and targets.

Names are imported on first use, so that reading a recipe does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mimscale.mim.mae import MAE
    from mimscale.mim.masking import expand_mask
    from mimscale.mim.objective import MIMObjective
    from mimscale.mim.output import MIMOutput
    from mimscale.mim.settings import MAESettings, MIMSettings, SimMIMSettings
    from mimscale.mim.simmim import SimMIM
    from mimscale.mim.targets import Target, local_normalise, local_statistics

_HOME = {
    "MAE": "mae",
    "MAESettings": "settings",
    "MIMObjective": "objective",
    "MIMOutput": "output",
    "MIMSettings": "settings",
    "SimMIM": "simmim",
    "SimMIMSettings": "settings",
    "Target": "targets",
    "expand_mask": "masking",
    "local_normalise": "targets",
    "local_statistics": "targets",
}

__all__ = [
    "MAE",
    "MAESettings",
    "MIMObjective",
    "MIMOutput",
    "MIMSettings",
    "SimMIM",
    "SimMIMSettings",
    "Target",
    "expand_mask",
    "local_normalise",
    "local_statistics",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
