"""The backend triton as a whole, interpreted: networks, and what decides whether it is chosen."""

import importlib
import json
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from networks import pair, random
from sampling import sampled
from test_parity import assert_as_accurate

import fastunet
from fastunet import backends, cache, composed, self_check
from fastunet.activation import MAX_POOL, Activation
from fastunet.memory import machine as machines
from fastunet.prepared import keeping

pytest.importorskip("triton", reason="triton is not installed")
if torch.cuda.is_available():
    pytest.skip("the interpreter is for machines without a GPU", allow_module_level=True)

from fastunet import triton as kernels
from fastunet.triton import convolution, language, selection, tuning
from fastunet.triton.selection import CUDNN, MATERIALISED, ON_LOAD, Layer

VARIANTS = {
    "bilinear": ({"bilinear": True, "depth": 1}, (5, 7)),
    "bilinear, deeper": ({"bilinear": True}, (13, 11)),
    "transposed": ({"bilinear": False, "conv_bias": True}, (12, 16)),
    "defaults": ({"depth": 4, "base_channels": 2}, (16, 16)),
    "no norm": ({"norm": "none", "bilinear": True, "depth": 1}, (5, 8)),
    "group": ({"norm": "group", "activation": "leaky_relu", "depth": 1}, (5, 8)),
}
SAMPLE = ("bilinear", "group")  # interpreted, the rest takes a minute


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Nothing known yet, and nothing kept."""
    monkeypatch.setenv("FASTUNET_CACHE", str(tmp_path))
    for known in (selection.measured, self_check.verdicts):
        known.cache_clear()
    yield tmp_path
    for known in (selection.measured, self_check.verdicts):
        known.cache_clear()


@pytest.mark.parametrize("variant", sampled(VARIANTS, ["group"]))
def test_training(variant):
    """Logits, gradients and running statistics, at most twice as far from float64 as plain
    PyTorch's."""
    options, size = VARIANTS[variant]
    with fastunet.backend("triton"), selection.forced(ON_LOAD):
        assert_as_accurate(options, "train", size, "contiguous", seeds=1)


@pytest.mark.parametrize("way", sampled([MATERIALISED, CUDNN], [CUDNN]))
def test_other_ways(way):
    with fastunet.backend("triton"), selection.forced(way):
        assert_as_accurate({"bilinear": False, "depth": 1}, "frozen", (6, 9), "both", seeds=1)


@pytest.mark.parametrize("way", selection.CANDIDATES)
@pytest.mark.parametrize("variant", sampled(VARIANTS, SAMPLE))
def test_inference(variant, way):
    """Norms and activations are done as each map is written; what is kept of the parameters
    serves again."""
    options, size = VARIANTS[variant]
    plain, fast = (model.eval() for model in pair(**options))
    x = random(1, 3, *size)
    kept: dict = {}
    fold = composed.conv_norm_act_folded
    with torch.no_grad(), fastunet.backend("triton"), selection.forced(way):
        want = plain(x)
        with patch.object(composed, "conv_norm_act_folded", wraps=fold) as folded:
            torch.testing.assert_close(fast(x), want, rtol=1e-4, atol=1e-4)
        assert folded.called == (options.get("norm") != "group")
        with keeping(kept):
            first = fast(x)
            count = len(kept)
            assert torch.equal(fast(x), first)
    assert count == len(kept)
    assert kept


def source(channels, mode=0, affine=True, dtype=torch.float16):
    y = torch.empty(1, channels, 32, 32, dtype=dtype)
    vector = torch.empty(1, channels) if affine else None
    x = Activation.of(y)._replace(center=vector, scale=vector, shift=vector)
    return x.pool() if mode == MAX_POOL else x


@pytest.mark.parametrize(
    ("sources", "outputs", "way"),
    [
        ([source(3, affine=False)], 64, ON_LOAD),
        ([source(64)], 64, ON_LOAD),
        ([source(64, dtype=torch.float32)], 64, ON_LOAD),
        ([source(128)], 128, MATERIALISED),
        ([source(64), source(128)], 64, MATERIALISED),
        ([source(64)], 512, CUDNN),
        ([source(13)], 24, ON_LOAD),
        ([source(24)], 21, CUDNN),
        ([source(21)], 24, CUDNN),
    ],
)
def test_sensible_choices(own_cache, sources, outputs, way):
    assert selection.choice("conv_norm_act", sources, outputs) == way


def test_exact_products_are_cudnns(own_cache):
    cudnn = torch.backends.cudnn.conv
    before, cudnn.fp32_precision = cudnn.fp32_precision, "ieee"
    try:
        assert selection.choice("conv_norm_act", [source(64, dtype=torch.float32)], 64) == CUDNN
        assert selection.choice("conv_norm_act", [source(64)], 64) == ON_LOAD
    finally:
        cudnn.fp32_precision = before


