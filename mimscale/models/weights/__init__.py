"""Encoders' weights, in and out."""

# What a run can be exported for.
KINDS = ("safetensors", "timm", "huggingface", "released")
