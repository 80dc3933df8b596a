"""The layers that own parameters, each of which sets its own starting values.

``deepspeed.zero.Init`` partitions the parameters of a module when that module's own constructor returns. A sweep over
the finished model (``model.apply(init)``) then writes to empty placeholders and is silently lost. So there is no
sweep: every layer draws its weights in its own constructor, from torch's default generator, in the order of
    construction.
"""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from mimscale.models.kernels import functions as kernels
from mimscale.torch_private import cpu_multiplies_bf16

WEIGHT_STD = 0.02
# Without units for it, a CPU multiplies bf16 matrices up to a hundred times slower than fp32 ones.
CPU_MULTIPLIES_BF16 = cpu_multiplies_bf16()


def widens(x: torch.Tensor) -> bool:
    """Whether products with ``x`` are better made in fp32: bf16 on a CPU that has no units for it."""
    slow = x.dtype == torch.bfloat16 and x.device.type == "cpu" and not CPU_MULTIPLIES_BF16
    return slow and not torch.compiler.is_compiling()


class _WidenedLinear(torch.autograd.Function):
    """A bf16 linear layer whose products are made in fp32 and rounded once, as units for bf16 do it."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        wide = grad.float().flatten(0, -2)
        grad_x = (wide @ weight.float()).view_as(x).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = (wide.T @ x.float().flatten(0, -2)).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = wide.sum(0).to(weight.dtype) if ctx.biased and ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Map x (..., inputs) by weight (outputs, inputs) and bias (outputs,) to (..., outputs)."""
    if bias is not None and kernels.takes_pointwise(x) and not torch.is_autocast_enabled("cuda"):
        return kernels.linear(x, weight, bias)
    return _WidenedLinear.apply(x, weight, bias) if widens(x) else F.linear(x, weight, bias)


def trunc_normal(parameter: torch.Tensor, std: float = WEIGHT_STD) -> None:
    """Fill ``parameter`` from a normal distribution cut at ±2, drawn in fp32 whatever its dtype.

    The same seed so gives the same weights, up to rounding, for a model that is built in bf16.
    """
    with torch.no_grad():
        drawn = parameter.float()
        nn.init.trunc_normal_(drawn, std=std)
        if drawn is not parameter:
            parameter.copy_(drawn)


def xavier(parameter: torch.Tensor) -> None:
    """Fill a matrix (outputs, inputs), or a kernel (outputs, ...), by Xavier's uniform, drawn in fp32."""
    with torch.no_grad():
        drawn = parameter.float().flatten(1)
        nn.init.xavier_uniform_(drawn)
        parameter.copy_(drawn.view_as(parameter))


class Linear(nn.Linear):
    """A linear layer that starts at trunc_normal(0.02) with a zero bias."""

    def reset_parameters(self) -> None:
        """Set the starting values; called by the constructor."""
        trunc_normal(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., inputs) to (..., outputs)."""
        return linear(x, self.weight, self.bias)


class GeluLinear(Linear):
    """A linear layer and GELU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., inputs) to (..., outputs)."""
        if kernels.takes_pointwise(x) and not torch.is_autocast_enabled("cuda"):
            return kernels.linear_gelu(x, self.weight, self.bias)
        return F.gelu(super().forward(x))


class QkvLinear(Linear):
    """One matrix for queries, keys and values; the bias, which keys do without, belongs to the attention module."""

    def __init__(self, dim: int):
        super().__init__(dim, 3 * dim, bias=False)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Map (..., C) to (..., 3C), adding ``bias`` (3C,)."""
        return linear(x, self.weight, bias)


class XavierLinear(nn.Linear):
    """A linear layer of a ViT, which starts at Xavier's uniform with a zero bias (MAE, appendix A)."""

    def reset_parameters(self) -> None:
        """Set the starting values; called by the constructor."""
        xavier(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., inputs) to (..., outputs)."""
        return linear(x, self.weight, self.bias)


class ResidualNorm(nn.LayerNorm):
    """The norm at the end of a residual branch, and the sum that it ends in, in one buffer.

    Its weight starts at 0, so that the branch starts as nothing (SwinV2's residual post-norm).
    """

    def reset_parameters(self) -> None:
        """Set the starting values; called by the constructor."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(  # type: ignore[override]
        self, branch: torch.Tensor, residual: torch.Tensor, factor: float | torch.Tensor = 1.0
    ) -> torch.Tensor:
        """Give residual + factor * norm(branch), (B, L, C).

        Args:
            branch: (B, L, C).
            residual: (B, L, C).
            factor: of the whole branch, or (B, 1, 1), one for each sample.
        """
        whole = isinstance(factor, float) and factor == 1.0
        if (whole or isinstance(factor, torch.Tensor)) and self._fits_kernel(branch):
            drawn = factor if isinstance(factor, torch.Tensor) else None
            return kernels.residual_norm(branch, residual, self.weight, self.bias, drawn, self.eps)
        if isinstance(factor, torch.Tensor):
            return torch.addcmul(residual, super().forward(branch), factor)
        if factor == 1.0:
            return super().forward(branch).add_(residual)
        weight, bias = self.weight * factor, self.bias * factor
        return F.layer_norm(branch, self.normalized_shape, weight, bias, self.eps).add_(residual)

    def _fits_kernel(self, branch: torch.Tensor) -> bool:
        same = branch.dtype == self.weight.dtype
        return same and branch.shape[-1] <= kernels.WIDEST_NORM and kernels.takes_pointwise(branch)


class PatchProjection(nn.Conv2d):
    """A convolution whose stride is its kernel, applied to patches that are cut out already: one matrix product.

    Its bias starts as torch's convolutions do, uniform within one over the root of a patch's numbers: neither SimMIM's nor
    MAE's released code sets it. ``start`` draws the weight anew.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        patch_size: int,
        start: Callable[[torch.Tensor], None] | None = None,
    ):
        super().__init__(in_channels, out_channels, kernel_size=patch_size, stride=patch_size)
        if start is not None:
            start(self.weight)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Map patches (B, L, in_channels * patch * patch), to (B, L, out_channels) in the weights' dtype."""
        return linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = GeluLinear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., C) to (..., C)."""
        return self.fc2(self.fc1(x))


class PatchMerging(nn.Module):
    """Join 2 x 2 tokens into one of twice the width: reduce first, norm after."""

    def __init__(self, dim: int):
        super().__init__()
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, L, C), the tokens to join following each other, to (B, L / 4, 2C)."""
        batch, length, dim = x.shape
        return self.norm(self.reduction(x.reshape(batch, length // 4, 4 * dim)))


def cut_patches(images: torch.Tensor, patch: int) -> torch.Tensor:
    """Cut images (B, 3, H, W) into patches (B, L, 3 * patch * patch), row by row."""
    batch, channels, height, width = images.shape
    patches = images.view(batch, channels, height // patch, patch, width // patch, patch).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, -1, channels * patch * patch)


class PatchEmbed(nn.Module):
    """Patches to tokens: a linear projection and a norm."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.proj = PatchProjection(in_chans, embed_dim, patch_size)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Embed patches (B, L, 3 * patch * patch) as tokens (B, L, C)."""
        return self.norm(self.proj(patches))
