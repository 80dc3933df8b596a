"""Swin Transformer V2, in the names of the released weights and in timm's dialect.

Image to feature map, as in the paper's Table 1 models: patch embedding and norm, mask token, four stages of blocks
whose residual branches end in a norm, patch merging between stages, final norm. Tokens are kept in window order
throughout (see ``windows``), and everything that is drawn at random is drawn once, before the blocks.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn as nn

from mimscale.models.attention import Positions, WindowAttention
from mimscale.models.drop_path import KEEP_ALL, Draw, draw_branches
from mimscale.models.encoder import Encoder, Form, as_map
from mimscale.models.fitting import check_sizes, reference_windows
from mimscale.models.layers import Linear, Mlp, PatchEmbed, PatchMerging, ResidualNorm, cut_patches, trunc_normal
from mimscale.models.recompute import Checkpoint, set_checkpoints
from mimscale.models.settings import SwinSettings
from mimscale.models.sizes import SWIN_SIZES
from mimscale.models.swin_plan import MapPlan, PlanCache, StagePlan, build_plan
from mimscale.models.weights.swin_forms import SwinHuggingFace, SwinTimm
from mimscale.torch_private import allow_graphs


class SwinBlock(nn.Module):
    """Attention and MLP, each a residual branch that ends in a norm (SwinV2, section 3.2: residual post-norm).

    Args:
        dim: channels C.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over C.
        extra_norm: end in one more norm, on the main branch (SwinV2's huge and giant models).
        own_bias: own a position bias; without, ``forward`` is given one.
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float = 4.0, extra_norm: bool = False, own_bias: bool = True
    ):
        super().__init__()
        self.norm1 = ResidualNorm(dim)
        self.attn = WindowAttention(dim, num_heads, own_bias)
        self.norm2 = ResidualNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.norm3 = nn.LayerNorm(dim) if extra_norm else None
        self.checkpoint: Checkpoint | None = None
        self.checkpoint_attention: Checkpoint | None = None

    def attention_branch(
        self, x: torch.Tensor, *bias: torch.Tensor, positions: Positions, factor: float | torch.Tensor
    ) -> torch.Tensor:
        """Attend within windows, norm and add: (B, L, C) to (B, L, C), tokens in window order."""
        attended = self.attn(x.reshape(-1, positions.tokens, x.shape[-1]), positions, *bias)
        return self.norm1(attended.view_as(x), x, factor)

    def forward(
        self,
        x: torch.Tensor,
        *bias: torch.Tensor,
        positions: Positions,
        draws: tuple[Draw, Draw] = (KEEP_ALL, KEEP_ALL),
    ) -> torch.Tensor:
        """Run the block.

        Args:
            x: (B, L, C), tokens in window order.
            *bias: (heads, N, N) position bias, where the block owns none.
            positions: of the way the windows are cut.
            draws: what drop path makes of the two branches.

        Returns:
            (B, L, C)
        """

        def attend(x: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
            branch = partial(self.attention_branch, positions=positions, factor=factor)
            recompute = self.checkpoint_attention if torch.is_grad_enabled() else None
            return recompute(branch, x, *bias) if recompute else branch(x, *bias)

        def mix(x: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
            return self.norm2(self.mlp(x), x, factor)

        x = draws[1].run(mix, draws[0].run(attend, x))
        return x if self.norm3 is None else self.norm3(x)


def run_blocks(
    blocks: Iterable[SwinBlock],
    x: torch.Tensor,
    *bias: torch.Tensor,
    plan: StagePlan,
    draws: Sequence[Draw] | None = None,
) -> tuple[torch.Tensor, int]:
    """Run blocks one after the other, moving tokens where the shift changes.

    Args:
        blocks: the first of them cuts windows unshifted, the next shifted, and so on.
        x: (B, L, C), tokens in the unshifted order.
        *bias: (heads, N, N) position bias for all blocks, where they own none.
        plan: of the map.
        draws: what drop path makes of the two branches of each block; None keeps all.

    Returns:
        (B, L, C), and which order its tokens are in: 0 unshifted, 1 shifted.
    """
    shifted = 0
    for j, block in enumerate(blocks):
        shifted = j % 2
        if j:
            x = plan.moves[shifted](x)
        drawn = (KEEP_ALL, KEEP_ALL) if draws is None else (draws[2 * j], draws[2 * j + 1])
        run = partial(block, positions=plan.positions[shifted], draws=drawn)
        recompute = block.checkpoint if torch.is_grad_enabled() else None
        x = recompute(run, x, *bias) if recompute else run(x, *bias)
    return x, shifted


class SwinStage(nn.Module):
    """The blocks of one resolution, and the merging that leaves it."""

    def __init__(self, blocks: list[SwinBlock], downsample: PatchMerging | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class SwinTransformerV2(Encoder):
    """Swin Transformer V2 (the paper's Table 1 and section 3.2).

    Args:
        img_size: height and width of the images, one number where they are equal.
        window_size: of the attention, in tokens; clipped where a stage's map is smaller.
        pretrained_window_size: window at pre-training, where it differed: one number, or one for each stage. 0: the
            same.
        drop_path: drop rate of the last block; rates rise linearly from 0.
        num_classes: outputs of the classifier; 0 for none.
        embed_dim: channels of the first stage.
        depths: blocks of each stage.
        num_heads: heads of each stage.
        mlp_ratio: hidden width of the MLPs over their width.
        patch_size: side of a patch, in pixels.
        in_chans: channels of the images.
        mask_token: own the token that stands for hidden patches; False for transfer.
        extra_norm_every: k, to end every k-th block in one more norm; 0 for none.
        pad_windows: pad maps that the window does not divide, instead of raising.

    Raises:
        ValueError: sizes that do not divide; the message says which would fit.
    """

    Settings = SwinSettings
    sizes = SWIN_SIZES
    exports: ClassVar[dict[str, Form]] = {"timm": SwinTimm(), "huggingface": SwinHuggingFace()}

    def __init__(
        self,
        img_size: int | Sequence[int] = 192,
        window_size: int = 12,
        pretrained_window_size: int | Sequence[int] = 0,
        drop_path: float = 0.1,
        num_classes: int = 0,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 18, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        patch_size: int = 4,
        in_chans: int = 3,
        mask_token: bool = True,
        extra_norm_every: int = 0,
        pad_windows: bool = False,
    ):
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        check_sizes((height, width), window_size, embed_dim, depths, num_heads, patch_size, pad_windows)
        self.img_size, self.window_size, self.patch_size = (height, width), window_size, patch_size
        self.embed_dim, self.depths, self.num_heads = embed_dim, tuple(depths), tuple(num_heads)
        self.in_chans, self.drop_path, self.num_classes = in_chans, drop_path, num_classes
        self.stride = patch_size * 2 ** (len(depths) - 1)
        self.num_features = embed_dim * 2 ** (len(depths) - 1)
        self.references = reference_windows(
            (height // patch_size, width // patch_size), window_size, pretrained_window_size, len(depths)
        )
        self.feature_info = [
            {"num_chs": embed_dim * 2**i, "reduction": patch_size * 2**i, "module": f"layers.{i}"}
            for i in range(len(depths))
        ]
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        if mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
            trunc_normal(self.mask_token)
        else:
            self.register_parameter("mask_token", None)
        self.layers: Any = nn.ModuleList()
        for i, depth in enumerate(depths):
            dim = embed_dim * 2**i
            blocks = [
                SwinBlock(dim, num_heads[i], mlp_ratio, bool(extra_norm_every) and (j + 1) % extra_norm_every == 0)
                for j in range(depth)
            ]
            self.layers.append(SwinStage(blocks, PatchMerging(dim) if i + 1 < len(depths) else None))
        self.norm = nn.LayerNorm(self.num_features)
        self.head: nn.Module = nn.Identity()
        if num_classes:
            self.head = Linear(self.num_features, num_classes)
        depth = sum(depths)
        rates = [drop_path * block / max(depth - 1, 1) for block in range(depth) for _ in range(2)]
        self.drop_rates = rates if drop_path else None
        self.compiled = False
        self._plans = PlanCache()

    # --- images to features ---------------------------------------------------------------------------------------

    def forward(
        self,
        images: torch.Tensor,
        mask: torch.Tensor | None = None,
        draw_keys: torch.Tensor | None = None,
        output: str = "logits",
    ) -> Any:
        """Run the encoder; every use goes through here, so that ZeRO-3 gathers the parameters it owns.

        Args:
            images: (B, 3, H, W), normalised, any floating dtype; H and W multiples of the patch.
            mask: (B, h, w) bool, such as (B, H/32, W/32), True where the mask token replaces the patches of a cell; or None.
            draw_keys: (B,) int64 that the drop-path decisions derive from; None draws from torch's generator.
            output: "logits" (B, num_classes), or pooled features (B, 8C) where there is no classifier; "map"
                (B, 8C, H/32, W/32) after the final norm; "pyramid" a list of each stage's map, before the final norm.

        Returns:
            As ``output`` says.

        Raises:
            ValueError: an image, mask or key of the wrong shape.
        """
        if output not in ("logits", "map", "pyramid"):
            raise ValueError(f'output is "logits", "map" or "pyramid", not "{output}"')
        maps = self._stages(images, mask, draw_keys, every=output == "pyramid")
        if output == "pyramid":
            return [as_map(x, size) for x, size in maps]
        x, size = maps[-1]
        x = self.norm(x)
        return as_map(x, size) if output == "map" else self.head(x.mean(dim=1))

    def _stages(
        self, images: torch.Tensor, mask: torch.Tensor | None, draw_keys: torch.Tensor | None, every: bool
    ) -> list[tuple[torch.Tensor, tuple[int, int]]]:
        """Run all blocks; tokens (B, L, C), row by row, and map size: of the last stage, or of every stage."""
        plan = self._plan(images)
        x = self.patch_embed(plan.stages[0].enter(cut_patches(images, self.patch_size)))
        if mask is not None:
            x = torch.where(plan.spread_mask(mask, images.shape), self._token(), x)
        draws = None
        if self.training and self.drop_rates:
            draws = draw_branches(self.drop_rates, len(images), draw_keys, images.device, x.dtype, self.compiled)
        maps, done = [], 0
        for layer, stage in zip(self.layers, plan.stages, strict=True):
            drawn = None if draws is None else draws[2 * done : 2 * (done + len(layer.blocks))]
            x, order = run_blocks(layer.blocks, x, plan=stage, draws=drawn)
            done += len(layer.blocks)
            if every or layer.downsample is None:
                maps.append((stage.leave[order](x), stage.size))
            if layer.downsample is not None:
                x = layer.downsample(stage.merge[order](x))
        return maps

    def _token(self) -> torch.Tensor:
        if self.mask_token is None:
            raise ValueError("this encoder was made with mask_token=False, so it takes no mask")
        return self.mask_token

    def _plan(self, images: torch.Tensor) -> MapPlan:
        height, width = images.shape[-2:]
        p = self.patch_size
        if images.ndim != 4 or images.shape[1] != self.in_chans or height % p or width % p:
            raise ValueError(
                f"images must be (B, {self.in_chans}, H, W) with H and W multiples of the patch size {p}, "
                f"not {tuple(images.shape)}"
            )
        dtype = torch.float64 if self.norm.weight.dtype == torch.float64 else torch.float32
        grid = (height // p, width // p)
        make = partial(build_plan, grid, self.window_size, self.references, images.device, dtype)
        return self._plans.get((grid, images.device, dtype), make)

    # --- timm's dialect -------------------------------------------------------------------------------------------

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (B, 3, H, W) to features (B, H/32, W/32, 8C) after the final norm, as timm does."""
        return self(images, output="map").permute(0, 2, 3, 1)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool features (B, h, w, 8C) and classify: (B, num_classes); (B, 8C) with ``pre_logits``."""
        x = x.mean(dim=(1, 2))
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        images: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        intermediates_only: bool = False,
    ) -> Any:
        """Give the maps of stages, as timm does.

        Args:
            images: (B, 3, H, W).
            indices: which stages; a number means the last so many, None all.
            norm: apply the final norm to the last stage's map.
            intermediates_only: leave out the features after the final norm.

        Returns:
            A list of maps (B, C, h, w), or (features (B, h, w, 8C), that list).
        """
        count = len(self.layers)
        wanted = range(count) if indices is None else indices
        wanted = range(count - wanted, count) if isinstance(wanted, int) else [i % count for i in wanted]
        maps = self(images, output="pyramid")
        final = None
        if norm or not intermediates_only:
            final = self.norm(maps[-1].permute(0, 2, 3, 1))
            maps = [*maps[:-1], final.permute(0, 3, 1, 2)] if norm else maps
        chosen = [maps[i] for i in wanted]
        return chosen if intermediates_only else (final, chosen)

    @property
    def trained_at(self) -> dict[str, Any]:
        """The window, for each stage, that the position bias was trained in."""
        return {"pretrained_window_size": [rows for rows, _ in self.references]}

    def no_weight_decay(self) -> set[str]:
        """Name the parameters with more than one dimension that weight decay leaves alone (the paper's intent)."""
        return {n for n, _ in self.named_parameters() if n == "mask_token" or "cpb_mlp" in n or "logit_scale" in n}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group parameters into layers: patch embedding, each block, then norm and head together.

        A merging layer belongs to the last block of its stage.
        """
        merging = [(rf"^layers\.({i})\.downsample", (depth - 1,)) for i, depth in enumerate(self.depths)]
        blocks = r"^layers\.(\d+)" if coarse else [(r"^layers\.(\d+)\.blocks\.(\d+)", None), *merging]
        return {"stem": r"^patch_embed|^mask_token", "blocks": blocks}

    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one with ``num_classes`` outputs; 0 for none.

        Raises:
            ValueError: pooling other than "avg".
        """
        if global_pool not in (None, "avg"):
            raise ValueError(f'SwinV2 pools by "avg", not "{global_pool}"')
        self.num_classes = num_classes
        weight = self.norm.weight
        self.head = (
            Linear(self.num_features, num_classes).to(weight.device, weight.dtype) if num_classes else nn.Identity()
        )

    def set_grad_checkpointing(
        self,
        enable: bool = True,
        every: int = 1,
        attention_only: bool = False,
        checkpoint_fn: Checkpoint | None = None,
    ) -> None:
        """Recompute blocks in the backward pass instead of storing their activations.

        Args:
            enable: False stores everything.
            every: recompute every k-th block only.
            attention_only: recompute only the attention branch of those blocks.
            checkpoint_fn: called as ``checkpoint_fn(function, x)``; by default torch's, run to the end.

        Raises:
            ValueError: ``every`` below 1.
        """
        set_checkpoints(self.blocks, enable, every, attention_only, checkpoint_fn)

    @property
    def blocks(self) -> list[SwinBlock]:
        """The blocks of all stages, in order."""
        return [block for layer in self.layers for block in layer.blocks]

    def compile_blocks(self, **options: Any) -> None:
        """Compile every block by itself (``torch.compile``): minutes at the first step, faster after it."""
        self.compiled = True
        # A graph for each stage, shifted or not, in training and in validation, where batches have a size of their own.
        allow_graphs(8 * len(self.depths))
        super().compile_blocks(**options)
