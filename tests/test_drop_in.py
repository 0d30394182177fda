"""FastUNet where a training script has the plain U-Net: loading, layouts, precision, optimizers,
copies, processes, frozen parts, errors."""

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from networks import (
    FORMATS,
    SMALL,
    assert_bitwise,
    assert_same_step,
    channels_last,
    distances,
    double_pair,
    end_process,
    pair,
    random,
    step,
    to_mode,
)
from sampling import sampled
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import fastunet
from fastunet import FastUNet
from fastunet.memory import measure_allocations, saved_for_backward
from fastunet.reference import UNet
from fastunet.reference.unet import NORMS

VARIANTS = [{"bilinear": True}, *({"norm": norm, "conv_bias": True} for norm in NORMS)]
variants = pytest.mark.parametrize("options", VARIANTS, ids=lambda o: str(next(iter(o.values()))))


# Construction and state


@pytest.mark.parametrize(("bilinear", "keys"), [(False, 118), (True, 110)])
def test_default_keys(bilinear, keys):
    with torch.device("meta"):
        plain, fast = UNet(3, 2, bilinear), FastUNet(3, 2, bilinear)
    assert len(fast.state_dict()) == keys
    described = [{k: (t.shape, t.dtype) for k, t in m.state_dict().items()} for m in (plain, fast)]
    assert list(described[0].items()) == list(described[1].items())


@variants
def test_strict_loading_both_ways(options):
    plain, fast = UNet(3, 2, **SMALL, **options), FastUNet(3, 2, **SMALL, **options)
    for source, target in ((plain, fast), (fast, plain)):
        with torch.no_grad():
            next(source.parameters()).normal_()
        target.load_state_dict(source.state_dict(), strict=True)
        state = source.state_dict()
        assert all(torch.equal(t, state[name]) for name, t in target.state_dict().items())


def test_signature_and_attributes():
    assert inspect.signature(FastUNet) == inspect.signature(UNet)
    model = FastUNet(1, 5, True, **SMALL)
    assert (model.n_channels, model.n_classes, model.bilinear) == (1, 5, True)
    assert isinstance(model, UNet)
    names = [(name, type(m).__name__) for name, m in UNet(1, 5, True, **SMALL).named_modules()]
    assert [(name, type(m).__name__) for name, m in model.named_modules()][1:] == names[1:]


# Memory formats and sizes


