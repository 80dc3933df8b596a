"""Table 4's decoders: their sizes, and that they learn from every parameter under every kind of checkpointing."""

import deepspeed
import pytest
import torch
from reference_photographs import photographs, random_mask

from mimscale.mim import SimMIM
from mimscale.models import create_encoder


def small(decoder="linear", **overrides):
    settings = {"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (1, 2, 2, 1), "num_heads": (1, 2, 2, 2)}
    torch.manual_seed(0)
    model = SimMIM(create_encoder("swinv2_s", **{**settings, **overrides}), decoder=decoder, target_window=15).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize(("decoder", "millions"), [("linear", 90.0), ("4-blocks", 140.4), ("8-blocks", 190.8)])
def test_totals_on_swinv2_b_are_those_of_table_4(decoder, millions):
    with torch.device("meta"):
        model = SimMIM(create_encoder("swinv2_b"), decoder=decoder)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize("decoder", ["linear", "4-blocks"])
@pytest.mark.parametrize("size", [64, 192])
def test_the_loss_on_hidden_patches_is_that_on_whole_images(decoder, size):
    model = small(decoder, drop_path=0.0)  # at 192 px the decoder's own map is larger than its window, and shifts
    images, mask = photographs(2, size).double(), random_mask(2, size // 32, size // 32, size // 32)
    training = model(images, mask)
    assert training.loss.item() == pytest.approx(model.eval()(images, mask).loss.item(), rel=1e-9)
    training.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"every": 2},
        {"attention_only": True},
        {"checkpoint_fn": lambda f, *x: torch.utils.checkpoint.checkpoint(f, *x, use_reentrant=True)},
        {"checkpoint_fn": deepspeed.checkpointing.checkpoint},
    ],
    ids=["every-block", "every-2nd", "attention", "reentrant", "deepspeed"],
)
@pytest.mark.parametrize("decoder", ["linear", "4-blocks"])
def test_checkpointing_leaves_loss_and_gradients_as_they_are(decoder, options):
    model = small(decoder, drop_path=0.4)
    images, mask, keys = photographs(3, 64).double(), random_mask(3, 2, 2, 2), torch.tensor([4, 5, 6])
    loss = model(images, mask, keys).loss
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing(True, **options)
    again = model(images, mask, keys).loss
    again.backward()
    assert again.item() == loss.item()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12, msg=name)


def test_checkpointing_stores_at_most_a_sixth():
    def stored(model):
        total = 0

        def count(tensor):
            nonlocal total
            if not isinstance(tensor, torch.nn.Parameter):
                total += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            model(photographs(2, 192), random_mask(2, 6, 6, 22), torch.arange(2))
        return total

    encoder = create_encoder("swinv2_s", embed_dim=24, num_heads=(1, 1, 2, 4))
    model = SimMIM(encoder)
    whole = stored(model)
    model.set_grad_checkpointing()
    full = stored(model)
    model.set_grad_checkpointing(attention_only=True)
    attention = stored(model)
    model.set_grad_checkpointing(every=2)
    half = stored(model)
    assert whole >= 6 * full
    assert full < half < whole and full < attention < whole
