"""FastUNet under torch.compile and torch.export: one graph, the same results, no more memory."""

import copy

import pytest
import torch
from networks import (
    FORMATS,
    SMALL,
    assert_same_step,
    distances,
    double_pair,
    pair,
    random,
    step,
    to_mode,
)
from sampling import sampled
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import lowering

from fastunet import FastUNet
from fastunet.memory import saved_for_backward
from fastunet.ops import _register
from fastunet.reference.unet import NORMS

VARIANTS = [
    {"bilinear": True},
    *({"norm": norm, "conv_bias": norm != "batch"} for norm in NORMS),
    {"activation": "leaky_relu", "concat_order": "up_first"},
    {"checkpointing": "full"},
]


def name_of(options):
    return str(next(iter(options.values())))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Compiled(nn.Module):
    """A compiled model with the names of the model's own parameters and buffers."""

    def __init__(self, model, backend="aot_eager", **options):
        super().__init__()
        self.__dict__["model"] = model  # not as a submodule
        self.run = torch.compile(model, fullgraph=True, backend=backend, **options)

    def forward(self, x):
        return self.run(x)

    def named_parameters(self, *args, **kwargs):
        return self.model.named_parameters(*args, **kwargs)

    def named_buffers(self, *args, **kwargs):
        return self.model.named_buffers(*args, **kwargs)


@pytest.mark.parametrize("policy", sampled(["light", "full"], ["light"]))
def test_policies(policy):
    """One graph, too, where a policy was chosen afterwards."""
    _, fast = double_pair()
    compiled = Compiled(copy.deepcopy(fast))
    compiled.model.use_checkpointing(policy)
    x = random(2, 3, 13, 18, dtype=torch.float64)
    assert_same_step(step(compiled, x), step(fast, x))


@pytest.mark.parametrize("mode", sampled(["train", "eval"], ["train"]))
@pytest.mark.parametrize("options", sampled(VARIANTS, VARIANTS[::2]), ids=name_of)
def test_one_graph(options, mode):
    """Logits, gradients and running statistics of two steps, without a graph break."""
    _, fast = double_pair(mode=mode, **options)
    compiled = Compiled(copy.deepcopy(fast))
    for seed in range(2):
        x = random(2, 3, 12, 17, seed=seed, dtype=torch.float64)
        assert_same_step(step(compiled, x), step(fast, x))


@pytest.mark.parametrize("layout", sampled(FORMATS, [torch.channels_last]), ids=str)
def test_inductor(layout):
    _, fast = double_pair(bilinear=True)
    fast = fast.to(memory_format=layout)
    compiled = Compiled(copy.deepcopy(fast), "inductor")
    x = random(2, 3, 12, 17, dtype=torch.float64).to(memory_format=layout)
    assert_same_step(step(compiled, x), step(fast, x))


@pytest.mark.parametrize(("version", "told"), [((2, 11), True), ((2, 13), False)])
def test_old_inductors_are_told(monkeypatch, version, told):
    """What to call, before they compose a message that takes for ever."""
    op = torch.ops.fastunet.head.default
    monkeypatch.setattr(_register, "TORCH", version)
    monkeypatch.delitem(lowering.lowerings, op, raising=False)
    _register.call_from_inductor(op)
    assert (op in lowering.lowerings) == told


def test_autocast():
    """bfloat16 under the compiler is as far from eager FastUNet as rounding."""
    fast = pair(norm="none", activation="none", conv_bias=True)[1]
    x = random(2, 3, 16, 24)
    expected = step(fast, x, torch.bfloat16)
    actual = step(Compiled(copy.deepcopy(fast)), x, torch.bfloat16)
    assert {name: t.dtype for name, t in actual.items()} == {
        name: t.dtype for name, t in expected.items()
    }
    assert max(distances(actual, expected).values()) < 2e-2


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("options", VARIANTS, ids=name_of)
@pytest.mark.slow
def test_dynamic_sizes(options, mode):
    """The first size is not square, and no other size or batch compiles anything again."""
    _, fast = double_pair(mode=mode, **options)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = Compiled(copy.deepcopy(fast), counter, dynamic=True)
    counts = set()
    for size in ((2, 3, 16, 24), (2, 3, 19, 23), (3, 3, 20, 20)):
        x = random(*size, dtype=torch.float64)
        assert_same_step(step(compiled, x), step(fast, x))
        counts.add(counter.frame_count)
    assert len(counts) == 1


def test_automatic_dynamic_sizes():
    """As most people compile: the second size makes it dynamic, the third is free."""
    _, fast = double_pair()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = Compiled(copy.deepcopy(fast), counter)
    counts = []
    for size in ((16, 24), (19, 26), (21, 30)):
        x = random(2, 3, *size, dtype=torch.float64)
        assert_same_step(step(compiled, x), step(fast, x))
        counts.append(counter.frame_count)
    assert counts == [1, 2, 2]


def test_compiled_in_place():
    """model.compile(), then training and evaluation in turn."""
    plain, fast = double_pair()
    fast.compile(fullgraph=True, backend="aot_eager")
    x = random(2, 3, 13, 18, dtype=torch.float64)
    for mode in ("train", "eval", "train"):
        expected = step(to_mode(plain, mode), x)
        assert_same_step(step(to_mode(fast, mode), x), expected)


@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
@pytest.mark.parametrize("bilinear", [False, True], ids=["transposed", "bilinear"])
def test_export(bilinear, strict):
    _, fast = double_pair(bilinear=bilinear, mode="eval")
    x = random(2, 3, 13, 18, dtype=torch.float64)
    exported = torch.export.export(fast, (x,), strict=strict)
    torch.testing.assert_close(exported.module()(x), fast(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
def test_export_with_dynamic_sizes(strict):
    """The bar that segmentation-models-pytorch sets itself: H + 3, W + 7."""
    _, fast = double_pair(bilinear=True, mode="eval")
    x = random(2, 3, 16, 24, dtype=torch.float64)
    dim = torch.export.Dim.DYNAMIC
    exported = torch.export.export(
        fast, (x,), dynamic_shapes={"x": {0: dim, 2: dim, 3: dim}}, strict=strict
    )
    for size in ((2, 3, 16, 24), (3, 3, 19, 31)):
        x = random(*size, dtype=torch.float64)
        torch.testing.assert_close(exported.module()(x), fast(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("autocast", sampled([False, True], [False]), ids=["fp32", "bf16"])
@pytest.mark.parametrize("bilinear", sampled([False, True], [True]), ids=["transposed", "bilinear"])
def test_saves_no_more_than_eager(bilinear, autocast):
    model = FastUNet(3, 2, bilinear, **SMALL | {"base_channels": 8, "depth": 3})
    x = random(2, 3, 64, 48)
    excluded = [*model.parameters(), *model.buffers()]

    def saved(run):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            run(x)  # compiles
            return saved_for_backward(lambda: run(x), excluded)

    eager = saved(model)
    compiled = saved(torch.compile(model, fullgraph=True, backend="inductor"))
    assert 0 < compiled <= eager * 1.01
