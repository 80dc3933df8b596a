"""MAE once more, slowly, with weights in its released names. Shares nothing with the product; only for tests."""

import math

import torch


def norm(x, weights, name):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / torch.sqrt(variance + 1e-6) * weights[name + ".weight"] + weights[name + ".bias"]


def linear(x, weights, name):
    return x @ weights[name + ".weight"].T + weights[name + ".bias"]


def block(x, weights, name, heads):
    dim = x.shape[-1]
    q, k, v = linear(norm(x, weights, name + ".norm1"), weights, name + ".attn.qkv").split(dim, -1)
    mixed = []
    for head in range(heads):
        part = slice(head * dim // heads, (head + 1) * dim // heads)
        share = torch.softmax(q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(dim // heads), -1)
        mixed.append(share @ v[..., part])
    x = x + linear(torch.cat(mixed, -1), weights, name + ".attn.proj")
    hidden = linear(norm(x, weights, name + ".norm2"), weights, name + ".mlp.fc1")
    return x + linear(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), weights, name + ".mlp.fc2")


def positions(dim, rows, columns):
    """Class token first: zeros; then for each patch the column's sines and cosines, then the row's."""
    table = torch.zeros(1 + rows * columns, dim, dtype=torch.float64)
    quarter = dim // 4
    for row in range(rows):
        for column in range(columns):
            for i in range(quarter):
                omega = 1.0 / 10000 ** (i / quarter)
                at = table[1 + row * columns + column]
                at[i], at[quarter + i] = math.sin(column * omega), math.cos(column * omega)
                at[2 * quarter + i], at[3 * quarter + i] = math.sin(row * omega), math.cos(row * omega)
    return table.unsqueeze(0)


def encode(images, weights, depth, heads, patch, visible):
    """Tokens (B, 1 + K, C) of the visible patches, a list of indices for each image, in that order."""
    kernel = weights["patch_embed.proj.weight"]
    columns = images.shape[3] // patch
    tokens = []
    for image, chosen in zip(images, visible, strict=True):
        row_of = [(index // columns * patch, index % columns * patch) for index in chosen]
        cut = torch.stack([image[:, r : r + patch, c : c + patch] for r, c in row_of])
        x = torch.einsum("kcij,ocij->ko", cut, kernel) + weights["patch_embed.proj.bias"]
        x = x + weights["pos_embed"][0, 1:][chosen]
        tokens.append(torch.cat((weights["cls_token"][0] + weights["pos_embed"][0, :1], x)))
    x = torch.stack(tokens)
    for j in range(depth):
        x = block(x, weights, f"blocks.{j}", heads)
    return norm(x, weights, "norm")


def decode(tokens, weights, depth, heads, visible, patches):
    x = linear(tokens, weights, "decoder_embed")
    full = weights["mask_token"].expand(len(x), patches, -1).clone()
    for sample, chosen in enumerate(visible):
        for place, index in enumerate(chosen):
            full[sample, index] = x[sample, 1 + place]
    x = torch.cat((x[:, :1], full), 1) + weights["decoder_pos_embed"]
    for j in range(depth):
        x = block(x, weights, f"decoder_blocks.{j}", heads)
    return linear(norm(x, weights, "decoder_norm"), weights, "decoder_pred")[:, 1:]


def patch_target(images, patch, normalised):
    """(B, L, patch * patch * 3): pixel by pixel, channels innermost."""
    patches = []
    for row in range(0, images.shape[2], patch):
        for column in range(0, images.shape[3], patch):
            patches.append(images[:, :, row : row + patch, column : column + patch].permute(0, 2, 3, 1).flatten(1))
    x = torch.stack(patches, 1)
    if normalised:
        x = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=True) + 1e-6)
    return x


def released_checkpoint(dim, depth, decoder_dim, decoder_depth, patch, image, seed):
    """A state dict in MAE's released names, its position tables included, every weight random."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, centre=0.0, std=0.1):
        return centre + std * torch.randn(*shape, generator=generator, dtype=torch.float64)

    side = image // patch
    state = {
        "cls_token": draw(1, 1, dim),
        "pos_embed": positions(dim, side, side),
        "patch_embed.proj.weight": draw(dim, 3, patch, patch),
        "patch_embed.proj.bias": draw(dim),
        "mask_token": draw(1, 1, decoder_dim),
        "decoder_pos_embed": positions(decoder_dim, side, side),
        "decoder_embed.weight": draw(decoder_dim, dim),
        "decoder_embed.bias": draw(decoder_dim),
        "decoder_pred.weight": draw(3 * patch * patch, decoder_dim),
        "decoder_pred.bias": draw(3 * patch * patch),
    }
    for name, width in (("norm", dim), ("decoder_norm", decoder_dim)):
        state |= {name + ".weight": draw(width, centre=1.0), name + ".bias": draw(width)}
    for stem, width, blocks in (("blocks", dim, depth), ("decoder_blocks", decoder_dim, decoder_depth)):
        for j in range(blocks):
            p = f"{stem}.{j}."
            for name in ("norm1", "norm2"):
                state |= {f"{p}{name}.weight": draw(width, centre=1.0), f"{p}{name}.bias": draw(width)}
            shapes = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
            for name, (rows, columns) in shapes.items():
                state[f"{p}{name}.weight"] = draw(rows * width, columns * width)
                state[f"{p}{name}.bias"] = draw(rows * width)
    return state