INPUTS = {
    "contiguous": lambda x: x,
    "channels_last": channels_last,
    "columns of a wider image": lambda x: torch.cat([x, x], dim=3)[..., : x.size(3)],
    "channels of a channels_last image": lambda x: channels_last(torch.cat([x, x], 1))[
        :, : x.size(1)
    ],
    "transposed": lambda x: x.mT.contiguous().mT,
    "grey expanded to colour": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("n_classes", [1, 2])
@pytest.mark.parametrize("n_channels", [1, 3])
@pytest.mark.parametrize("layout", INPUTS)
@pytest.mark.parametrize("model_format", FORMATS, ids=str)
@pytest.mark.parametrize("norm", sampled(NORMS, ["batch", "instance"]))
def test_logits_format(norm, model_format, layout, n_channels, n_classes):
    for batch in (1, 2):
        x = INPUTS[layout](random(batch, n_channels, 13, 11))
        plain, fast = pair(n_channels, n_classes, norm=norm)
        expected = plain.to(memory_format=model_format)(x)
        logits = fast.to(memory_format=model_format)(x)
        assert logits.stride() == expected.stride()
        if expected.is_contiguous():
            assert logits.view(batch, -1).shape == (batch, n_classes * 13 * 11)
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("model_format", FORMATS, ids=str)
@variants
def test_gradients_have_the_strides_of_parameters(options, model_format):
    model = pair(**options)[1].to(memory_format=model_format)
    x = random(2, 3, 13, 18)
    model(x).sum().backward()
    given = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    for (name, p), grad in zip(model.named_parameters(), given, strict=True):
        assert p.grad.stride() == p.stride(), name
        assert grad.stride() == p.stride(), name


@pytest.mark.parametrize("mode", sampled(["train", "eval"], ["train"]))
@pytest.mark.parametrize(
    "bilinear", sampled([False, True], [False]), ids=["transposed", "bilinear"]
)
def test_carvana_at_half_size(bilinear, mode):
    x = channels_last(random(1, 3, 640, 959, dtype=torch.float64))
    plain, fast = double_pair(bilinear=bilinear, base_channels=2, depth=4, mode=mode)
    assert_same_step(step(fast, x), step(plain, x))


@pytest.mark.parametrize("depth", [1, 2, 4])
@variants
def test_smallest_image(options, depth):
    size = (2**depth, 2 ** (depth + (options.get("norm") == "instance")))
    x = random(2, 3, *size, dtype=torch.float64)
    plain, fast = double_pair(depth=depth, **options)
    assert_same_step(step(fast, x), step(plain, x))
    assert_same_step(step(fast.eval(), x), step(plain.eval(), x))
    with pytest.raises(ValueError, match=f"at least .* = {2**depth}, got {2**depth - 1}x"):
        fast(x[:, :, 1:])


@pytest.mark.parametrize("mode", ["train", "eval"])
@variants
def test_empty_batch(options, mode):
    plain, fast = double_pair(mode=mode, **options)
    x = torch.empty(0, 3, 12, 17, dtype=torch.float64)
    actual = step(fast, x)
    if options.get("norm") == "instance":  # PyTorch's raises an IndexError
        assert actual["logits"].shape == (0, 2, 12, 17)
        assert not any(t.any() for t in actual.values())
    else:
        assert_same_step(actual, step(plain, x))


@pytest.mark.parametrize(
    ("norm", "mode"), [("batch", "train"), ("instance", "train"), ("instance", "eval")]
)
def test_one_value_per_channel(norm, mode):
    plain, fast = double_pair(norm=norm, mode=mode)
    x = random(1, 3, 4, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="Expected more than 1") as expected:
        plain(x)
    with pytest.raises(ValueError, match="Expected more than 1") as actual:
        fast(x)
    assert str(actual.value) == str(expected.value)


# Autograd


@variants
def test_without_gradients(options):
    model = to_mode(pair(**options)[1], "eval")
    x = random(2, 3, 13, 18)
    recorded = model(x)
    assert recorded.requires_grad
    with torch.no_grad():
        expected = model(x)
    # Normalised as they are written instead of as they are read: the same up to rounding.
    assert (expected - recorded).norm() <= 1e-5 * recorded.norm()
    with torch.inference_mode():
        logits = model(x)
    assert not logits.requires_grad
    assert not expected.requires_grad
    assert torch.equal(logits, expected)


FROZEN = {
    "encoder": lambda name: name.startswith(("inc", "down")),
    "decoder": lambda name: name.startswith("up"),
    "norms": lambda name: ".double_conv." in name and name[-8] in "14",
    "convolutions": lambda name: not (".double_conv." in name and name[-8] in "14"),
    "biases": lambda name: name.endswith("bias"),
    "all but the head": lambda name: not name.startswith("outc"),
    "all but the first layer": lambda name: not name.startswith("inc.double_conv.0"),
    "all but one beta": lambda name: name != "down2.maxpool_conv.1.double_conv.1.bias",
    "all but one upsampling": lambda name: not name.startswith("up2.up.weight"),
    "everything": lambda name: True,
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("input_grad", [False, True], ids=["", "input"])
@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_parameters(frozen, input_grad, mode):
    x = random(2, 3, 13, 18, dtype=torch.float64)
    grads = []
    for model in double_pair(mode=mode):
        for name, p in model.named_parameters():
            p.requires_grad_(not FROZEN[frozen](name))
        image = x.clone().requires_grad_(input_grad)
        logits = model(image)
        assert logits.requires_grad == (input_grad or frozen != "everything")
        if logits.requires_grad:
            logits.backward(random(*logits.shape, dtype=torch.float64))
        tensors = {"input": image} | dict(model.named_parameters())
        grads.append({name: t.grad for name, t in tensors.items() if t.grad is not None})
    plain, fast = grads
    assert fast.keys() == plain.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(fast[name], grad, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("reduce", [torch.sum, torch.mean, torch.norm])
def test_double_backward_is_refused(reduce):
    """A gradient penalty: it must not silently be a constant."""
    model, x = pair()[1], random(2, 3, 12, 16).requires_grad_()
    loss = reduce(model(x))
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        (loss + grad.square().sum()).backward()


def test_transforms_are_refused():
    model, x = pair()[1].eval(), random(1, 3, 12, 16)
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(lambda x: model(x).sum())(x)
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.vmap(model)(x[None])
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="forward-mode"),
    ):
        model(torch.autograd.forward_ad.make_dual(x, x))


def siamese(model, x):
    """Two forward passes, one backward pass."""
    loss = (model(x) - model(x.flip(3))).square().mean()
    loss.backward()


def accumulated(model, x):
    for image in x:
        model(image[None]).square().mean().backward()


def retained(model, x):
    loss = model(x).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()


def partial(model, x):
    """Gradients for one image and one class only."""
    model(x)[1, 0].square().mean().backward()


def on_cpu(model, x):
    with torch.autograd.graph.save_on_cpu():
        model(x).square().mean().backward()


def with_anomaly_detection(model, x):
    with torch.autograd.detect_anomaly(check_nan=True):
        model(x).square().mean().backward()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize(
    "use", [siamese, accumulated, retained, partial, on_cpu, with_anomaly_detection]
)
def test_uses_of_autograd(use):
    x = random(2, 3, 13, 18, dtype=torch.float64)
    plain, fast = double_pair()
    for model in (plain, fast):
        use(model, x)
    for (name, p), q in zip(plain.named_parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-12, msg=name)
    for (name, p), q in zip(plain.named_buffers(), fast.buffers(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-12, msg=name)


def test_parameters_changed_before_backward():
    """A stale graph must raise, not yield gradients of other weights."""
    model, x = pair()[1], random(2, 3, 12, 16)
    loss = model(x).sum()
    with torch.no_grad():
        model.up1.conv.double_conv[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_around_the_model(use_reentrant):
    """A recomputation by the user's own checkpoint updates no running statistics."""
    x = random(2, 3, 13, 18, dtype=torch.float64)
    _, fast = double_pair()
    expected = step(copy.deepcopy(fast), x)

    class Checkpointed(nn.Module):
        def forward(self, x):
            return checkpoint(fast, x, use_reentrant=use_reentrant)

        def named_parameters(self, *args, **kwargs):
            return fast.named_parameters(*args, **kwargs)

        def named_buffers(self, *args, **kwargs):
            return fast.named_buffers(*args, **kwargs)

    assert_bitwise(step(Checkpointed(), x), expected)


def test_checkpoint_around_blocks():
    class Checkpointed(FastUNet):
        def call(self, block, *inputs):
            return checkpoint(super().call, block, *inputs, use_reentrant=False)

    x = random(2, 3, 13, 18)
    fast = pair()[1]
    checkpointed = Checkpointed(3, 2, **SMALL)
    checkpointed.load_state_dict(fast.state_dict())
    assert_bitwise(step(checkpointed, x), step(fast, x))


@variants
def test_use_checkpointing(options):
    """The same gradients to the bit, running statistics updated once, less memory."""
    x = random(2, 3, 32, 48)
    fast = pair(**options, depth=3)[1]
    state = copy.deepcopy(fast.state_dict())
    keys = list(state)

    def run():
        fast.load_state_dict(state)
        held = measure_allocations(lambda: fast(x)).live_bytes
        fast.load_state_dict(state)
        return held, step(fast, x)

    held, expected = run()
    fast.use_checkpointing("full")
    assert list(fast.state_dict()) == keys
    held_now, actual = run()
    assert_bitwise(actual, expected)
    assert held_now < 0.7 * held
    fast.use_checkpointing(None)
    assert run()[0] == held


# Precision


def drift(model, exact):
    """The distance of the parameters from those of a model in float64."""
    pairs = zip(model.parameters(), exact.parameters(), strict=True)
    return sum((p - q).square().sum() for p, q in pairs).sqrt()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_precision_training(dtype):
    """The usual loop: channels_last, autocast, a scaled loss, clipped gradients."""

    def train(model, autocast=dtype):
        model = channels_last(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=autocast is not None)
        losses = []
        for seed in range(4):
            images = channels_last(random(2, 3, 26, 19, seed=seed)).to(model.outc.conv.weight)
            masks = (images.mean(1) > 0).long()
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                logits = model(images)
                loss = F.cross_entropy(logits, masks)
            assert logits.dtype == (autocast or torch.float64)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        assert optimizer.state  # no step was skipped for an overflow
        return torch.tensor(losses)

    plain, fast = pair(bilinear=True)
    exact = copy.deepcopy(plain).double()
    expected, usual, actual = train(exact, None), train(plain), train(fast)
    rounding = torch.finfo(dtype).eps * expected.norm()
    assert (actual - expected).norm() <= 2 * (usual - expected).norm() + rounding
    assert drift(fast, exact) <= 2 * drift(plain, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["train", "eval"])
@variants
def test_low_precision_models(options, mode, dtype):
    """model.half() and model.bfloat16()"""
    x = random(2, 3, 26, 19)
    plain, fast = (to_mode(model, mode) for model in pair(**options))
    exact = step(copy.deepcopy(plain).double(), x.double())
    steps = [step(model.to(dtype), x.to(dtype)) for model in (fast, plain)]
    for name, t in steps[1].items():
        assert steps[0][name].dtype == t.dtype, name
    mine, plains = (
        sum(d**2 for name, d in distances(each, exact).items() if name.endswith(".grad"))
        for each in steps
    )
    assert mine <= 4 * plains
    mine, plains = (distances(each, exact)["logits"] for each in steps)
    assert mine <= 2 * plains


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_casts_of_the_model(cast):
    model = getattr(pair()[1], cast)()
    x = getattr(random(2, 3, 12, 16), cast)()
    logits = model(x)
    assert logits.dtype == x.dtype
    logits.sum().backward()
    assert all(p.grad.dtype == x.dtype for p in model.parameters())


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.rand(1, 3, 8, 8, dtype=torch.float64), "dtype torch.float32, got torch.float64"),
        (torch.rand(1, 3, 8, 8).half(), "dtype torch.float32, got torch.float16"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "dtype torch.float32, got torch.uint8"),
        (torch.rand(1, 3, 8, 8, device="meta"), "device cpu, got meta"),
    ],
    ids=["double", "half", "bytes", "device"],
)
def test_mismatch_errors(x, message):
    with pytest.raises(TypeError, match=message) as error:
        pair()[1](x)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 120


