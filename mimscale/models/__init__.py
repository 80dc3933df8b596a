"""Encoders: SwinV2 and ViT in the paper's sizes, their decoders, and weights in and out."""

from mimscale.models.factory import create_encoder, encoder_names

__all__ = ["create_encoder", "encoder_names"]
