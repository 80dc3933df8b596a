"""The plain vision transformer of the paper's MAE runs, in MAE's names and in timm's dialect."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from mimscale.models.drop_path import KEEP_ALL, Draw, draw_branches
from mimscale.models.encoder import Encoder, Form, as_map, spread_mask
from mimscale.models.layers import PatchProjection, XavierLinear, cut_patches, trunc_normal, xavier
from mimscale.models.recompute import Checkpoint, set_checkpoints
from mimscale.models.settings import VitSettings
from mimscale.models.sizes import VIT_SIZES
from mimscale.models.weights.vit_forms import VitTimm

NORM_EPSILON = 1e-6
HEAD_STD = 2e-5


class VitHead(XavierLinear):
    """A classifier that starts at nearly nothing: trunc_normal(2e-5) with a zero bias (MAE's fine-tuning)."""

    def reset_parameters(self) -> None:
        """Set the starting values; called by the constructor."""
        trunc_normal(self.weight, HEAD_STD)
        nn.init.zeros_(self.bias)


class VitAttention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = XavierLinear(dim, 3 * dim)
        self.proj = XavierLinear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, L, C) to (B, L, C)."""
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, dim))


class VitMlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = XavierLinear(dim, hidden)
        self.fc2 = XavierLinear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., C) to (..., C)."""
        return self.fc2(F.gelu(self.fc1(x)))


