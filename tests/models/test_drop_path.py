"""Drop path belongs to the sample: wherever and with whatever it is computed, it loses the same branches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_photographs import photographs, random_mask

from mimscale.mim import SimMIM
from mimscale.models import create_encoder
from mimscale.models.drop_path import keep_scales, keyed_uniform


def splitmix(z):
    """SplitMix64's finaliser in Python's own integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


@given(key=st.integers(0, 2**63 - 1), branch=st.integers(0, 100))
@settings(max_examples=200, deadline=None)
def test_the_hash_is_that_of_64_bit_integers(key, branch):
    gamma = 0x9E3779B97F4A7C15
    expected = splitmix((splitmix((key + gamma) % 2**64) + (branch + 1) * gamma) % 2**64) >> 11
    assert keyed_uniform(torch.tensor([key]), torch.tensor([branch])).item() == expected


def test_branches_are_dropped_at_their_rate_and_independently():
    rates = [0.0, 0.1, 0.3, 0.5]
    kept = keep_scales(rates, 100_000, torch.arange(100_000), torch.device("cpu"))[:, :, 0, 0]
    for rate, row in zip(rates, kept, strict=True):
        assert (row == 0).float().mean().item() == pytest.approx(rate, abs=0.006)
        assert row.mean().item() == pytest.approx(1, abs=0.01)
    correlation = torch.corrcoef((kept[1:] > 0).float())
    assert (correlation - torch.eye(3)).abs().max() < 0.01


def test_gradients_do_not_depend_on_how_the_batch_is_split():
    torch.manual_seed(0)
    encoder = create_encoder(
        "swinv2_s", img_size=64, window_size=4, embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 2), drop_path=0.5
    )
    model = SimMIM(encoder, target_window=15).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    images, mask, keys = photographs(4, 64).double(), random_mask(4, 2, 2, 2), torch.tensor([11, 3, 2**62, 0])
    whole = model(images, mask, keys)
    whole.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    parts = []
    for pick in ([3, 1], [0], [2]):
        torch.rand(17)  # the process's generator has no say
        loss = model(images[pick], mask[pick], keys[pick]).loss
        (loss * len(pick) / 4).backward()
        parts.append(loss.item() * len(pick) / 4)
    assert sum(parts) == pytest.approx(whole.loss.item(), rel=1e-12)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)
    assert model(images, mask, keys + 1).loss.item() != pytest.approx(whole.loss.item(), rel=1e-6)
    model.eval()
    assert model(images, mask, keys).loss == model(images, mask).loss


def test_keys_of_the_wrong_shape_or_type_are_errors():
    with pytest.raises(ValueError, match="draw_keys must be int64"):
        keep_scales([0.1], 2, torch.zeros(3, dtype=torch.int64), torch.device("cpu"))
    with pytest.raises(ValueError, match="draw_keys must be int64"):
        keep_scales([0.1], 2, torch.zeros(2), torch.device("cpu"))