@pytest.mark.parametrize(
    "x",
    [torch.rand(3, 8, 8), torch.rand(1, 4, 8, 8), None, [1]],
    ids=["no batch", "channels", "None", "list"],
)
def test_input_errors_are_the_references(x):
    plain, fast = pair()
    with pytest.raises(ValueError, match="input must") as expected:
        plain(x)
    with pytest.raises(ValueError, match="input must") as actual:
        fast(x)
    assert str(actual.value) == str(expected.value)


# Training


OPTIMIZERS = {
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, weight_decay=1e-8, momentum=0.999),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=1e-4),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_trajectory(optimizer):
    """Parameters, running statistics and an exponential moving average, over five steps."""

    def train(model):
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        steps = OPTIMIZERS[optimizer](model.parameters())
        for seed in range(5):
            x = random(2, 3, 13, 18, seed=seed, dtype=torch.float64)
            loss = F.cross_entropy(model(x), (x[:, 0] > 0).long())
            steps.zero_grad()
            loss.backward()
            steps.step()
            averaged.update_parameters(model)
        return averaged

    plain, fast = double_pair(conv_bias=True)
    expected, actual = train(plain).state_dict(), train(fast).state_dict()
    for theirs, ours in ((plain.state_dict(), fast.state_dict()), (expected, actual)):
        assert ours.keys() == theirs.keys()
        for name, t in theirs.items():
            torch.testing.assert_close(ours[name], t, rtol=1e-7, atol=1e-8, msg=name)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_copies_are_equal_and_independent(mode, tmp_path):
    x = random(2, 3, 13, 18)
    fast = to_mode(pair(bilinear=True)[1], mode)
    fast(x).sum().backward()  # a used model copies too
    torch.save(fast, tmp_path / "model.pt")
    copies = [
        copy.deepcopy(fast),
        pickle.loads(pickle.dumps(fast)),
        torch.load(tmp_path / "model.pt", weights_only=False),
        torch.load(io.BytesIO((tmp_path / "model.pt").read_bytes()), weights_only=False),
    ]
    state = copy.deepcopy(fast.state_dict())
    steps = [step(each, x) for each in copies]
    for name, t in fast.state_dict().items():
        assert torch.equal(t, state[name]), f"{name} is shared with a copy"
    expected = step(fast, x)
    for each in steps:
        assert_bitwise(each, expected)


