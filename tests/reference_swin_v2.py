"""SwinV2 and SimMIM once more, slowly, straight from the papers' formulas.

Shares nothing with the product: weights come as a dict in the released names, windows are cut by explicit loops over
rows and columns, shifts are rolls, pairs that a shift brings together from opposite edges are told apart by the
coordinates they came from, and the target's neighbourhoods are visited one pixel at a time. Only for tests.
"""

import math

import torch


def layer_norm(x, weight, bias, eps=1e-5):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * weight + bias


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def unit(x):
    return x / torch.clamp((x * x).sum(-1, keepdim=True).sqrt(), min=1e-12)


def log_coordinate(delta, span):
    """SwinV2, eq. 4, with the coordinate scaled to [-8, 8]: sign(x) log2(1 + |x|) / log2(8)."""
    x = delta / span * 8.0
    return math.copysign(1.0, x) * math.log2(1.0 + abs(x)) / 3.0


def position_bias(weights, prefix, window, pretrained, dtype):
    """The bias of every pair of tokens in a window: (heads, N, N), one evaluation of the MLP a pair."""
    span = (pretrained or window) - 1
    tokens = [(row, column) for row in range(window) for column in range(window)]
    coordinates = torch.tensor(
        [[log_coordinate(a[0] - b[0], span), log_coordinate(a[1] - b[1], span)] for a in tokens for b in tokens],
        dtype=dtype,
    )
    hidden = coordinates @ weights[prefix + "cpb_mlp.0.weight"].T + weights[prefix + "cpb_mlp.0.bias"]
    values = torch.clamp(hidden, min=0) @ weights[prefix + "cpb_mlp.2.weight"].T
    bias = 16.0 / (1.0 + torch.exp(-values))
    return bias.view(len(tokens), len(tokens), -1).permute(2, 0, 1)


def apart(first, second, length, window, shift):
    """Whether two rolled coordinates of one window came from opposite edges: only one of them wrapped around."""
    wrapped = [position >= length - shift for position in (first, second)]
    return wrapped[0] != wrapped[1]


def attention(x, weights, prefix, heads, window, shift, pretrained):
    """Shifted-window cosine attention on a map (B, H, W, C)."""
    batch, height, width, channels = x.shape
    size = channels // heads
    if shift:
        x = torch.roll(x, (-shift, -shift), (1, 2))
    scale = torch.exp(torch.clamp(weights[prefix + "logit_scale"], max=math.log(100.0))).view(heads, 1, 1)
    bias = position_bias(weights, prefix, window, pretrained, x.dtype)
    w_q, w_k, w_v = weights[prefix + "qkv.weight"].chunk(3, 0)
    result = torch.zeros_like(x)
    for top in range(0, height, window):
        for left in range(0, width, window):
            cut = x[:, top : top + window, left : left + window].reshape(batch, window * window, channels)
            q = cut @ w_q.T + weights[prefix + "q_bias"]
            k = cut @ w_k.T
            v = cut @ w_v.T + weights[prefix + "v_bias"]
            q, k, v = (t.view(batch, window * window, heads, size).transpose(1, 2) for t in (q, k, v))
            cosine = torch.einsum("bhid,bhjd->bhij", unit(q), unit(k))
            logits = cosine * scale + bias
            if shift:
                where = [(top + row, left + column) for row in range(window) for column in range(window)]
                penalty = torch.tensor(
                    [
                        [
                            -100.0
                            if apart(a[0], b[0], height, window, shift) or apart(a[1], b[1], width, window, shift)
                            else 0.0
                            for b in where
                        ]
                        for a in where
                    ],
                    dtype=x.dtype,
                )
                logits = logits + penalty
            logits = logits - logits.amax(-1, keepdim=True)
            share = torch.exp(logits)
            share = share / share.sum(-1, keepdim=True)
            mixed = torch.einsum("bhij,bhjd->bhid", share, v).transpose(1, 2).reshape(batch, -1, channels)
            mixed = mixed @ weights[prefix + "proj.weight"].T + weights[prefix + "proj.bias"]
            result[:, top : top + window, left : left + window] = mixed.view(batch, window, window, channels)
    return torch.roll(result, (shift, shift), (1, 2)) if shift else result