def test_measured_choice_comes_first(own_cache):
    """Also in another process, for the same class of sizes only."""
    layer = Layer.of("conv_norm_act", [source(64)], 64)
    selection.keep({layer.key(torch.device("cpu")): CUDNN})
    assert selection.choice("conv_norm_act", [source(64)], 64) == CUDNN
    selection.measured.cache_clear()
    assert selection.choice("conv_norm_act", [source(64)], 64) == CUDNN
    assert selection.choice("conv_norm_act", [source(64, MAX_POOL)], 64) == ON_LOAD
    assert selection.choice("conv_norm_act_bwd", [source(64)], 64) == ON_LOAD


@pytest.mark.parametrize("mode", sampled(["train", "eval"], ["eval"]))
def test_tuning(own_cache, mode):
    """Every class of layer is measured, and the model is left alone."""
    _, model = pair(depth=1, base_channels=2)
    model.train(mode == "train")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with fastunet.backend("triton"):
        choices = tuning.tune(model, random(1, 3, 6, 6), rounds=1)
    kinds = {key.split()[0] for key in choices}
    backward = {"conv_norm_act_bwd", "conv_transpose_bwd"} if mode == "train" else set()
    assert kinds == {"conv_norm_act", "conv_transpose"} | backward
    assert set(choices.values()) <= set(selection.CANDIDATES)
    assert json.loads((own_cache / "tuning.json").read_text()) == choices
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_tuning_needs_the_kernels(own_cache):
    _, model = pair(depth=1)
    for backend, why in (("auto", "never chosen automatically"), ("cpu", "backend is 'cpu'")):
        with fastunet.backend(backend), pytest.raises(RuntimeError, match=why):
            tuning.tune(model, random(1, 3, 6, 6))
    assert not list(own_cache.iterdir())


FIRST = {"conv_norm_act": 1, "conv_transpose": 1, "head": 3, "resample": 6}


@pytest.fixture
def fewer_cases(monkeypatch):
    """Of each operator's self-check the first; interpreted, all take minutes."""

    def first(operator):
        cases = self_check.CASES[operator]
        return lambda device: list(cases(device))[: FIRST[operator]]

    monkeypatch.setattr(self_check, "CASES", {op: first(op) for op in self_check.CASES})


