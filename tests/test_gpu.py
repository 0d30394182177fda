"""What only a GPU can show; the same parity that the other tests show on the CPU.

Run with: python -m pytest -m gpu
"""

import copy

import pytest
import torch
from torch import Tensor, nn

from fastunet import FastUNet
from fastunet.memory import measure_allocations, saved_for_backward
from fastunet.reference import UNet

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

VARIANTS = [
    {"bilinear": bilinear, "norm": norm}
    for bilinear in (False, True)
    for norm in ("batch", "instance", "group", "none")
]


def pair(dtype: torch.dtype = torch.float64, base_channels: int = 8, **options):
    torch.manual_seed(0)
    options = {"base_channels": base_channels, "conv_bias": True, **options}
    reference = UNet(3, 2, **options).to("cuda", dtype)
    fast = FastUNet(3, 2, **options).to("cuda", dtype)
    fast.load_state_dict(reference.state_dict())
    return reference, fast


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Logits, then every gradient and buffer."""
    model.zero_grad()
    logits = model(x)
    logits.square().mean().backward()
    return [logits, *(p.grad for p in model.parameters()), *(b.double() for b in model.buffers())]


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    return max(((s - t).norm() / (t.norm() + 1e-12)).item() for s, t in zip(a, b, strict=True))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("options", VARIANTS)
def test_float64_parity(options, train):
    reference, fast = pair(**options)
    x = torch.randn(2, 3, 37, 50, dtype=torch.float64, device="cuda")
    for model in (reference, fast):
        model.train(train)
    # A convolution bias that statistics cancel has a gradient of pure rounding in the reference.
    for a, b in zip(step(fast, x), step(reference, x), strict=True):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bilinear", [False, True])
def test_autocast_error_is_at_most_twice_eagers(bilinear, dtype):
    reference, fast = pair(torch.float32, bilinear=bilinear, conv_bias=False)
    exact = copy.deepcopy(reference).double()
    x = torch.randn(2, 3, 64, 96, device="cuda")
    want = exact(x.double())
    with torch.autocast("cuda", dtype=dtype):
        errors = [distance([model(x).double()], [want]) for model in (fast, reference)]
    assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps


def test_gradients_are_the_same_bits_again():
    torch.backends.cudnn.deterministic = True
    _, fast = pair(torch.float32, bilinear=True)
    twin = copy.deepcopy(fast)
    x = torch.randn(2, 3, 64, 96, device="cuda")
    assert all(torch.equal(a, b) for a, b in zip(step(fast, x), step(twin, x), strict=True))


@pytest.mark.parametrize(("bilinear", "bound"), [(True, 0.38), (False, 0.47)])
def test_saved_bytes(bilinear, bound):
    reference, fast = pair(torch.float32, 64, bilinear=bilinear, conv_bias=False)
    x = torch.randn(1, 3, 256, 256, device="cuda")
    saved = {}
    for model in (reference, fast):
        fixed = [*model.parameters(), *model.buffers()]
        saved[model] = saved_for_backward(lambda model=model: model(x), fixed)
    assert saved[fast] <= bound * saved[reference]
    live = measure_allocations(lambda: fast(x), "cuda").live_bytes
    assert live <= 1.05 * saved[fast] + 4e6  # cuDNN and the allocator's rounding