def block(x, weights, prefix, heads, window, shift, pretrained, factors=(None, None)):
    """Residual post-norm; ``factors`` are the drop-path factors (B,) of the two branches."""

    def norm(y, which):
        return layer_norm(y, weights[f"{prefix}{which}.weight"], weights[f"{prefix}{which}.bias"])

    def kept(y, factor):
        return y if factor is None else y * factor.view(-1, 1, 1, 1)

    x = x + kept(norm(attention(x, weights, prefix + "attn.", heads, window, shift, pretrained), "norm1"), factors[0])
    hidden = gelu(x @ weights[prefix + "mlp.fc1.weight"].T + weights[prefix + "mlp.fc1.bias"])
    mlp = hidden @ weights[prefix + "mlp.fc2.weight"].T + weights[prefix + "mlp.fc2.bias"]
    return x + kept(norm(mlp, "norm2"), factors[1])


def merge(x, weights, prefix):
    """Reduce first, norm after."""
    joined = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
    reduced = joined @ weights[prefix + "reduction.weight"].T
    return layer_norm(reduced, weights[prefix + "norm.weight"], weights[prefix + "norm.bias"])


def swin_features(images, mask, weights, depths, heads, window, pretrained=None, factors=None, patch=4):
    """Features (B, C, H/32, W/32) of images (B, 3, H, W), hidden where mask (B, H/32, W/32) is True.

    ``pretrained``: the window of each stage at pre-training; ``factors``: (2 * blocks, B) drop-path factors.
    """
    batch, _, height, width = images.shape
    projection = weights["patch_embed.proj.weight"]
    rows, columns = height // patch, width // patch
    x = torch.zeros(batch, rows, columns, len(projection), dtype=images.dtype)
    for row in range(rows):
        for column in range(columns):
            cut = images[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            x[:, row, column] = torch.einsum("bcij,ocij->bo", cut, projection)
    x = x + weights["patch_embed.proj.bias"]
    x = layer_norm(x, weights["patch_embed.norm.weight"], weights["patch_embed.norm.bias"])
    if mask is not None:
        cells = rows // mask.shape[1]
        hidden = torch.kron(mask.to(x.dtype), torch.ones(1, cells, cells, dtype=x.dtype)).unsqueeze(-1)
        x = x * (1 - hidden) + weights["mask_token"] * hidden
    count = 0
    for stage, depth in enumerate(depths):
        side = x.shape[1]
        clipped = min(window, side)
        for j in range(depth):
            shift = window // 2 if j % 2 and side > window else 0
            before = pretrained[stage] if pretrained else 0
            drawn = (None, None) if factors is None else (factors[2 * count], factors[2 * count + 1])
            x = block(x, weights, f"layers.{stage}.blocks.{j}.", heads[stage], clipped, shift, before, drawn)
            count += 1
        if stage + 1 < len(depths):
            x = merge(x, weights, f"layers.{stage}.downsample.")
    return layer_norm(x, weights["norm.weight"], weights["norm.bias"]).permute(0, 3, 1, 2)


def normalised_target(images, window):
    """Every pixel by the mean and unbiased variance of its neighbourhood inside the image, pixel by pixel, in fp64."""
    x = images.double()
    result = torch.zeros_like(x)
    half = window // 2
    for row in range(x.shape[2]):
        for column in range(x.shape[3]):
            top, left = max(row - half, 0), max(column - half, 0)
            around = x[:, :, top : row + half + 1, left : column + half + 1].flatten(2)
            mean, variance = around.mean(-1), around.var(-1, unbiased=True)
            result[:, :, row, column] = (x[:, :, row, column] - mean) / torch.sqrt(variance + 1e-6)
    return result


def pixels(features, weights, stride=32):
    """The linear head: a 1 x 1 convolution whose outputs are laid out as a patch of ``stride`` x ``stride`` pixels."""
    kernel = weights["decoder.0.weight"][:, :, 0, 0]
    values = torch.einsum("bchw,oc->bhwo", features, kernel) + weights["decoder.0.bias"]
    batch, height, width, _ = values.shape
    values = values.view(batch, height, width, 3, stride, stride)
    return values.permute(0, 3, 1, 4, 2, 5).reshape(batch, 3, height * stride, width * stride)


def simmim_loss(prediction, target, mask, kind):
    """Mean over hidden pixels and channels."""
    cells = prediction.shape[-1] // mask.shape[-1]
    hidden = torch.kron(mask.double(), torch.ones(1, cells, cells, dtype=torch.float64)).unsqueeze(1)
    difference = prediction.double() - target.double()
    error = difference.abs() if kind == "l1" else difference**2
    return (error * hidden).sum() / (hidden.sum() * 3)


def coordinates_table(window):
    """What the released code stores of a bias that is trained in its own window."""
    offsets = [log_coordinate(delta, max(window - 1, 1)) for delta in range(1 - window, window)]
    return torch.tensor([[[[row, column] for column in offsets] for row in offsets]])


def released_checkpoint(embed_dim, depths, heads, window, image, seed, head=True, prefix="encoder.", stride=32):
    """A state dict in the released names, with its stored tables; every weight random and non-zero, norms included."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, std=0.1, centre=0.0):
        return centre + std * torch.randn(*shape, generator=generator, dtype=torch.float64)

    state = {
        "patch_embed.proj.weight": draw(embed_dim, 3, 4, 4),
        "patch_embed.proj.bias": draw(embed_dim),
        "patch_embed.norm.weight": draw(embed_dim, centre=1.0),
        "patch_embed.norm.bias": draw(embed_dim),
        "mask_token": draw(1, 1, embed_dim),
    }
    for stage, depth in enumerate(depths):
        dim, side = embed_dim * 2**stage, image // 4 // 2**stage
        clipped = min(window, side)
        for j in range(depth):
            p = f"layers.{stage}.blocks.{j}."
            for norm in ("norm1", "norm2"):
                state[f"{p}{norm}.weight"] = draw(dim, centre=0.5)
                state[f"{p}{norm}.bias"] = draw(dim)
            scales = draw(heads[stage], 1, 1, std=1.5, centre=math.log(10))
            scales[0] = math.log(100) + 0.7  # beyond the clamp
            state[p + "attn.logit_scale"] = scales
            state[p + "attn.q_bias"] = draw(dim)
            state[p + "attn.v_bias"] = draw(dim)
            state[p + "attn.relative_coords_table"] = coordinates_table(clipped)
            state[p + "attn.relative_position_index"] = torch.zeros(clipped**2, clipped**2, dtype=torch.long)
            state[p + "attn.cpb_mlp.0.weight"] = draw(512, 2, std=0.7)
            state[p + "attn.cpb_mlp.0.bias"] = draw(512)
            state[p + "attn.cpb_mlp.2.weight"] = draw(heads[stage], 512)
            state[p + "attn.qkv.weight"] = draw(3 * dim, dim)
            state[p + "attn.proj.weight"] = draw(dim, dim)
            state[p + "attn.proj.bias"] = draw(dim)
            state[p + "mlp.fc1.weight"] = draw(4 * dim, dim)
            state[p + "mlp.fc1.bias"] = draw(4 * dim)
            state[p + "mlp.fc2.weight"] = draw(dim, 4 * dim)
            state[p + "mlp.fc2.bias"] = draw(dim)
            if j % 2 and side > window:
                state[p + "attn_mask"] = torch.zeros((side // window) ** 2, window**2, window**2)
        if stage + 1 < len(depths):
            p = f"layers.{stage}.downsample."
            state[p + "reduction.weight"] = draw(2 * dim, 4 * dim)
            state[p + "norm.weight"] = draw(2 * dim, centre=1.0)
            state[p + "norm.bias"] = draw(2 * dim)
    state["norm.weight"] = draw(dim, centre=1.0)
    state["norm.bias"] = draw(dim)
    state = {prefix + name: value for name, value in state.items()}
    if head:
        state["decoder.0.weight"] = draw(3 * stride * stride, dim, 1, 1)
        state["decoder.0.bias"] = draw(3 * stride * stride)
    return state
