"""mimscale: masked image modelling at scale, on DeepSpeed."""

__version__ = "0.1.0"