def test_checkpoint_file(tmp_path):
    """As a training script writes it: a state_dict with an entry that is no tensor."""
    plain, fast = pair()
    torch.save(plain.state_dict() | {"mask_values": [0, 1]}, tmp_path / "checkpoint.pth")
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert state.pop("mask_values") == [0, 1]
    fast.load_state_dict(state)


def work(rank, world, path, norm, policy):
    """One process of a data-parallel training step, under frozen statistics."""
    torch.set_num_threads(1)
    warnings.filterwarnings("error", "Grad strides do not match bucket view strides")
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    fast = pair(norm=norm)[1]
    fast.use_checkpointing(policy)
    model = DistributedDataParallel(channels_last(to_mode(fast, "frozen").double()))
    x = random(2, 3, 13, 18, dtype=torch.float64)
    F.mse_loss(model(x[rank::world]), torch.ones(2 // world, 2, 13, 18).double()).backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in fast.named_parameters()}, f"{path}.grads")
    end_process()


@pytest.mark.parametrize(
    ("norm", "policy", "processes"),
    [
        pytest.param("batch", None, 1, marks=pytest.mark.slow),
        pytest.param("group", "light", 1, marks=pytest.mark.slow),
        pytest.param("batch", None, 2, marks=pytest.mark.slow),
        ("batch", "full", 2),
    ],
)
def test_data_parallel(norm, policy, processes, tmp_path):
    """The mean of the processes' gradients is the gradient of their joint batch."""
    torch.multiprocessing.spawn(
        work, (processes, tmp_path / "store", norm, policy), nprocs=processes
    )
    plain, _ = double_pair(norm=norm, mode="frozen")
    x = random(2, 3, 13, 18, dtype=torch.float64)
    F.mse_loss(plain(x), torch.ones(2, 2, 13, 18).double()).backward()
    grads = torch.load(tmp_path / "store.grads")
    for name, p in plain.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_momentum_none_averages_all_batches():
    plain, fast = double_pair()
    for model in (plain, fast):
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = None
                norm.reset_running_stats()
        for seed in range(3):
            model(random(2, 3, 13, 18, seed=seed, dtype=torch.float64))
    x = random(2, 3, 13, 18, dtype=torch.float64)
    assert_same_step(step(fast, x), step(plain, x))


def test_backend_is_remembered_by_the_graph():
    """Backward runs where forward ran."""
    _, fast = double_pair()
    x = random(2, 3, 13, 18, dtype=torch.float64)
    with fastunet.backend("reference"):
        logits = fast(x)
    with fastunet.backend("cpu"):
        logits.sum().backward()
    with pytest.raises(ValueError, match="backend must be one of"):
        fastunet.backend("gpu").__enter__()


def test_saves_less_than_the_reference():
    plain, fast = pair(base_channels=8, depth=3)
    x = random(1, 3, 64, 64)
    saved = [
        saved_for_backward(lambda m=m: m(x), [*m.parameters(), *m.buffers()]) for m in (fast, plain)
    ]
    assert saved[0] < 0.6 * saved[1]
