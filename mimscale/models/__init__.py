"""Encoders: SwinV2 and ViT in the paper's sizes, their decoders, and weights in and out."""

from mimscale.models.factory import create_encoder, encoder_names
from mimscale.models.weights.export import load
from mimscale.models.weights.released import CheckpointMismatch, load_released

__all__ = ["CheckpointMismatch", "create_encoder", "encoder_names", "load", "load_released"]
