"""A ConvNeXt of timm's as an encoder, with a mask token after its stem."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from timm.models.convnext import ConvNeXt as TimmConvNeXt
from torch import Tensor, nn

from mimscale.models import Encoder, EncoderSettings, set_checkpoints, spread_mask
from mimscale.registry import encoders
from mimscale.schema import key


class ConvNeXtSettings(EncoderSettings):
    """What a recipe's ``model`` section holds for it."""

    shape_keys = ("depths", "dims")

    # timm draws its drop path from torch's generator, so that it would differ with the number of ranks.
    drop_path: Annotated[float, Field(ge=0, le=0)] = key(0.0, "Drop rate; 0, for it is not keyed to samples.")
    depths: tuple[int, ...] = key((3, 3, 9, 3), "Blocks of each stage.", "Liu et al., 2022")
    dims: tuple[int, ...] = key((96, 192, 384, 768), "Channels of each stage.", "Liu et al., 2022")

    @property
    def patch(self) -> int:
        """The stem's convolution has 4 x 4 pixels."""
        return 4

    @property
    def pyramid(self) -> list[int]:
        """Every stage has a map of its own."""
        return list(self.dims)


@encoders.register("convnext_t")
class ConvNeXt(Encoder):
    """timm's ConvNeXt; see :class:`mimscale.models.Encoder` for the arguments that every encoder takes."""

    Settings = ConvNeXtSettings

    def __init__(
        self,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 0,
        drop_path: float = 0.0,
        mask_token: bool = False,
        depths: tuple[int, ...] = (3, 3, 9, 3),
        dims: tuple[int, ...] = (96, 192, 384, 768),
    ):
        super().__init__()
        whole = TimmConvNeXt(in_chans=in_chans, num_classes=0, depths=tuple(depths), dims=tuple(dims))
        self.stem, self.stages = whole.stem, whole.stages
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head: nn.Module = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, dims[0], 1, 1)) if mask_token else None
        self.img_size, self.in_chans, self.num_classes = (img_size, img_size), in_chans, num_classes
        self.patch_size, self.stride, self.num_features = 4, 4 * 2 ** (len(dims) - 1), dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        self.set_grad_checkpointing(False)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of all stages, in order."""
        return [block for stage in self.stages for block in stage.blocks]

    def forward(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        draw_keys: Tensor | None = None,
        output: str = "logits",
    ) -> Any:
        """See :class:`mimscale.models.Encoder`."""
        x = self.stem(images.to(self.norm.weight.dtype))
        if mask is not None:
            if self.mask_token is None:
                raise ValueError("this encoder was made with mask_token=False, so it takes no mask")
            x = torch.where(spread_mask(mask, x.shape[-2:], images.shape).unsqueeze(1), self.mask_token, x)
        maps = []
        for stage in self.stages:
            x = stage.downsample(x)
            for block in stage.blocks:
                x = block.checkpoint(block, x) if block.checkpoint and torch.is_grad_enabled() else block(x)
            maps.append(x)
        if output == "pyramid":
            return maps
        x = self.norm(x.permute(0, 2, 3, 1))
        return x.permute(0, 3, 1, 2) if output == "map" else self.head(x.mean(dim=(1, 2)))

    def no_weight_decay(self) -> set[str]:
        """The mask token."""
        return {"mask_token"} if self.mask_token is not None else set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """A downsampling layer belongs to the first block of its stage."""
        blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^stem|^mask_token", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    def set_grad_checkpointing(self, enable: bool = True, every: int = 1, **options: Any) -> None:
        """Recompute blocks in the backward pass."""
        set_checkpoints(self.blocks, enable, every, **options)