@pytest.mark.parametrize("dtype", sampled([torch.float32, torch.float16], [torch.float32]), ids=str)
@pytest.mark.parametrize("operator", sampled(self_check.CASES, ["conv_norm_act", "resample"]))
def test_self_check_passes(fewer_cases, operator, dtype):
    """In whatever mode the caller is."""
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert self_check.check("triton", operator, dtype, torch.device("cpu")) == ("", True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("operator", self_check.CASES)
def test_whole_self_check_passes(operator):
    assert self_check.check("triton", operator, torch.float32, torch.device("cpu")) == ("", True)


def test_self_check_finds_wrong_kernels(fewer_cases, monkeypatch):
    convolve = convolution.convolve

    def shifted(kernel, *args, **kwargs):
        convolve(kernel._replace(padding=kernel.padding + 1), *args, **kwargs)

    names = ("conv_norm_act", "head")
    modules = {op: importlib.import_module(f"fastunet.triton.{op}") for op in names}
    for module in modules.values():
        monkeypatch.setattr(module, "convolve", shifted)
    for operator in modules:
        why, lasting = self_check.check("triton", operator, torch.float32, torch.device("cpu"))
        assert "are wrong here" in why
        assert lasting
    monkeypatch.setattr(modules["head"], "convolve", lambda *_, **__: 1 / 0)
    why, lasting = self_check.check("triton", "head", torch.float32, torch.device("cpu"))
    assert "fail here" in why
    assert not lasting
    assert "division by zero" in why


def test_kernels_are_compiled_ahead(monkeypatch):
    """None is launched meanwhile, and the first failure does not keep the others from it."""
    calls = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args: calls.append(("launched", grid, *args))

        def warmup(self, *args, grid):
            calls.append(("compiled", grid, *args))

    def work():
        language.launch(Kernel(), (2,))("a")
        raise KeyboardInterrupt

    monkeypatch.setattr(language.triton.knobs.runtime, "interpret", False)
    for _ in range(2):  # nothing of the mode is left
        with pytest.raises(KeyboardInterrupt):
            kernels.compile_ahead(work)
    language.launch(Kernel(), (2,))("a")
    assert calls == [("compiled", (2,), "a")] * 2 + [("launched", (2,), "a")]


def test_self_check_compiles_ahead(monkeypatch):
    """All that it launches; and what fails meanwhile decides nothing."""
    runs = []

    def run(implementation, dtype):
        runs.append((implementation.__name__, selection._forced))
        return {}

    def compile_ahead(work):
        work()
        runs.append("ahead")
        raise RuntimeError("no compiler")

    monkeypatch.setitem(self_check.CASES, "conv_norm_act", lambda device: [("one", run)])
    monkeypatch.setattr(kernels, "compile_ahead", compile_ahead)
    device = torch.device("cpu")
    assert self_check.check("triton", "conv_norm_act", torch.float32, device) == ("", True)
    both = [("fastunet.triton", ON_LOAD), ("fastunet.triton", MATERIALISED)]
    assert runs[:3] == [*both, "ahead"]
    assert [r for r in runs[3:] if r[0] != "fastunet.reference"] == both


@pytest.mark.parametrize(
    ("capability", "described"), [((8, 0), 0), ((9, 0), 1), ((10, 0), 1), ((12, 0), 0)]
)
def test_tensor_descriptors(monkeypatch, capability, described):
    """On data centres' GPUs alone, whose shared memory holds what runs ahead."""
    monkeypatch.setattr(convolution, "capability", lambda device: capability)
    x = source(64, affine=False)
    x = language.as_source(x.y.expand(1, 64, 32, 32)), convolution.Place(32, 64)
    config = convolution.configuration(convolution.CONV3X3, [x], (32, 64), 128)
    assert config.described == bool(described)


class OnGpu:
    """As much of a CUDA tensor as the choice of a backend looks at."""

    dtype = torch.float16
    device = torch.device("cuda", 0)


def test_verdicts_are_kept_and_decide(own_cache, monkeypatch):
    """A failed check means the next backend, a warning, and a line in doctor; and no second run."""
    runs = []

    def check(backend, operator, dtype, device):
        runs.append(operator)
        return {"head": ("wrong sums", True), "resample": ("no memory", False)}.get(
            operator, ("", True)
        )

    monkeypatch.setattr(self_check, "check", check)
    monkeypatch.setattr(cache, "fingerprint", lambda *_: "some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    x = OnGpu()
    with pytest.warns(RuntimeWarning, match="wrong sums"):
        assert backends.why_not("triton", "head", x) == "wrong sums"
    assert backends.why_not("triton", "conv_norm_act", x) == ""
    self_check.verdicts.cache_clear()
    assert backends.why_not("triton", "head", x) == "wrong sums"
    assert backends.why_not("triton", "conv_norm_act", x) == ""
    assert runs == ["head", "conv_norm_act"]
    # What failed, rather than was wrong, is tried again by the next process.
    with pytest.warns(RuntimeWarning, match="no memory"):
        assert backends.why_not("triton", "resample", x) == "no memory"
    assert backends.why_not("triton", "resample", x) == "no memory"
    self_check.verdicts.cache_clear()
    assert backends.why_not("triton", "resample", x) == "no memory"
    assert runs == ["head", "conv_norm_act", "resample", "resample"]
    x.dtype = torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "cannot be in a CUDA graph" in backends.why_not("triton", "conv_norm_act", x)
    assert len(runs) == 4


def test_counting_asks_for_what_will_run(monkeypatch):
    """In the step's dtype; and where the backend was asked for, no self-check."""
    checked = []

    def distrusted(backend, operator, x):
        checked.append((backend, x.dtype))
        return "wrong sums"

    monkeypatch.setattr(self_check, "distrusted", distrusted)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def empty(size, dtype, device):
        return SimpleNamespace(dtype=dtype, device=torch.device(device))

    gpu = SimpleNamespace(multi_processor_count=7)
    cuda = SimpleNamespace(is_available=lambda: True, get_device_properties=lambda device: gpu)
    monkeypatch.setattr(machines, "torch", SimpleNamespace(empty=empty, cuda=cuda))
    with fastunet.backend("triton"), machines.machine("cuda", torch.bfloat16):
        assert "triton" in backends.machine.backends
        assert not checked
    with fastunet.backend("auto"), machines.machine("cuda", torch.bfloat16):
        assert backends.machine.backends == ("reference",)
        assert backends.machine.processors == 7
    assert set(checked) <= {("triton", torch.bfloat16), ("cuda", torch.bfloat16)}
    assert ("triton", torch.bfloat16) in checked


def test_damaged_cache_is_none(own_cache):
    for text in ("", "{", "[]", '"x"'):
        (own_cache / "self_check.json").write_text(text)
        assert cache.read(cache.file("self_check")) == {}
    cache.save("self_check", {"a": ""})
    assert cache.read(cache.file("self_check")) == {"a": ""}
    assert [p.name for p in own_cache.iterdir()] == ["self_check.json"]


def test_interpreter_is_never_chosen():
    x = torch.zeros(1)
    assert kernels.why_not(x) == ""
    assert "never chosen automatically" in backends.why_not("triton", "head", x)


@pytest.mark.parametrize(
    ("x", "why"),
    [
        (torch.zeros(1, dtype=torch.float64), "dtype must be float32, bfloat16 or float16"),
        (torch.zeros(1, device="meta"), "must be on a CUDA GPU, got meta"),
        (torch.zeros(1, dtype=torch.bfloat16), "interpreter takes float32 and float16"),
    ],
)
def test_why_not(x, why):
    assert why in kernels.why_not(x)
    with fastunet.backend("triton"), pytest.raises(RuntimeError, match=why):
        backends.select("triton", "head", x)


def test_old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 8.0" in kernels.why_not(OnGpu())
