"""What only a GPU can show; the same parity that the other tests show on the CPU.

Run with: python -m pytest -m "gpu and not slow"
"""

import copy

import pytest
import torch
from torch import Tensor, nn

import fastunet
from fastunet import FastUNet
from fastunet.memory import measure_allocations, saved_for_backward
from fastunet.memory.planning import step_of
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


@pytest.fixture(params=["reference", "triton", "cuda"])
def backend(request):
    if why := fastunet.backends.module(request.param).why_not(torch.empty(1, device="cuda")):
        pytest.skip(why)
    with fastunet.backend(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bilinear", [False, True])
def test_autocast_error_is_at_most_twice_eagers(backend, bilinear, dtype):
    reference, fast = pair(torch.float32, bilinear=bilinear, conv_bias=False)
    exact = copy.deepcopy(reference).double()
    x = torch.randn(2, 3, 64, 96, device="cuda")
    want = exact(x.double())
    with torch.autocast("cuda", dtype=dtype):
        errors = [distance([model(x).double()], [want]) for model in (fast, reference)]
    assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps


@pytest.mark.parametrize("bilinear", [False, True])
def test_training_error_is_at_most_twice_eagers(backend, bilinear):
    """Every gradient and statistic of a bf16 step, by the root mean square over the tensors."""
    reference, fast = pair(torch.float32, 32, bilinear=bilinear, conv_bias=False)
    exact = copy.deepcopy(reference).double()
    x = torch.randn(2, 3, 128, 160, device="cuda")
    want = step(exact, x.double())
    errors = []
    for model in (fast, reference):
        with torch.autocast("cuda", torch.bfloat16):
            got = step(model, x)
        each = [
            ((a - b).norm() / b.norm().clamp_min(1e-12)).item()
            for a, b in zip(got, want, strict=True)
        ]
        errors.append((sum(e * e for e in each) / len(each)) ** 0.5)
    assert errors[0] <= 2 * errors[1]


def test_gradients_are_the_same_bits_again(backend):
    """Also where PyTorch's convolutions serve, which may choose others by themselves."""
    # PyTorch's gradient of bilinear upsampling, the reference's, adds up in any order.
    _, fast = pair(torch.float32, 64, bilinear=backend != "reference")
    twin = copy.deepcopy(fast)
    x = torch.randn(2, 3, 64, 96, device="cuda")
    assert all(torch.equal(a, b) for a, b in zip(step(fast, x), step(twin, x), strict=True))


@pytest.mark.parametrize(("bilinear", "bound"), [(True, 0.38), (False, 0.47)])
def test_saved_bytes(backend, bilinear, bound):
    reference, fast = pair(torch.float32, 64, bilinear=bilinear, conv_bias=False)
    x = torch.randn(1, 3, 256, 256, device="cuda")
    saved = {}
    for model in (reference, fast):
        fixed = [*model.parameters(), *model.buffers()]
        saved[model] = saved_for_backward(lambda model=model: model(x), fixed)
    assert saved[fast] <= bound * saved[reference]
    live = measure_allocations(lambda: fast(x), "cuda").live_bytes
    assert live <= 1.05 * saved[fast] + 4e6  # cuDNN and the allocator's rounding


@pytest.mark.parametrize("bilinear", [False, True])
def test_capture(backend, bilinear):
    """The graph computes what the model does, also after its parameters have changed."""
    _, fast = pair(torch.float32, 16, bilinear=bilinear)
    fast.eval()
    x, other = (torch.randn(2, 3, 64, 96, device="cuda") for _ in range(2))
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        captured = fastunet.capture(fast, x)
        for image in (x, other, x):
            torch.testing.assert_close(captured(image), fast(image), rtol=0, atol=0)
        first = captured(x)
        for p in fast.parameters():
            p.mul_(1.25)
        assert not torch.equal(captured(x), first)
        torch.testing.assert_close(captured(x), fast(x), rtol=0, atol=0)
    with pytest.raises(ValueError, match="must have the example's shape"):
        captured(x[:1])


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_automatic_choice(name):
    """The self-check passes here, so the kernels serve by themselves."""
    x = torch.zeros(1, device="cuda", dtype=torch.bfloat16)
    if why := fastunet.backends.module(name).why_not(x):
        pytest.skip(why)
    for operator in ("conv_norm_act", "conv_transpose", "resample", "head"):
        assert fastunet.backends.why_not(name, operator, x) == ""


@pytest.fixture
def own_choices(tmp_path, monkeypatch):
    """Nothing measured yet, and nothing kept."""
    selection = pytest.importorskip("fastunet.triton.selection")
    monkeypatch.setenv("FASTUNET_CACHE", str(tmp_path))
    selection.measured.cache_clear()
    yield
    selection.measured.cache_clear()


@pytest.mark.parametrize("train", [True, False])
def test_tuning(train, own_choices):
    """Measured choices change nothing but rounding."""
    _, fast = pair(torch.float32, 16)
    fast.train(train)
    x = torch.randn(1, 3, 64, 96, device="cuda")
    with fastunet.backend("triton"), torch.autocast("cuda", torch.bfloat16):
        before = fast(x).float()
        assert fastunet.tune(fast, x, rounds=2)
        assert distance([fast(x).float()], [before]) < 0.05


def test_torch_compile():
    _, fast = pair(torch.float32, 16)
    twin = copy.deepcopy(fast)
    x = torch.randn(1, 3, 64, 96, device="cuda")
    with fastunet.backend("triton"):
        compiled = torch.compile(fast, fullgraph=True)
        for a, b in zip(step(compiled, x), step(twin, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_auto_under_a_limit():
    """Where plain PyTorch runs out of memory, ``auto`` does not."""
    x = torch.randn(8, 3, 512, 512, device="cuda")
    total = torch.cuda.get_device_properties("cuda").total_memory

    def step(model: nn.Module) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(x).float().square().mean()
        loss.backward()

    models = [kind(3, 2).cuda() for kind in (UNet, FastUNet)]
    models[1].use_checkpointing("auto")
    least = step_of(models[1], x.shape, torch.bfloat16).least
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.4 * least / total)
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            step(models[0])
        models[0].zero_grad()
        torch.cuda.empty_cache()
        for _ in range(2):
            models[1].zero_grad()
            step(models[1])
        assert models[1].memory_plan.recomputed
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
