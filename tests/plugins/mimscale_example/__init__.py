"""A plug-in: a target and an encoder of its own. ``plugins: [mimscale_example]`` in a recipe registers both."""

from mimscale_example import convnext, hog

__all__ = ["convnext", "hog"]
