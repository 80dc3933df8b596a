"""The objectives: SimMIM and MAE, their masks and targets."""

from mimscale.mim.mae import MAE
from mimscale.mim.masking import expand_mask, hidden_patches, mask_grid
from mimscale.mim.output import MIMOutput
from mimscale.mim.simmim import SimMIM
from mimscale.mim.targets import local_normalise, local_statistics

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
