"""What a masked-image model returns."""

from collections.abc import Callable

import torch


class MIMOutput(dict):
    """The loss of a batch, and what else it takes to look at the result, worked out when first asked for.

    A dict, so that DeepSpeed finds the loss in it. Losses are fp32 (fp64 for an fp64 model).

    Attributes:
        loss: mean over the masked pixels and channels of the batch.
        prediction: (B, 3, H, W), in the space of the target.
        per_sample: {"l1": (B,), "l2": (B,)}, means over each image's masked pixels and channels, without gradient.
    """

    def __init__(
        self,
        loss: torch.Tensor,
        predict: Callable[[], torch.Tensor],
        compare: Callable[[], dict[str, torch.Tensor]],
    ):
        super().__init__(loss=loss)
        self._predict, self._compare = predict, compare
        self._prediction: torch.Tensor | None = None
        self._per_sample: dict[str, torch.Tensor] | None = None

    @property
    def loss(self) -> torch.Tensor:
        """Mean over the masked pixels and channels of the batch."""
        return self["loss"]

    @property
    def prediction(self) -> torch.Tensor:
        """The whole predicted image (B, 3, H, W), in the space of the target."""
        if self._prediction is None:
            self._prediction = self._predict()
        return self._prediction

    @property
    def per_sample(self) -> dict[str, torch.Tensor]:
        """Both losses of every image: {"l1": (B,), "l2": (B,)}."""
        if self._per_sample is None:
            with torch.no_grad():
                self._per_sample = self._compare()
        return self._per_sample


def elementwise_loss(prediction: torch.Tensor, target: torch.Tensor, loss: str) -> torch.Tensor:
    """Compare element by element: |difference| for "l1", its square for "l2"."""
    difference = prediction - target
    return difference.abs() if loss == "l1" else difference * difference


def check_loss(loss: str) -> str:
    """Return ``loss`` if it is known.

    Raises:
        ValueError: neither "l1" nor "l2".
    """
    if loss not in ("l1", "l2"):
        raise ValueError(f'loss is "l2" or "l1", not "{loss}"')
    return loss
