"""mimscale: masked image modelling at scale, on DeepSpeed."""

__version__ = "0.1.0"


def load(path, **overrides):
    """The encoder of a file that ``mimscale export RUN --to safetensors`` wrote; see ``mimscale.models.load``."""
    from mimscale.models.weights.export import load as load_encoder

    return load_encoder(path, **overrides)