class VitBlock(nn.Module):
    """Attention and MLP, each a residual branch that begins with a norm; timm's ``Block`` in names and numbers."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPSILON)
        self.attn = VitAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPSILON)
        self.mlp = VitMlp(dim, int(dim * mlp_ratio))
        self.checkpoint: Checkpoint | None = None
        self.checkpoint_attention: Checkpoint | None = None

    def attention_branch(self, x: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
        """Norm, attend and add: (B, L, C) to (B, L, C)."""
        return x + _times(self.attn(self.norm1(x)), factor)

    def forward(self, x: torch.Tensor, draws: tuple[Draw, Draw] = (KEEP_ALL, KEEP_ALL)) -> torch.Tensor:
        """Run the block on (B, L, C); ``draws`` is what drop path makes of the two branches."""

        def attend(x: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
            branch = partial(self.attention_branch, factor=factor)
            recompute = self.checkpoint_attention if torch.is_grad_enabled() else None
            return recompute(branch, x) if recompute else branch(x)

        def mix(x: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
            return x + _times(self.mlp(self.norm2(x)), factor)

        return draws[1].run(mix, draws[0].run(attend, x))


def _times(branch: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
    return branch if isinstance(factor, float) and factor == 1.0 else branch * factor


def run_vit_blocks(blocks: Any, x: torch.Tensor, draws: Sequence[Draw] | None = None) -> torch.Tensor:
    """Run blocks on (B, L, C), recomputing those that are set to; two of ``draws`` for each block, None keeps all."""
    for j, block in enumerate(blocks):
        run = partial(block, draws=(KEEP_ALL, KEEP_ALL) if draws is None else (draws[2 * j], draws[2 * j + 1]))
        x = block.checkpoint(run, x) if block.checkpoint and torch.is_grad_enabled() else run(x)
    return x


def sincos_positions(
    dim: int, grid: tuple[int, int], trained: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Fixed sine-cosine positions of a grid of patches, after a row of zeros for the class token.

    The first half of the channels encodes the column, the second the row, as in the released weights. A grid of another
    size than the trained one is stretched over it, so that corners stay corners. Worked out from integers every time: a
    stored table would lose its precision when the model is cast to bf16, and frozen parameters trip ZeRO-3.

    Args:
        dim: channels, a multiple of 4.
        grid: rows and columns of patches.
        trained: rows and columns at training.
        device: of the result.
        dtype: of the result.

    Returns:
        (1, 1 + rows * columns, dim)
    """
    exact = torch.float64 if device.type == "cpu" else torch.float32
    frequency = 10000.0 ** -(torch.arange(dim // 4, device=device, dtype=exact) / (dim / 4))

    def axis(count: int, reference: int) -> torch.Tensor:
        place = (torch.arange(count, device=device, dtype=exact) + 0.5) * (reference / count) - 0.5
        angle = place[:, None] * frequency
        return torch.cat((angle.sin(), angle.cos()), dim=1)

    rows, columns = axis(grid[0], trained[0]), axis(grid[1], trained[1])
    table = torch.cat((columns[None].expand(grid[0], -1, -1), rows[:, None].expand(-1, grid[1], -1)), dim=-1)
    return torch.cat((table.new_zeros(1, dim), table.reshape(-1, dim))).unsqueeze(0).to(dtype)


def drop_positions(state: dict[str, torch.Tensor], name: str, dim: int, grid: tuple[int, int]) -> None:
    """Take a stored position table out of ``state``, if it says what ``sincos_positions`` works out.

    Raises:
        ValueError: a table of another grid, or one that was learned.
    """
    if name not in state:
        return
    stored = state.pop(name)
    expected = sincos_positions(dim, grid, grid, torch.device("cpu"), torch.float32)
    if stored.shape != expected.shape:
        raise ValueError(
            f"{name} in the file is {tuple(stored.shape)}, but {grid[0]} x {grid[1]} patches make {tuple(expected.shape)}: "
            "make the encoder with the img_size that it was trained at; it takes images of other sizes as they are"
        )
    if (stored.float() - expected).abs().max() > 1e-3:
        raise ValueError(
            f"{name} in the file was learned: make the encoder with learned_positions=True, which a fine-tuning recipe calls "
            "model.learned_positions=true"
        )


class VitPatchEmbed(nn.Module):
    """Patches to tokens: a linear projection."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.proj = PatchProjection(in_chans, embed_dim, patch_size, start=xavier)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Embed patches (B, L, 3 * patch * patch) as tokens (B, L, C)."""
        return self.proj(patches)


class VisionTransformer(Encoder):
    """A vision transformer as MAE uses it: class token, fixed sine-cosine positions, pre-norm blocks.

    What is masked is left out (``visible``), as MAE does it, or replaced by a mask token, as SimMIM does it.

    Args:
        img_size: height and width of the images, one number where they are equal.
        patch_size: side of a patch, in pixels.
        embed_dim: channels C.
        depth: blocks.
        num_heads: heads of every block.
        drop_path: drop rate of the last block; rates rise linearly from 0.
        num_classes: outputs of the classifier; 0 for none.
        mlp_ratio: hidden width of the MLPs over C.
        in_chans: channels of the images.
        global_pool: what is classified: "avg", the mean of the patches through a norm of its own, which then takes the
            final norm's place (MAE's fine-tuning); "token", the class token.
        learned_positions: positions are a parameter that starts at the sine-cosine values (MAE's fine-tuning).
        mask_token: own the token that stands for masked patches.

    Raises:
        ValueError: sizes that do not divide; the message says which would fit.
    """

    Settings = VitSettings
    sizes = VIT_SIZES
    exports: ClassVar[dict[str, Form]] = {"timm": VitTimm()}
    takes_visible = True

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        drop_path: float = 0.0,
        num_classes: int = 0,
        mlp_ratio: float = 4.0,
        in_chans: int = 3,
        global_pool: str = "avg",
        learned_positions: bool = False,
        mask_token: bool = False,
    ):
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        check_vit_sizes((height, width), patch_size, embed_dim, num_heads)
        self.img_size, self.patch_size, self.stride = (height, width), patch_size, patch_size
        self.grid = (height // patch_size, width // patch_size)
        self.embed_dim = self.num_features = embed_dim
        self.depth, self.num_heads, self.in_chans = depth, num_heads, in_chans
        self.drop_path, self.num_classes = drop_path, num_classes
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{i}"} for i in range(depth)
        ]
        self.patch_embed = VitPatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        trunc_normal(self.cls_token)
        if mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
            trunc_normal(self.mask_token)
        else:
            self.register_parameter("mask_token", None)
        self.pos_embed: nn.Parameter | None = None
        if learned_positions:
            start = sincos_positions(embed_dim, self.grid, self.grid, self.cls_token.device, self.cls_token.dtype)
            self.pos_embed = nn.Parameter(start)
        self.blocks: Any = nn.ModuleList(VitBlock(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm: nn.Module = nn.LayerNorm(embed_dim, eps=NORM_EPSILON)
        self.fc_norm: nn.Module = nn.Identity()
        self.head: nn.Module = nn.Identity()
        self.global_pool = global_pool
        if num_classes:
            self.reset_classifier(num_classes, global_pool)
        rates = [drop_path * block / max(depth - 1, 1) for block in range(depth) for _ in range(2)]
        self.drop_rates = rates if drop_path else None
        self.compiled = False

    def forward(
        self,
        images: torch.Tensor,
        mask: torch.Tensor | None = None,
        draw_keys: torch.Tensor | None = None,
        output: str = "logits",
        visible: torch.Tensor | None = None,
    ) -> Any:
        """Run the encoder; every use goes through here, so that ZeRO-3 gathers the parameters it owns.

        Args:
            images: (B, 3, H, W), normalised, any floating dtype; H and W multiples of the patch.
            mask: (B, h, w) bool, such as (B, H/32, W/32), True where the mask token replaces the patches of a cell; or None.
            draw_keys: (B,) int64 that the drop-path decisions derive from; None draws from torch's generator.
            output: "logits" (B, num_classes), or pooled features (B, C) where there is no classifier; "tokens"
                (B, 1 + K, C), class token first, after the final norm; "map" (B, C, H/patch, W/patch); "pyramid" the
                map after each block, before the final norm.
            visible: (B, K) int64, the patches that are encoded, counted row by row; None for all.

        Returns:
            As ``output`` says.

        Raises:
            ValueError: an image or mask of the wrong shape; an unknown output; a map of visible patches only.
        """
        if output not in ("logits", "tokens", "map", "pyramid"):
            raise ValueError(f'output is "logits", "tokens", "map" or "pyramid", not "{output}"')
        if visible is not None and output in ("map", "pyramid"):
            raise ValueError(f'"{output}" needs all patches, so it takes no choice of visible ones')
        grid = self._grid(images)
        x = self.patch_embed(cut_patches(images, self.patch_size))
        if mask is not None:
            if self.mask_token is None:
                raise ValueError("this encoder was made with mask_token=False, so it takes no mask")
            masked = spread_mask(mask, grid, images.shape).flatten(1).unsqueeze(-1)
            x = torch.where(masked, self.mask_token, x)
        positions = self._positions(grid, x)
        x = x + positions[:, 1:]
        if visible is not None:
            x = x.gather(1, visible.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        x = torch.cat(((self.cls_token + positions[:, :1]).expand(len(x), -1, -1), x), dim=1)
        draws = None
        if self.training and self.drop_rates:
            draws = draw_branches(self.drop_rates, len(images), draw_keys, images.device, x.dtype, self.compiled)
        if output == "pyramid":
            maps = []
            for j in range(self.depth):
                x = run_vit_blocks(self.blocks[j : j + 1], x, None if draws is None else draws[2 * j : 2 * j + 2])
                maps.append(as_map(x[:, 1:], grid))
            return maps
        x = run_vit_blocks(self.blocks, x, draws)
        if output == "logits":
            return self.head(self._pool(x))
        x = self.norm(x)
        return x if output == "tokens" else as_map(x[:, 1:], grid)

    def _pool(self, x: torch.Tensor) -> torch.Tensor:
        """Pool tokens (B, L, C) before any norm to (B, C)."""
        if self.global_pool == "token":
            return self.norm(x)[:, 0]
        return self.fc_norm(self.norm(x)[:, 1:].mean(dim=1))

    def _grid(self, images: torch.Tensor) -> tuple[int, int]:
        p = self.patch_size
        if images.ndim != 4 or images.shape[1] != self.in_chans or images.shape[2] % p or images.shape[3] % p:
            raise ValueError(
                f"images must be (B, {self.in_chans}, H, W) with H and W multiples of the patch size {p}, "
                f"not {tuple(images.shape)}"
            )
        return images.shape[2] // p, images.shape[3] // p

    def _positions(self, grid: tuple[int, int], x: torch.Tensor) -> torch.Tensor:
        if self.pos_embed is None:
            return sincos_positions(self.embed_dim, grid, self.grid, x.device, x.dtype)
        if grid == self.grid:
            return self.pos_embed
        table = self.pos_embed[:, 1:].float().transpose(1, 2).reshape(1, -1, *self.grid)
        table = F.interpolate(table, size=grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
        return torch.cat((self.pos_embed[:, :1], table.to(x.dtype)), dim=1)

    def fixed_positions(self) -> torch.Tensor:
        """Give the sine-cosine positions at the size it was made for, as files store them: (1, 1 + L, C), fp32, on the CPU."""
        return sincos_positions(self.embed_dim, self.grid, self.grid, torch.device("cpu"), torch.float32)

    def drop_tables(self, state: dict[str, torch.Tensor], prefix: str) -> None:
        """Take the stored positions out of ``state``, where this encoder works them out.

        Raises:
            ValueError: positions that this encoder does not have.
        """
        if self.pos_embed is None:
            drop_positions(state, f"{prefix}pos_embed", self.embed_dim, self.grid)

    # --- timm's dialect -------------------------------------------------------------------------------------------

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (B, 3, H, W) to tokens (B, 1 + L, C), class token first, after the final norm."""
        return self(images, output="tokens")

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool tokens (B, 1 + L, C) and classify: (B, num_classes); (B, C) with ``pre_logits``."""
        pooled = x[:, 0] if self.global_pool == "token" else self.fc_norm(x[:, 1:].mean(dim=1))
        return pooled if pre_logits else self.head(pooled)

    def forward_intermediates(
        self,
        images: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        intermediates_only: bool = False,
    ) -> Any:
        """Give the maps after blocks, as timm does.

        Args:
            images: (B, 3, H, W).
            indices: which blocks; a number means the last so many, None all.
            norm: apply the final norm to the maps.
            intermediates_only: leave out the tokens after the final norm.

        Returns:
            A list of maps (B, C, h, w), or (tokens (B, 1 + L, C), that list).
        """
        wanted = range(self.depth) if indices is None else indices
        wanted = range(self.depth - wanted, self.depth) if isinstance(wanted, int) else [i % self.depth for i in wanted]
        maps = self(images, output="pyramid")
        chosen = [maps[i] for i in wanted]
        if norm:
            chosen = [self.norm(m.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for m in chosen]
        return chosen if intermediates_only else (self(images, output="tokens"), chosen)

    def no_weight_decay(self) -> set[str]:
        """Name the parameters with more than one dimension that weight decay leaves alone."""
        tokens = {"cls_token": self.cls_token, "mask_token": self.mask_token, "pos_embed": self.pos_embed}
        return {name for name, token in tokens.items() if token is not None}

    @property
    def trained_at(self) -> dict[str, Any]:
        """The side of the images that its positions belong to."""
        return {"pretrained_image_size": self.img_size[0]}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group parameters into layers: tokens and patch embedding, each block, then norm and head together."""
        return {"stem": r"^cls_token|^mask_token|^pos_embed|^patch_embed", "blocks": [(r"^blocks\.(\d+)", None)]}

    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one with ``num_classes`` outputs; 0 for none.

        Raises:
            ValueError: pooling other than "avg" or "token".
        """
        pool = global_pool or self.global_pool
        if pool not in ("avg", "token"):
            raise ValueError(f'a ViT pools by "avg" or "token", not "{pool}"')
        self.global_pool, self.num_classes = pool, num_classes
        weight = self.cls_token

        def norm() -> nn.Module:
            return nn.LayerNorm(self.embed_dim, eps=NORM_EPSILON).to(weight.device, weight.dtype)

        # MAE's fine-tuning norms what it has pooled, instead of the final norm.
        if num_classes and pool == "avg":
            self.norm, self.fc_norm = nn.Identity(), norm()
        elif isinstance(self.norm, nn.Identity):
            self.norm, self.fc_norm = norm(), nn.Identity()
        self.head = nn.Identity()
        if num_classes:
            self.head = VitHead(self.embed_dim, num_classes).to(weight.device, weight.dtype)

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

    def compile_blocks(self, **options: Any) -> None:
        """Compile every block by itself (``torch.compile``): minutes at the first step, faster after it."""
        self.compiled = True
        super().compile_blocks(**options)


def check_vit_sizes(image: tuple[int, int], patch: int, embed_dim: int, num_heads: int) -> None:
    """Check that patches divide the image, heads the width, and that positions have four equal parts.

    Raises:
        ValueError: naming what does not divide, and what would fit.
    """
    for side in image:
        if side < patch or side % patch:
            low = max(side // patch, 1) * patch
            raise ValueError(f"img_size {side} is not whole patches of {patch}: [{low}, {low + patch}] would be")
    if num_heads < 1 or embed_dim % num_heads:
        fits = [h for h in range(1, embed_dim + 1) if embed_dim % h == 0 and embed_dim // h >= 8]
        nearest = sorted(sorted(fits, key=lambda h: abs(h - num_heads))[:3])
        raise ValueError(f"{num_heads} heads do not divide the {embed_dim} channels; {nearest} would")
    if embed_dim % 4:
        raise ValueError(f"sine-cosine positions need a width in multiples of 4, not {embed_dim}: {embed_dim // 4 * 4}")
