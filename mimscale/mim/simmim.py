"""SimMIM (the paper, section 3.1): mask squares, encode the image with mask tokens in their place, predict their pixels."""

from __future__ import annotations

import torch

from mimscale.masking import SIMMIM_PATCH, SIMMIM_RATIO, MaskGeometry
from mimscale.mim.masking import expand_mask
from mimscale.mim.objective import MIMObjective, check_fidelity, check_mask
from mimscale.mim.output import MIMOutput, check_loss, elementwise_loss
from mimscale.mim.settings import SimMIMSettings, check_mask_patch
from mimscale.mim.targets import Target, create_target
from mimscale.models.decoders import create_decoder
from mimscale.models.encoder import Encoder


class SimMIM(MIMObjective):
    """Masked image modelling with an encoder that sees mask tokens and a light decoder.

    Args:
        encoder: one with a mask token and no classifier.
        decoder: "linear", "4-blocks" or "8-blocks" (the paper's Table 4; blocks are SwinV2's).
        loss: "l2" (the paper) or "l1" (the released code).
        target_window: side of the neighbourhood that normalises the target; None for raw pixels.
        mask_patch: side in pixels of the squares that are masked: any multiple of the encoder's patch.
        mask_ratio: share of them that is masked, for ``mask_geometry``.
        target: what is predicted instead of pixels, whose ``target_window`` is then of no account.

    Raises:
        ValueError: an unknown decoder or loss; an even window; an encoder without a mask token; strides that do not divide.
    """

    Settings = SimMIMSettings
    mask_token = True

    def __init__(
        self,
        encoder: Encoder,
        decoder: str = "linear",
        loss: str = "l2",
        target_window: int | None = 47,
        mask_patch: int = SIMMIM_PATCH,
        mask_ratio: float = SIMMIM_RATIO,
        target: Target | None = None,
    ):
        super().__init__()
        if getattr(encoder, "mask_token", None) is None or encoder.num_classes:
            raise ValueError(
                "SimMIM needs an encoder with a mask token and without a classifier: create_encoder(..., mask_token=True)"
            )
        check_mask_patch(mask_patch, encoder.patch_size, type(encoder).__name__)
        if target is None:
            kind, options = (
                ("raw-pixels", {}) if target_window is None else ("normalised-pixels", {"window": target_window})
            )
            target = create_target(kind, encoder.in_chans, **options)
        for side, of in ((encoder.stride, "the encoder's stride"), (mask_patch, "mask_patch")):
            if side % target.stride:
                raise ValueError(f"{of}, {side}, is not a multiple of the target's stride, {target.stride}")
        self.encoder, self.predicts = encoder, target
        self.decoder = create_decoder(decoder, encoder, encoder.stride // target.stride, target.channels)
        self.loss = check_loss(loss)
        self.mask_patch, self.mask_ratio = mask_patch, mask_ratio

    @classmethod
    def from_settings(cls, encoder: Encoder, settings: SimMIMSettings) -> SimMIM:
        """Make it for a recipe; see :meth:`MIMObjective.from_settings`."""
        window, target = settings.target_window, None
        if settings.target is not None:
            options = dict(settings.target_options)
            if settings.target == "normalised-pixels" and window is not None:
                options = {"window": window, **options}
            target = create_target(settings.target, encoder.in_chans, **options)
        loss = settings.loss or cls.Settings.losses["paper"]
        return cls(encoder, settings.decoder, loss, window, settings.mask_patch, settings.mask_ratio, target)

    @property
    def mask_geometry(self) -> MaskGeometry:
        """Squares of ``mask_patch``, the masked rounded up."""
        return MaskGeometry.of(self.encoder.img_size, self.mask_patch, self.mask_ratio)

    def encode(
        self, images: torch.Tensor, mask: torch.Tensor | None = None, draw_keys: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Encode images (B, C, H, W), masked where mask (B, H/mask_patch, W/mask_patch) is True, to the encoder's map."""
        return self.encoder(images, mask=mask, draw_keys=draw_keys, output="map")

    def target(self, images: torch.Tensor) -> torch.Tensor:
        """Give what is to be predicted of images (B, C, H, W), as its :class:`Target` does: of pixels (B, C, H, W)."""
        return self.predicts(images)

    def forward(self, images: torch.Tensor, mask: torch.Tensor, draw_keys: torch.Tensor | None = None) -> MIMOutput:
        """Predict the masked pixels.

        In training only the masked patches are predicted and compared; the whole prediction is made if it is asked for.

        Args:
            images: (B, C, H, W), normalised by ImageNet's mean and deviation, fp32.
            mask: (B, H/mask_patch, W/mask_patch) bool, True = masked.
            draw_keys: (B,) int64, one per sample draw, that drop-path decisions derive from.

        Returns:
            The loss, and on demand the prediction and the losses of every image.

        Raises:
            ValueError: shapes that do not fit.
        """
        check_mask(mask, images, self.mask_patch)
        features = self.encode(images, mask, draw_keys)
        target = self.target(images)
        # Picking the masked patches needs their number, which on an accelerator would mean waiting for it. Masks finer than a
        # feature leave some of what it predicts visible.
        whole, stride = self.mask_patch, self.encoder.stride
        if self.training and mask.device.type == "cpu" and images.device.type == "cpu" and not whole % stride:
            return self._on_masked_patches(features, target, expand_mask(mask, whole // stride))
        return self._on_whole_images(features, target, mask)

    def _on_whole_images(self, features: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> MIMOutput:
        prediction = self.decoder(features)
        wanted = prediction.to(target.dtype)
        weight = expand_mask(mask, self.mask_patch // self.predicts.stride).unsqueeze(1).to(target.dtype)
        channels = target.shape[1]

        def mean(error: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
            return (error * weight).sum(dims) / (weight.sum(dims) * channels).clamp(min=1)

        def compare() -> dict[str, torch.Tensor]:
            return {kind: mean(elementwise_loss(wanted, target, kind), (1, 2, 3)) for kind in ("l1", "l2")}

        loss = mean(elementwise_loss(wanted, target, self.loss), (0, 1, 2, 3))
        return MIMOutput(loss, lambda: prediction, compare)

    def _on_masked_patches(self, features: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> MIMOutput:
        """``mask`` has a cell for every feature."""
        stride = self.encoder.stride // self.predicts.stride
        masked = mask.flatten().bool().nonzero().squeeze(1)
        batch, channels, height, width = target.shape
        cells = target.view(batch, channels, height // stride, stride, width // stride, stride)
        wanted = cells.permute(0, 2, 4, 1, 3, 5).flatten(0, 2).index_select(0, masked).flatten(1)
        predicted = self.decoder(features, masked).to(target.dtype)

        def compare() -> dict[str, torch.Tensor]:
            counts = mask.flatten(1).sum(1).clamp(min=1).to(target.dtype)
            sample = masked // mask[0].numel()
            losses = {}
            for kind in ("l1", "l2"):
                each = elementwise_loss(predicted, wanted, kind).mean(1)
                losses[kind] = counts.new_zeros(batch).index_add(0, sample, each) / counts
            return losses

        error = elementwise_loss(predicted, wanted, self.loss)
        loss = error.sum() / max(error.numel(), 1)
        return MIMOutput(loss, lambda: self.decoder(features), compare)

    def reconstruct(self, images: torch.Tensor, prediction: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Fill the masked parts of images with what was predicted; grey, where the target has no way back to pixels.

        Args:
            images: (B, C, H, W) as the model was given them.
            prediction: ``MIMOutput.prediction``; of pixels (B, C, H, W).
            mask: (B, H/mask_patch, W/mask_patch), True = masked.

        Returns:
            (B, C, H, W), in the space of ``images``.
        """
        filled = self.predicts.pixels(prediction, images)
        masked = expand_mask(mask.bool(), self.mask_patch).unsqueeze(1)
        return torch.where(masked, torch.zeros_like(images) if filled is None else filled, images)

    def no_weight_decay(self, fidelity: str = "paper") -> set[str]:
        """Name the parameters, beside vectors and biases, that weight decay leaves alone.

        Args:
            fidelity: "paper": tokens, bias MLPs and logit scales; "released": tokens only, for the released pre-training code
                decays the others by a slip in their names.

        Raises:
            ValueError: an unknown fidelity.
        """
        check_fidelity(fidelity)
        spared = self.encoder.no_weight_decay()
        if fidelity == "released":
            return {f"encoder.{name}" for name in spared if name.endswith("_token")}
        return {f"encoder.{name}" for name in spared} | {f"decoder.{name}" for name in self.decoder.no_weight_decay()}
