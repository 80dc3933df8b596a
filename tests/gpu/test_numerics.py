"""What a GPU computes is what the formulas in fp64 say, kernel by kernel and for a whole model."""

import pytest
import torch

from mimscale.mim import SimMIM
from mimscale.mim.targets import local_normalise, local_normalise_in_fp32
from mimscale.models import create_encoder
from mimscale.models.attention_core import attend, attend_fused, attend_plainly
from mimscale.models.drop_path import keep_scales
from mimscale.models.kernels import functions

TOKENS = (36, 49, 144, 196, 400)


def distance(ours, right):
    return ((ours.double() - right.double()).norm() / right.double().norm().clamp_min(1e-300)).item()


def test_the_kernels_are_taken(device):
    assert functions.kernels_run(device.index) or device.type == "cpu"


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_every_kernel_against_formulas_in_fp32(device, figure, tokens, dtype, bound):
    if device.type == "cpu":
        dtype = torch.float16 if dtype == torch.bfloat16 else dtype  # numpy, in Triton's interpreter, has no bf16
        if tokens > 144:
            pytest.skip("minutes in the interpreter")
    worst = functions.trial(device, dtype, tokens)
    for name, error in worst.items():
        figure(f"{name}, {tokens} tokens, {str(dtype)[6:]}: error", error)
    assert max(worst.values()) < bound, worst


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("path", ["taken", "torch's"])
def test_attention_against_formulas_in_fp64(device, figure, tokens, shifted, dtype, bound, path):
    generator = torch.Generator().manual_seed(tokens)
    heads, size, windows = 4, 32, 4
    qkv = torch.randn(3 * windows, tokens, 3 * heads * size, generator=generator).to(device, dtype)
    bias = (16 * torch.sigmoid(2 * torch.randn(heads, tokens, tokens, generator=generator))).to(device)
    scale = torch.full((heads, 1, 1), 10.0, device=device)
    grad = torch.randn(3 * windows, tokens, heads * size, generator=generator).to(device, dtype)
    regions = penalty = None
    if shifted:
        regions = torch.randint(0, 4, (windows, tokens), generator=generator, dtype=torch.int32).to(device)
        penalty = torch.where(regions[:, :, None] != regions[:, None, :], -100.0, 0.0)[:, None]

    def ways(f, *leaves, more):
        leaves = [t.detach().clone().requires_grad_() for t in leaves]
        out = f(*leaves, *more)
        return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    wide = None if penalty is None else penalty.double()
    right = ways(attend_plainly, qkv.double(), scale.double(), bias.double(), more=(wide,))
    ours = ways(*((attend, qkv, scale, bias) if path == "taken" else (attend_fused, qkv, scale, bias)),
                more=(penalty, regions) if path == "taken" else (penalty,))  # fmt: skip
    errors = [distance(a, b) for a, b in zip(ours, right, strict=True)]
    figure(f"attention ({path}), {tokens} tokens, {'shifted, ' if shifted else ''}{str(dtype)[6:]}: error", max(errors))
    # torch's loses the gradient of the scale, a sum of what nearly cancels, where penalties are added in bf16.
    assert max(errors) < bound * (1 if path == "taken" else 5), errors


def test_equal_inputs_give_equal_bits_in_attention(device):
    qkv = torch.randn(16, 144, 3 * 64, device=device)
    bias, scale = torch.randn(2, 144, 144, device=device), torch.full((2, 1, 1), 10.0, device=device)
    found = []
    for _ in range(2):
        leaves = [t.detach().clone().requires_grad_() for t in (qkv, scale, bias)]
        out = attend(*leaves, None)
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_drop_path_draws_alike_on_both_devices(device):
    keys = torch.tensor([7, 2**40, 2**62 - 1])
    here, there = (keep_scales([0.1, 0.5, 0.9], 3, keys, d).cpu() for d in (torch.device("cpu"), device))
    assert torch.equal(here, there)


def test_the_target_in_fp32_is_that_in_fp64(device, figure, pictures):
    error = distance(local_normalise_in_fp32(pictures.to(device), 47).cpu(), local_normalise(pictures.double(), 47))
    figure("target: error", error)
    assert error < 1e-5


def model(device, dtype):
    torch.manual_seed(0)
    encoder = create_encoder(
        "swinv2_s",
        img_size=192,
        window_size=12,
        embed_dim=64,
        num_heads=(2, 4, 8, 16),
        depths=(2, 2, 4, 2),
        drop_path=0.3,
    )
    made = SimMIM(encoder)
    for name, parameter in made.named_parameters():
        if ".norm" in name and name.endswith("weight"):
            torch.nn.init.ones_(parameter)
    return made.to(device, dtype).train()


def loss_and_gradients(made, images, device):
    mask = (torch.rand(4, 36, generator=torch.Generator().manual_seed(1)).argsort(1) < 22).view(4, 6, 6)
    loss = made(images.to(device), mask.to(device), torch.arange(4)).loss
    loss.backward()
    return loss.item(), {name: p.grad.double().cpu() for name, p in made.named_parameters()}


@pytest.fixture(scope="module")
def right(pictures):
    cpu = torch.device("cpu")
    return loss_and_gradients(model(cpu, torch.float64), pictures.double(), cpu)


@pytest.mark.parametrize(
    ("dtype", "of_loss", "of_gradients"),
    [(torch.float64, 1e-9, 1e-7), (torch.float32, 1e-5, 1e-3), (torch.bfloat16, 2e-2, 2e-1)],
)
def test_a_whole_model_against_fp64_on_the_cpu(device, figure, pictures, right, dtype, of_loss, of_gradients):
    loss, gradients = loss_and_gradients(
        model(device, dtype), pictures.to(dtype if dtype == torch.float64 else torch.float32), device
    )
    apart = sum((gradients[n] - g).square().sum() for n, g in right[1].items()).sqrt()
    error = (apart / sum(g.square().sum() for g in right[1].values()).sqrt()).item()
    figure(f"whole model, {str(dtype)[6:]}: error of the loss", abs(loss / right[0] - 1))
    figure(f"whole model, {str(dtype)[6:]}: error of all gradients", error)
    assert abs(loss / right[0] - 1) < of_loss and error < of_gradients
