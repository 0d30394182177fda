"""Models on the CPU, recorded: from the third pass on programs do what the layers did, bit for bit,
and wherever the difference could be seen, the layers are called."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from networks import FORMATS, random
from torch import nn
from torch.autograd.graph import save_on_cpu

import fastunet
from fastunet import FastUNet, extension
from fastunet.program import Program, Recorder
from fastunet.recording import MOST, _recordings, recording
from fastunet.unet import DoubleConv

pytestmark = pytest.mark.skipif(extension.load()[0] is None, reason="no compiled kernels")

VARIANTS = {
    "bilinear": {"bilinear": True},
    "transposed": {},
    "bias": {"conv_bias": True, "bilinear": True},
    "up first": {"concat_order": "up_first", "activation": "leaky_relu"},
    "instance": {"norm": "instance", "bilinear": True},
    "group": {"norm": "group"},
    "no norm": {"norm": "none", "conv_bias": True},
    "deep": {"depth": 4, "bilinear": True, "n_classes": 21},
}
STEPS = 4  # by layers, recorded, and two by programs


def build(**options):
    torch.manual_seed(0)
    return FastUNet(3, **{"n_classes": 2, "base_channels": 8, "depth": 2, **options})


def twins(**options):
    model = build(**options)
    return model, copy.deepcopy(model)


def image(*size, seed=1):
    return random(*(size or (2, 3, 21, 34)), seed=seed)


def step(model, x, loss=lambda logits: logits.float().square().mean(), autocast=None):
    """Logits, gradients and buffers."""
    model.zero_grad()
    x.grad = None
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        logits = model(x)
    loss(logits).backward()
    grads = {f"d{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = {"logits": logits.detach(), **grads, **dict(model.named_buffers())}
    found |= {} if x.grad is None else {"dx": x.grad}
    return {name: t.clone() for name, t in found.items()}


def by_layers(*args, **kwargs):
    with recording(False):
        return step(*args, **kwargs)


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name
        assert got[name].stride() == want[name].stride(), name


def recorded(model):
    """The programs that there are, newest last: (has a forward, a backward, why there is none)."""
    known = _recordings[model].by_kind.values()
    return [(r.forward is not None, r.backward is not None, r.why_not) for r in known]


def by_program(model, x, monkeypatch):
    """Whether a pass calls no layer."""
    called = []
    original = DoubleConv.forward
    with monkeypatch.context() as patch:
        patch.setattr(DoubleConv, "forward", lambda *a: called.append(1) or original(*a))
        model(x)
    return not called


def returned_term(a, b):
    first = a.clone()
    return first, first + b


def term_read_again(a, b):
    first = a.clone()
    second = first + b
    third = second + second
    return (third + first,)


def chain(a, b):
    total = a.clone()
    for _ in range(3):
        total = total + b
    return (total,)


def views(a, b):
    made = torch.zeros_like(a)
    made[1:].copy_(b[1:])
    return made.view(-1)[3:7] + a.view(-1)[:4], made


@pytest.mark.parametrize("work", [returned_term, term_read_again, chain, views])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_programs(work, dtype):
    inputs = [random(3, 37, dtype=torch.float32, seed=s).to(dtype) for s in range(2)]
    recorder = Recorder(inputs)
    with recorder:
        made = work(*inputs)
    returned = [recorder.slot_of(t) for t in made]
    assert not recorder.why_not
    program = Program(recorder, recorder.steps, returned, first=[0, 1])
    for seed in (5, 6):
        inputs = [random(3, 37, dtype=torch.float32, seed=seed + s).to(dtype) for s in range(2)]
        before = [t.clone() for t in inputs]
        for held in (0, 1):
            got = program.run(inputs[: 2 - held], inputs[2 - held :])
            assert all(map(torch.equal, got, work(*before)))
        assert all(map(torch.equal, inputs, before))


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 4, 130, 65), (3, 2, 1, 9), (2, 5, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int64])
def test_copies_of_images(shape, dtype):
    x = (100 * random(*shape)).to(dtype)
    recorder = Recorder([x])
    with recorder:
        made = x.contiguous(memory_format=torch.channels_last)
    program = Program(recorder, recorder.steps, [recorder.slot_of(made)], first=[0])
    (got,) = program.run([x])
    assert torch.equal(got, x)
    assert got.stride() == made.stride()


def test_copies_to_all_samples():
    x = random(1, 3, 5, 7)
    recorder = Recorder([x])
    with recorder:
        made = torch.empty(2, 3, 5, 7).to(memory_format=torch.channels_last).copy_(x)
    program = Program(recorder, recorder.steps, [recorder.slot_of(made)], first=[0])
    (got,) = program.run([x])
    assert torch.equal(got, x.expand(2, 3, 5, 7))


@pytest.mark.parametrize(
    "work", [lambda a, b: a * b, lambda a, b: a.add(b, alpha=2), lambda a, b: a.add_(1), torch.cat]
)
def test_what_programs_cannot_do(work):
    inputs = [random(3, 4), random(3, 4, seed=2)]
    recorder = Recorder(inputs)
    with recorder:
        torch.empty(3, 4)  # whose address the result may have
        work(inputs) if work is torch.cat else work(*inputs)
    assert recorder.why_not


@pytest.mark.parametrize("policy", [None, "light", "full"])
@pytest.mark.parametrize("mode", ["train", "frozen"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_bits(variant, mode, policy, monkeypatch):
    model, twin = twins(**VARIANTS[variant])
    for m in (model, twin):
        m.train(mode == "train").use_checkpointing(policy)
    for i in range(STEPS):
        x = image(seed=i)
        assert_same(step(model, x), by_layers(twin, x))
    if variant == "bias" and mode == "frozen":  # whose gradient PyTorch forms
        assert recorded(model) == [(False, False, "aten.mul.Tensor")]
        return
    assert recorded(model) == [(True, True, "")]
    assert by_program(model, x, monkeypatch)


@pytest.mark.parametrize(
    ("autocast", "depth", "sums"), [(None, 2, 0), (None, 4, 0), (torch.bfloat16, 2, 6)]
)
def test_sums_by_kernels(autocast, depth, sums, monkeypatch):
    """What comes back to a skip connection is added up by its pooling's kernel, which does not
    round to bf16 first, as adding two gradients does."""
    found = []
    write = fastunet.program.instruction

    def instruction(step, *args):
        found.append(step.what)
        return write(step, *args)

    monkeypatch.setattr("fastunet.program.instruction", instruction)
    model, twin = twins(bilinear=True, depth=depth)
    for i in range(STEPS):
        x = image(2, 3, 37, 50, seed=i)
        assert_same(step(model, x, autocast=autocast), by_layers(twin, x, autocast=autocast))
    assert found.count("conv_norm_act_bwd") == 2 * (2 * depth + 1)
    assert found.count("add") == sums


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("layout", FORMATS)
def test_inputs_with_gradients(autocast, layout):
    model, twin = twins()
    for m in (model, twin):
        m.to(memory_format=layout)
    for i in range(STEPS):
        x = image(seed=i).to(memory_format=layout).requires_grad_()
        other = x.detach().clone().requires_grad_()
        assert_same(step(model, x, autocast=autocast), by_layers(twin, other, autocast=autocast))
    assert recorded(model) == [(True, True, "")]


LOSSES = {
    "square": lambda logits: logits.square().mean(),
    "sum": lambda logits: logits.sum(),  # whose gradient is one number, expanded
    "part": lambda logits: logits[:, :1, 3:].sum(),
    "transposed": lambda logits: (logits.permute(3, 2, 1, 0) * torch.ones(34, 21, 2, 2)).sum(),
}


@pytest.mark.parametrize("first", LOSSES)
def test_losses(first):
    model, twin = twins()
    x = image()
    for loss in (LOSSES[first], LOSSES[first], *LOSSES.values()):
        assert_same(step(model, x, loss), by_layers(twin, x, loss))


@pytest.mark.parametrize("grad", [False, True])
def test_inference(grad, monkeypatch):
    model, twin = twins(bilinear=True)
    for m in (model, twin):
        m.eval()
    context = torch.inference_mode if not grad else torch.enable_grad
    for i in range(5):
        x = image(seed=i)
        with context():
            got = model(x)
            with recording(False):
                assert torch.equal(got, twin(x))
            got.detach().zero_()  # results have memory of their own
        for m in (model, twin):
            with torch.no_grad():
                m.outc.conv.weight.mul_(1.1)
                m.inc.double_conv[1].running_var.add_(0.5)
    if not grad:
        assert recorded(model) == [(True, False, "")]
        with context():
            assert by_program(model, x, monkeypatch)


def test_models_made_in_inference_mode():
    x = image()
    with torch.inference_mode():
        model, twin = twins()
        for _ in range(STEPS):
            got = model(x)
            with recording(False):
                assert torch.equal(got, twin(x))
        assert_same(dict(model.named_buffers()), dict(twin.named_buffers()))


def test_no_samples():
    model = build().eval()
    for _ in range(STEPS):
        logits = model(torch.empty(0, 3, 32, 32))
        assert logits.shape == (0, 2, 32, 32)
        logits.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_frozen_parameters():
    model, twin = twins()
    for m in (model, twin):
        m.down1.requires_grad_(False)
        m.inc.double_conv[0].weight.requires_grad_(False)
    for i in range(STEPS):
        assert_same(step(model, image(seed=i)), by_layers(twin, image(seed=i)))
    assert recorded(model) == [(True, True, "")]


def test_all_frozen():
    model = build().requires_grad_(False)
    x = image()
    for _ in range(STEPS):
        assert not model(x).requires_grad


def warm(model, twin, x=None, steps=3):
    """Until the model runs by programs."""
    x = image() if x is None else x
    for _ in range(steps):
        assert_same(step(model, x), by_layers(twin, x))
    return x


CHANGES = {
    "momentum": lambda m: setattr(m.inc.double_conv[1], "momentum", 0.5),
    "no momentum": lambda m: setattr(m.inc.double_conv[1], "momentum", None),
    "eps": lambda m: setattr(m.down1.maxpool_conv[1].double_conv[1], "eps", 0.1),
    "slope": lambda m: setattr(m.up1.conv.double_conv[2], "negative_slope", 0.5),
    "one in evaluation": lambda m: m.inc.double_conv[4].eval(),
    "evaluation": lambda m: m.eval(),
    "frozen": lambda m: m.inc.double_conv[3].weight.requires_grad_(False),
    "weights": lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}),
    "weight's memory": lambda m: setattr(
        m.outc.conv.weight, "data", torch.ones_like(m.outc.conv.weight)
    ),
    "parameter": lambda m: setattr(
        m.inc.double_conv[0], "weight", nn.Parameter(torch.ones(8, 3, 3, 3))
    ),
    "buffer": lambda m: setattr(m.inc.double_conv[1], "running_mean", torch.ones(8)),
    "count": lambda m: setattr(m.inc.double_conv[1], "num_batches_tracked", torch.tensor(3)),
    "norm": lambda m: m.inc.double_conv.__setitem__(1, nn.GroupNorm(2, 8)),
    "block": lambda m: setattr(m, "inc", fastunet.reference.unet.DoubleConv(3, 8)),
    "activation": lambda m: m.inc.double_conv.__setitem__(2, nn.Sigmoid()),
    "order": lambda m: setattr(m.up1, "concat_order", "up_first"),
    "parametrized": lambda m: torch.nn.utils.parametrizations.weight_norm(m.inc.double_conv[0]),
    "checkpointing": lambda m: m.use_checkpointing("full"),
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_the_model(change):
    model, twin = twins(activation="leaky_relu")
    x = warm(model, twin)
    for m in (model, twin):
        torch.manual_seed(1)
        CHANGES[change](m)
    warm(model, twin, x, steps=4)


def test_double(monkeypatch):
    model, twin = twins()
    x = warm(model, twin)
    for m in (model, twin):
        m.double()
    warm(model, twin, x.double(), steps=4)
    assert not by_program(model, x.double(), monkeypatch)


@pytest.mark.parametrize("where", ["", "inc", "inc.double_conv.1", "up1.up", "outc"])
def test_hooks(where):
    model, twin = twins()
    x = warm(model, twin)
    seen: list[int] = []
    for m in (model, twin):
        m.get_submodule(where).register_forward_hook(lambda *_: seen.append(1))
    warm(model, twin, x, steps=4)
    assert len(seen) == 8


def test_hooks_on_parameters():
    model, twin = twins()
    seen: dict[FastUNet, int] = {model: 0, twin: 0}
    for m in seen:

        def count(grad, m=m):
            seen[m] += 1
            return grad * 2

        m.outc.conv.weight.register_hook(count)
        m.inc.double_conv[0].weight.register_post_accumulate_grad_hook(triple)
    warm(model, twin, steps=5)
    assert seen == {model: 5, twin: 5}


def triple(parameter):
    parameter.grad.mul_(3)


class Layers(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_whoever_looks_sees_layers(monkeypatch):
    model, twin = twins()
    x = warm(model, twin)
    with Layers() as mode:
        model(x)
    assert sum("conv_norm_act" in name for name in mode.seen) == 10
    with torch.profiler.profile() as profile:
        model(x).sum().backward()
    assert any("conv_norm_act" in event.key for event in profile.key_averages())
    for context in (save_on_cpu(), torch.autograd.detect_anomaly(check_nan=False), Layers()):
        with context:
            assert not by_program(model, x, monkeypatch)
    with fastunet.backend("reference"):
        assert not by_program(model, x, monkeypatch)
    with pytest.raises(NotImplementedError, match=r"torch\.func transforms"):
        torch.func.vmap(lambda one: model(one[None]))(x)
    assert by_program(model, x, monkeypatch)


def test_versions():
    """Who watches buffers sees that they change."""
    model, twin = twins()
    x = warm(model, twin)
    before = {name: b._version for name, b in model.named_buffers()}
    step(model, x)
    assert all(b._version > before[name] for name, b in model.named_buffers())


def test_two_passes_before_their_gradients():
    model, twin = twins()
    warm(model, twin)
    x, other = image(seed=5), image(seed=6)

    def both(m):
        m.zero_grad()
        first, second = m(x).square().mean(), m(other).square().mean()
        second.backward()
        first.backward()
        return [p.grad for p in m.parameters()] + [*m.buffers()]

    for _ in range(2):
        got = both(model)
        with recording(False):
            want = both(twin)
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("steps", [1, 3])  # before: then it is recorded, or runs by programs
def test_retained_graphs(steps):
    model, twin = twins()
    x = warm(model, twin, steps=steps)

    def twice(m):
        m.zero_grad()
        loss = m(x).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
        return [p.grad for p in m.parameters()]

    got = twice(model)
    with recording(False):
        want = twice(twin)
    assert all(map(torch.equal, got, want))
    warm(model, twin, x)


@pytest.mark.parametrize("steps", [1, 3])
def test_misuse(steps):
    model, twin = twins()
    x = warm(model, twin, steps=steps).requires_grad_()
    warm(model, twin, x, steps=steps)
    logits = model(x)
    (grad,) = torch.autograd.grad(logits.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad.sum().backward()
    logits = model(x)
    with torch.no_grad():
        model.inc.double_conv[3].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()


def test_without_a_backward_pass():
    model, twin = twins()
    x = image()
    for m, on in ((model, True), (twin, False)):
        with recording(on):
            for _ in range(4):
                m(x)
    assert_same(dict(model.named_buffers()), dict(twin.named_buffers()))
    warm(model, twin, x)


def test_a_gradient_that_is_the_input():
    model, twin = (m.eval() for m in twins(n_classes=3))
    for seed in (1, 1, 2, 3):
        x = image(seed=seed)
        grads = []
        for m, on in ((model, True), (twin, False)):
            m.zero_grad()
            with recording(on):
                m(x).backward(x if seed == 1 else image(seed=9))
            grads.append([p.grad for p in m.parameters()])
        assert all(map(torch.equal, *grads))


def test_gradients_that_nobody_wants():
    model, twin = twins()
    x = warm(model, twin)
    outc = model.outc.conv.weight
    (grad,) = torch.autograd.grad(model(x).sum(), [outc])
    with recording(False):
        (want,) = torch.autograd.grad(twin(x).sum(), [twin.outc.conv.weight])
    assert torch.equal(grad, want)
    warm(model, twin, x)


def test_gradients_add_up():
    model, twin = twins()
    x = warm(model, twin)
    for m, on in ((model, True), (twin, False)):
        with recording(on):
            m(x).sum().backward()
            m(2 * x).square().mean().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_many_sizes():
    model, twin = twins()
    for _ in range(3):
        for side in range(16, 16 + MOST + 3):
            x = image(1, 3, side, 20)
            assert_same(step(model, x), by_layers(twin, x))
    assert len(recorded(model)) <= MOST


def test_sizes_that_never_come_again():
    model = build().eval()
    with torch.no_grad():
        for side in range(16, 80):
            model(image(1, 3, side, 20))
    assert _recordings[model].credit < 1


def test_goes_with_its_model():
    model, twin = twins()
    x = warm(model, twin)
    gone = weakref.ref(model)
    copy.deepcopy(model)(x)
    del model
    gc.collect()
    assert gone() is None


def test_threads():
    model, twin = twins()
    x = image()
    with torch.no_grad():
        model.eval(), twin.eval()
        with recording(False):
            want = twin(x)
    wrong = []

    def work():
        with torch.no_grad():
            wrong.extend(1 for _ in range(20) if not torch.equal(model(x), want))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_memory():
    """What a step leaves in the memory for maps is what it took at its peak."""
    x = image(2, 3, 128, 128)

    def kept(model, on):
        with recording(on):
            for _ in range(3):
                step(model, x)
            gc.collect()
            fastunet.memory.release_map_memory()
            step(model, x)
        return fastunet.memory.kept_map_memory()

    model, twin = twins(base_channels=16, bilinear=True)
    layers, programs = kept(twin, False), kept(model, True)
    if layers == 0:
        pytest.skip("maps have no memory of their own here")
    assert recorded(model) == [(True, True, "")]
    assert 2 << 20 < programs <= layers * 1.02
