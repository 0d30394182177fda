"""What is predicted on fake tensors, against what is allocated."""

import random as numbers
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from networks import random
from sampling import sampled
from torch.autograd.graph import saved_tensors_hooks

import fastunet
from fastunet import FastUNet, extension
from fastunet.memory import measure_allocations
from fastunet.memory.ledger import BACKWARD, CATEGORIES, FORWARD, training_step
from fastunet.memory.machine import machine
from fastunet.memory.report import plain_copy, timeline
from fastunet.reference import UNet

POLICIES = ("none", "light", "full")


def measured(model, shape, dtype=None):
    """Parameters, buffers and input included; gradients of the logits are not computed."""
    parameters = list(model.parameters())
    x = random(*shape).to(parameters[0].dtype)

    def step():
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            logits = model(x)
        logits.backward(torch.empty_like(logits))

    step()
    model.zero_grad()
    static = sum(t.nbytes for t in (*parameters, *model.buffers(), x))
    return measure_allocations(step).peak_bytes + static


def configuration(seed):
    """A random network, batch and policy."""
    choose = numbers.Random(seed)
    depth = choose.randint(1, 4)
    least = 2 ** (depth + 1)
    options = {
        "bilinear": choose.random() < 0.5,
        "base_channels": choose.choice([8, 16, 24]),
        "depth": depth,
        "norm": choose.choice(["batch", "batch", "instance", "group", "none"]),
        "conv_bias": choose.random() < 0.3,
        "concat_order": choose.choice(["skip_first", "up_first"]),
        "checkpointing": choose.choice(POLICIES),
    }
    size = [choose.randint(max(least, 60), 150) for _ in range(2)]
    return options, (choose.randint(1, 3), choose.choice([1, 3]), *size)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", sampled(range(20), range(10)))
def test_peak(seed, dtype):
    """To the byte, but for vectors of channels."""
    options, shape = configuration(seed)
    model = FastUNet(shape[1], 2, **options)
    predicted = training_step(model, shape, dtype).peak()
    assert predicted == pytest.approx(measured(model, shape, dtype), rel=0.01)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("backend", ["reference", "cuda"])
def test_peak_of_other_backends(backend, policy):
    """Without what PyTorch's convolutions take inside, which at this size is much."""
    if backend == "cuda" and extension.load_cuda("cuda_host"):
        pytest.skip(extension.load_cuda("cuda_host"))
    model = FastUNet(3, 2, base_channels=8, depth=2, checkpointing=policy)
    with fastunet.backend(backend):
        predicted = training_step(model, (1, 3, 45, 52)).peak()
        assert 0.6 < predicted / measured(model, (1, 3, 45, 52)) < 1.01


@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize("bilinear", [True, False])
def test_peak_of_plain_pytorch(bilinear, policy):
    """But for what its convolutions take inside."""
    model = UNet(3, 2, bilinear, base_channels=16, checkpointing=policy)
    predicted = training_step(model, (2, 3, 128, 96)).peak()
    assert predicted == pytest.approx(measured(model, (2, 3, 128, 96)), rel=0.05)


def test_plain_copy():
    model = FastUNet(3, 2, base_channels=8, depth=2)
    plain = plain_copy(model)
    assert type(plain) is UNet
    shape = (1, 3, 32, 32)
    assert (
        training_step(plain, shape).peak()
        == training_step(UNet(3, 2, base_channels=8, depth=2), shape).peak()
    )
    assert type(model) is FastUNet


def test_frozen_parts_and_gradients():
    """Parameters that do not train have no gradients and no optimizer state."""
    model = FastUNet(3, 2, base_channels=16, depth=2)
    shape, adam = (1, 3, 64, 64), 2
    everything = training_step(model, shape, states=adam)
    model.down2.requires_grad_(False)
    part = training_step(model, shape, states=adam)
    frozen = sum(p.nbytes for p in model.down2.parameters())

    gradients, optimizer = (
        [timeline(ledger)[-1].nbytes[category] for ledger in (everything, part)]
        for category in ("gradients", "optimizer")
    )
    assert gradients[0] - gradients[1] == frozen
    assert optimizer[0] - optimizer[1] == adam * frozen
    assert part.peak() - optimizer[1] == pytest.approx(measured(model, shape), rel=0.01)


def test_nothing_is_run():
    model = FastUNet(3, 2, base_channels=8, depth=2).train()
    model.down1.register_forward_hook(lambda *_: pytest.fail("the hook was called"))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    hooks = saved_tensors_hooks(lambda _: pytest.fail("a fake tensor was packed"), lambda t: t)
    with hooks:
        training_step(model, (1, 3, 32, 32))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_model_without_memory():
    shape = (1, 3, 64, 64)
    with torch.device("meta"):
        model = FastUNet(3, 2, base_channels=8, depth=2)
    real = FastUNet(3, 2, base_channels=8, depth=2)
    assert training_step(model, shape).peak() == training_step(real, shape).peak()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_gpu_that_is_not_here(policy):
    """Its kernels need maps in 16 bit of their own; nothing is launched, and nothing lasts."""
    with torch.device("meta"):
        model = FastUNet(3, 2, checkpointing=policy)
    shape = (8, 3, 512, 512)
    peaks = {
        device: training_step(model, shape, torch.bfloat16, device=device).peak()
        for device in ("cuda", "cpu")
    }
    assert peaks["cpu"] < peaks["cuda"] < 1.3 * peaks["cpu"]
    model = FastUNet(3, 2, base_channels=8, depth=1)
    assert model(random(1, 3, 16, 16)).isfinite().all()
    with pytest.raises(ValueError, match="device must be cpu or cuda, got 'mps'"):
        training_step(model, shape, device="mps")


def test_layers_and_categories():
    model = FastUNet(3, 2, base_channels=8, depth=2, checkpointing="full")
    moments = timeline(training_step(model, (1, 3, 64, 64), states=1))
    convolutions = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)} | {
        "up1.up",
        "up2.up",
    }
    for phase in (FORWARD, BACKWARD):
        found = {m.layer for m in moments if m.phase == phase and m.operator.startswith("fastunet")}
        assert found == convolutions
    used = {c for c in CATEGORIES if any(m.nbytes[c] for m in moments)}
    assert used == {*CATEGORIES}
    parameters = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert {m.nbytes["parameters"] for m in moments[-20:]} == {parameters}
    assert moments[-1].nbytes["gradients"] == sum(p.nbytes for p in model.parameters())


def test_layers_of_plain_pytorch():
    model = UNet(3, 2, base_channels=8, depth=1)
    operators = training_step(model, (1, 3, 32, 32)).operators
    found = {(o.phase, o.layer) for o in operators if "batch_norm" in o.name}
    norms = [name for name, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert found == {(phase, name) for phase in (FORWARD, BACKWARD) for name in norms}


def test_other_threads_launch_their_kernels():
    """While one of them counts what another machine would allocate."""
    model, x = FastUNet(3, 2, base_channels=8, depth=1), random(1, 3, 16, 16)
    want = model.eval()(x)
    with machine("cuda"), ThreadPoolExecutor(1) as other:
        got = other.submit(model, x).result()
    assert torch.equal(got, want)
