"""SimMIM on a SwinV2 (the paper, section 3.1): hide patches, encode the rest with mask tokens, predict pixels."""

from typing import Any

import torch
import torch.nn as nn

from mimscale.mim.masking import expand_mask
from mimscale.mim.output import MIMOutput, check_loss, elementwise_loss
from mimscale.mim.targets import local_normalise, local_statistics
from mimscale.models.decoders import create_decoder
from mimscale.models.swin_v2 import SwinTransformerV2


class SimMIM(nn.Module):
    """Masked image modelling with an encoder that sees mask tokens and a light decoder.

    Args:
        encoder: a SwinV2 with a mask token and no classifier.
        decoder: "linear", "4-blocks" or "8-blocks" (the paper's Table 4).
        loss: "l2" (the paper) or "l1" (the released code).
        target_window: side of the neighbourhood that normalises the target; None for raw pixels.

    Raises:
        ValueError: an unknown decoder or loss; an even window; an encoder without a mask token.
    """

    def __init__(
        self,
        encoder: SwinTransformerV2,
        decoder: str = "linear",
        loss: str = "l2",
        target_window: int | None = 47,
    ):
        super().__init__()
        if getattr(encoder, "mask_token", None) is None or not isinstance(encoder, SwinTransformerV2):
            raise ValueError("SimMIM needs a SwinV2 encoder with a mask token: create_encoder(..., mask_token=True)")
        if target_window is not None and (target_window % 2 == 0 or target_window < 3):
            raise ValueError(f"target_window must be odd and at least 3, or None, not {target_window}")
        self.encoder = encoder
        self.decoder = create_decoder(decoder, encoder)
        self.loss = check_loss(loss)
        self.target_window = target_window

    def encode(
        self, images: torch.Tensor, mask: torch.Tensor | None = None, draw_keys: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Encode images (B, 3, H, W), hidden where mask (B, H/32, W/32) is True, to features (B, 8C, H/32, W/32)."""
        return self.encoder(images, mask=mask, draw_keys=draw_keys, output="map")

    def target(self, images: torch.Tensor) -> torch.Tensor:
        """Give what is to be predicted of images (B, 3, H, W): (B, 3, H, W) in fp32 at least."""
        if self.target_window is None:
            return images.to(torch.promote_types(images.dtype, torch.float32))
        return local_normalise(images, self.target_window)

    def forward(self, images: torch.Tensor, mask: torch.Tensor, draw_keys: torch.Tensor | None = None) -> MIMOutput:
        """Predict the hidden pixels.

        In training only the hidden patches are predicted and compared; the whole prediction is made if it is asked for.

        Args:
            images: (B, 3, H, W), normalised by ImageNet's mean and deviation, fp32.
            mask: (B, H/32, W/32) bool, True = hidden.
            draw_keys: (B,) int64, one per sample draw, that drop-path decisions derive from.

        Returns:
            The loss, and on demand the prediction and the losses of every image.

        Raises:
            ValueError: shapes that do not fit.
        """
        features = self.encode(images, mask, draw_keys)
        target = self.target(images)
        # Picking the hidden patches needs their number, which on an accelerator would mean waiting for it.
        if self.training and mask.device.type == "cpu" and images.device.type == "cpu":
            return self._on_hidden_patches(features, target, mask)
        return self._on_whole_images(features, target, mask)

    def _on_whole_images(self, features: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> MIMOutput:
        prediction = self.decoder(features)
        wanted = prediction.to(target.dtype)
        weight = expand_mask(mask, self.encoder.stride).unsqueeze(1).to(target.dtype)
        channels = target.shape[1]

        def mean(error: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
            return (error * weight).sum(dims) / (weight.sum(dims) * channels).clamp(min=1)

        def compare() -> dict[str, torch.Tensor]:
            return {kind: mean(elementwise_loss(wanted, target, kind), (1, 2, 3)) for kind in ("l1", "l2")}

        loss = mean(elementwise_loss(wanted, target, self.loss), (0, 1, 2, 3))
        return MIMOutput(loss, lambda: prediction, compare)

    def _on_hidden_patches(self, features: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> MIMOutput:
        stride = self.encoder.stride
        hidden = mask.flatten().bool().nonzero().squeeze(1)
        batch, channels, height, width = target.shape
        cells = target.view(batch, channels, height // stride, stride, width // stride, stride)
        wanted = cells.permute(0, 2, 4, 1, 3, 5).flatten(0, 2).index_select(0, hidden).flatten(1)
        predicted = self.decoder(features, hidden).to(target.dtype)

        def compare() -> dict[str, torch.Tensor]:
            counts = mask.flatten(1).sum(1).clamp(min=1).to(target.dtype)
            sample = hidden // mask[0].numel()
            losses = {}
            for kind in ("l1", "l2"):
                each = elementwise_loss(predicted, wanted, kind).mean(1)
                losses[kind] = counts.new_zeros(batch).index_add(0, sample, each) / counts
            return losses

        error = elementwise_loss(predicted, wanted, self.loss)
        loss = error.sum() / max(error.numel(), 1)
        return MIMOutput(loss, lambda: self.decoder(features), compare)

    def reconstruct(self, images: torch.Tensor, prediction: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Fill the hidden patches of images with what was predicted, so that a person can look at it.

        The prediction is of locally normalised pixels. It is turned back with the mean and deviation of the true
        image's own neighbourhoods, which the model never saw: colour and contrast are the image's, structure is the
        model's.

        Args:
            images: (B, 3, H, W) as the model was given them.
            prediction: (B, 3, H, W), ``MIMOutput.prediction``.
            mask: (B, H/32, W/32), True = hidden.

        Returns:
            (B, 3, H, W), in the space of ``images``.
        """
        filled = prediction.to(images.dtype)
        if self.target_window is not None:
            mean, deviation = local_statistics(images, self.target_window)
            filled = (prediction.double() * deviation + mean).to(images.dtype)
        return torch.where(expand_mask(mask.bool(), self.encoder.stride).unsqueeze(1), filled, images)

    def no_weight_decay(self, fidelity: str = "paper") -> set[str]:
        """Name the parameters, beside vectors and biases, that weight decay leaves alone.

        Args:
            fidelity: "paper": mask token, bias MLPs and logit scales; "released": the mask token only, for the released
                pre-training code decays the others by a slip in their names.

        Raises:
            ValueError: an unknown fidelity.
        """
        if fidelity not in ("paper", "released"):
            raise ValueError(f'fidelity is "paper" or "released", not "{fidelity}"')
        names = {n for n, _ in self.named_parameters() if "cpb_mlp" in n or "logit_scale" in n}
        return {"encoder.mask_token"} | (names if fidelity == "paper" else set())

    def set_grad_checkpointing(self, enable: bool = True, **options: Any) -> None:
        """Recompute blocks of encoder and decoder in the backward pass; ``options`` as in the encoder."""
        self.encoder.set_grad_checkpointing(enable=enable, **options)
        self.decoder.set_grad_checkpointing(enable=enable, **options)
