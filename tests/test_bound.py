"""The bound against PyTorch's own count of FLOPs, what is saved, and tables made by hand."""

import json

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastunet import FastUNet, bound
from fastunet.bound import Ceilings, Layer, Network, report
from fastunet.cli import main
from fastunet.memory import saved_for_backward
from fastunet.ops._register import TORCH
from fastunet.reference import UNet

MEASURED = Ceilings(788e12, 4.3e12)  # an H200: matrix product and copy
# Of one layer with as many channels out as in, per pixel and channel, in 16 bit.
BYTES = {
    "eager": (14, 24, 12),
    "compile": (10, 22, 8),
    "around": (10, 22, 8),
    "fused": (4, 16, 4),
}


def build(kind: type[UNet], net: Network) -> UNet:
    options = {"base_channels": net.base_channels, "depth": net.depth}
    return kind(net.n_channels, net.n_classes, net.bilinear, **options)


def image(net: Network) -> torch.Tensor:
    return torch.zeros(net.batch, net.n_channels, net.height, net.width)


@pytest.mark.parametrize(
    "net",
    [
        Network(),
        Network(bilinear=True),
        Network(1, 5, height=37, width=90, batch=3),
        Network(1, 1, bilinear=True, height=67, width=31, batch=2),
        Network(4, 21, base_channels=24, depth=3, height=640, width=959),
        Network(3, 2, bilinear=True, base_channels=24, depth=3, height=45, width=64),
        Network(3, 2, base_channels=5, depth=1, height=2, width=3, batch=2),
    ],
    ids=str,
)
def test_flops_are_pytorchs(net):
    with FakeTensorMode():
        model, x = build(UNet, net), image(net)
        with FlopCounterMode(display=False) as counter:
            logits = model(x)
        forward = counter.get_total_flops()
        layers = [
            sum(counts.values())
            for name, counts in counter.get_flop_counts().items()
            if isinstance(modules(model).get(name), nn.Conv2d | nn.ConvTranspose2d)
        ]
        with counter:
            logits.sum().backward()
        backward = counter.get_total_flops()
    found = report(net, MEASURED)
    assert found["flops"] == {"forward": forward, "step": forward + backward}
    assert [layer.flops for layer in net.layers() if layer.flops] == layers
    assert sum(sum(layer["flops"].values()) for layer in found["layers"]) == forward + backward


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """By the names that the FLOP counter gives them."""
    return {f"UNet.{name}": module for name, module in model.named_modules()}


@pytest.mark.parametrize("phase", bound.PHASES)
@pytest.mark.parametrize("model", bound.MODELS)
@pytest.mark.parametrize("dtype", bound.ITEMSIZE)
def test_bytes_of_one_layer(model, phase, dtype):
    layer = layer_of(
        Network(base_channels=24, height=50, width=60, batch=2, dtype=dtype), "up4.conv2"
    )
    assert layer.cin == layer.cout == 24
    weights = 9 * 24 * 24 * (2 if phase == "backward" else 1)  # w, in backward also dw
    maps = 2 * 24 * 50 * 60 * BYTES[model][bound.PHASES.index(phase)] // 2
    moved = sum(kernel.bytes for kernel in layer.kernels(model, phase))
    assert moved == (maps + weights) * bound.ITEMSIZE[dtype]


def layer_of(net: Network, name: str) -> Layer:
    return next(layer for layer in net.layers() if layer.name == name)


def test_bytes_of_other_sources():
    """What the fused convolution reads and writes, in maps of the top level, by hand."""
    net = Network(base_channels=32, depth=1, height=64, width=64)
    top = 2 * 32 * 64 * 64
    pooled = layer_of(net, "down1.conv1")
    w = 2 * 9 * 32 * 64
    assert kernels(pooled, "fused", "forward") == [top + w + top // 2]
    # apply; dgrad: dy, w, y and the skip's gradient of the top level -> that level; wgrad
    assert kernels(pooled, "fused", "backward") == [3 * top // 2, 3.5 * top + w, 1.5 * top + w]
    assert kernels(pooled, "eager", "forward")[0] == top // 4 + w + top // 2
    pair = layer_of(net, "up1.conv1")
    assert kernels(pair, "fused", "forward") == [2 * top + w + top]
    # dgrad: dy, w, the skip's y -> both; the transposed convolution's output has no mask
    assert kernels(pair, "fused", "backward") == [3 * top, 4 * top + w, 3 * top + w]
    pair = layer_of(
        Network(bilinear=True, base_channels=32, depth=1, height=64, width=64), "up1.conv1"
    )
    assert kernels(pair, "fused", "forward") == [top + top // 4 + w + top]
    first = layer_of(net, "inc.conv1")
    assert [kernel.name for kernel in first.kernels("fused", "backward")] == ["apply", "wgrad"]
    assert [layer.reads for layer in net.layers()] == [
        *("plain", "affine + act", "affine + act", "max-pool", "affine + act"),
        *("affine + act", "skip + transposed", "affine + act", "affine + act"),
    ]


@pytest.mark.parametrize(
    ("name", "bilinear", "eager", "compiled", "around", "fused"),
    [  # forward, backward, inference: read + written, kernel by kernel
        (
            *("down1.pool", False, (1 + 1.25, 2.25 + 3, 2.25), (1.375, 2.375, 1.25)),
            *((0, 3, 0), (0, 0, 0)),
        ),
        (
            *("up1.up", False),
            (1.5 + 2 + 2 + 4, 2 + 1 + 1.5 + 1.5, 9.5),
            (1.5 + 4, 2 + 1.5 + 1.5, 5.5),
            (1 + 1.5 + 2, 1 + 1.5 + 2 + 1.5, 4.5),
            (1.5, 2 + 1.5, 1.5),
        ),
        (
            *("up1.up", True, (1.25 + 2 + 4, 2 + 1.25, 7.25), (3.25, 1.25, 3.25)),
            *((0, 0, 0), (0, 1.5, 0)),
        ),
        (
            *("outc", False, (1.5 + 1, 0.5 + 1.5 + 1.5, 2.5), (1.5, 3, 1.5)),
            *((2 + 1.5 + 1, 0.5 + 1.5 + 4 + 1.5, 4.5), (1.5, 2.5, 1.5)),
        ),
        ("inc.conv2", False, (7, 12, 6), (5, 9, 4), (5, 11, 4), (2, 8, 2)),
    ],
)
def test_bytes_between_convolutions(name, bilinear, eager, compiled, around, fused):
    """In maps of the top level, by hand; pooled: 1/4, its int64 indices 1, its offsets 1/8."""
    net = Network(bilinear=bilinear, n_classes=16, base_channels=32, depth=1, height=64, width=64)
    layer = layer_of(net, name)
    weights = layer.maps.get("w", 0)
    for model, expected in zip(bound.MODELS, (eager, compiled, around, fused), strict=True):
        for phase, maps in zip(bound.PHASES, expected, strict=True):
            moved = sum(kernels(layer, model, phase))
            moved -= weights * (2 if phase == "backward" else 1)
            assert moved == maps * 2 * 32 * 64 * 64, (model, phase)


def kernels(layer: Layer, model: str, phase: str) -> list[int]:
    return [kernel.bytes for kernel in layer.kernels(model, phase)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bilinear", [False, True], ids=["transposed", "bilinear"])
@pytest.mark.parametrize("model", ["eager", "fused"])
def test_saved_bytes(model, bilinear, dtype):
    net = Network(3, 2, bilinear, 16, 3, 2, 67, 90, dtype)
    kind = {"eager": UNet, "fused": FastUNet}[model]
    found = report(net, MEASURED)["models"][model]["saved_bytes"]
    assert found == pytest.approx(saved(build(kind, net), net), rel=0.01)


@pytest.mark.skipif(
    TORCH < (2, 13), reason="with torch 2.11, torch.compile saves a tenth more than is counted"
)
@pytest.mark.parametrize("bilinear", [False, True], ids=["transposed", "bilinear"])
def test_saved_bytes_compiled(bilinear):
    """The partition of torch.compile, without generating code."""
    net = Network(3, 2, bilinear, 8, 2, 2, 64, 96, "float32")
    torch._dynamo.reset()
    compiled = torch.compile(build(UNet, net), backend="aot_eager_decomp_partition")
    found = report(net, MEASURED)["models"]["compile"]["saved_bytes"]
    assert found == pytest.approx(saved(compiled, net), rel=0.01)


def saved(model: nn.Module, net: Network) -> int:
    dtype = getattr(torch, net.dtype)
    model, x = model.to(dtype), image(net).to(dtype)
    return saved_for_backward(lambda: model(x), [*model.parameters(), *model.buffers()])


def test_gain_of_one_layer():
    """At 184 FLOP/B a layer of C channels does 4.5 C: fusion gains where C is small."""
    ratios = {}
    for step in range(1, 5):
        layer = layer_of(Network(), f"up{step}.conv2")
        seconds = {
            model: sum(
                MEASURED.seconds(kernel)
                for phase in ("forward", "backward")
                for kernel in layer.kernels(model, phase)
            )
            for model in bound.MODELS
        }
        ratios[layer.cin] = seconds["compile"] / seconds["fused"]
    assert ratios == pytest.approx({64: 1.56, 128: 1.32, 256: 1.17, 512: 1.09}, abs=0.005)


def test_of_a_whole_network():
    found = report(Network(), MEASURED)
    assert found["flops"]["forward"] == pytest.approx(385e9, rel=0.01)
    assert found["flops"]["step"] == pytest.approx(1155e9, rel=0.01)
    saved = {model: of["saved_bytes"] / 1e6 for model, of in found["models"].items()}
    assert saved == pytest.approx(
        {"eager": 718, "compile": 600, "around": 320, "fused": 320}, rel=0.01
    )
    for what in ("training", "inference"):
        speeds = {m: of[f"{what}_images_per_second"] for m, of in found["models"].items()}
        alone = found["flops_alone"][f"{what}_images_per_second"]
        assert speeds["eager"] < speeds["compile"] < speeds["fused"] < alone
        assert speeds["eager"] < speeds["around"] < speeds["fused"]


GROWTH = [
    *({name: 2 * getattr(Network(), name)} for name in ("n_channels", "n_classes", "batch")),
    *({name: 2 * getattr(Network(), name)} for name in ("base_channels", "height", "width")),
    {"depth": 5},
    {"dtype": "float32"},
]


@pytest.mark.parametrize("bilinear", [False, True], ids=["transposed", "bilinear"])
@pytest.mark.parametrize("change", GROWTH, ids=str)
def test_more_takes_longer(change, bilinear):
    small = report(Network(bilinear=bilinear), MEASURED)
    large = report(Network(**{"bilinear": bilinear, **change}), MEASURED)
    for phase in ("forward", "step"):
        assert large["flops"][phase] >= small["flops"][phase]
    for model in bound.MODELS:
        for name, value in small["models"][model].items():
            if name.endswith(("bytes", "seconds")):
                more = large["models"][model][name]
                assert more > value or (name == "saved_bytes" and more == value), (model, name)


def test_faster_hardware():
    net = Network()
    one, flops, bandwidth, both = (
        report(net, Ceilings(a * 788e12, b * 4.3e12))["models"]
        for a, b in ((1, 1), (2, 1), (1, 2), (2, 2))
    )
    for model in bound.MODELS:
        time = one[model]["training_seconds"]
        assert both[model]["training_seconds"] == pytest.approx(time / 2)
        for faster in (flops, bandwidth):
            assert time / 2 < faster[model]["training_seconds"] < time


def test_published_peaks():
    for gpu in bound.GPUS:
        half, single = (Ceilings.of(gpu, dtype) for dtype in ("bfloat16", "float32"))
        assert half == Ceilings.of(gpu, "float16")
        assert half.flops >= 1.9 * single.flops
        assert half.bandwidth == single.bandwidth
    assert Ceilings.of(None, "bfloat16").gpu == "H200"
    assert Ceilings.of("L4", "bfloat16", tflops=50) == Ceilings(50e12, 0.3e12, "L4")
    assert Ceilings.of(None, "bfloat16", 788, 4.3) == MEASURED


def bench(*options: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["bench", *options])
    assert result.exit_code == code, result.output
    return result.output


def test_text():
    text = bench("--bound", "--tflops", "788", "--bandwidth", "4.3", "--batch", "16")
    assert "base 64, depth 4, transposed, batch 16, 512x512, bfloat16" in text
    assert "788 TFLOP/s, 4.3 TB/s" in text
    assert "385.4 GFLOP per image forward, 1155.2 in a training step" in text
    lines = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert lines["training, images/s"][2:] == ["389", "448", "426", "580", "682"]
    assert lines["saved for backward, MB per image"][6:] == ["718", "600", "320", "320"]
    for layer in Network().layers():
        assert layer.name in lines


def test_text_names_options():
    text = bench(
        *("--bound", "--bilinear", "--base", "24", "--depth", "3", "--size", "640x959"),
        *("--channels", "1", "--classes", "5", "--dtype", "float32", "--gpu", "rtx-4090"),
    )
    assert "U-Net 1 -> 5, base 24, depth 3, bilinear, batch 1, 640x959, float32" in text
    assert "RTX-4090: 82.6 TFLOP/s, 1.008 TB/s" in text


def test_json():
    found = json.loads(bench("--bound", "--json", "--size", "65x96", "--gpu", "A100-SXM"))
    net = Network(height=65, width=96)
    assert found == json.loads(json.dumps(report(net, Ceilings.of("A100-SXM", "bfloat16"))))
    assert found["ceilings"] == pytest.approx(
        {"flops": 312e12, "bandwidth": 2.039e12, "gpu": "A100-SXM"}
    )
    for model, of in found["models"].items():
        for phase in bound.PHASES:
            kernels = [k for layer in found["layers"] for k in layer["models"][model][phase]]
            for unit in ("bytes", "seconds"):
                assert of[f"{phase}_{unit}"] == pytest.approx(sum(k[unit] for k in kernels))
            for k in kernels:
                least = max(k["flops"] / 312e12, k["bytes"] / 2.039e12)
                assert k["seconds"] == pytest.approx(least)


def test_table():
    assert list(bound.table([["", "b"], ["aaa", "1"], ["c", "222"]], 1)) == [
        "       b",
        "aaa    1",
        "c    222",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--channels 0", "n_channels must be a positive integer, got 0."),
        ("--classes -1", "n_classes must be a positive integer, got -1."),
        ("--base 0", "base_channels must be a positive integer, got 0."),
        ("--depth 0", "depth must be a positive integer, got 0."),
        ("--batch -3", "batch must be a positive integer, got -3."),
        ("--size 0x64", "height must be a positive integer, got 0."),
        ("--size 15x64", "height and width must be at least 2**depth = 16, got 15x64."),
        ("--size 64x7 --depth 3", "height and width must be at least 2**depth = 8, got 64x7."),
        ("--depth 99999999999", "must be at least 2**99999999999, got 512x512."),
        ("--size 512", "size must be HxW, for instance 640x959, got '512'."),
        ("--size -5x64", "size must be HxW, for instance 640x959, got '-5x64'."),
        ("--size 9999999999x64", "size must be HxW, for instance 640x959, got '9999999999x64'."),
        ("--dtype float64", "'float64' is not one of 'float32', 'bfloat16', 'float16'."),
        ("--gpu V100", "Invalid value for '--gpu': 'V100' is not one of"),
        ("--base 1.5", "Invalid value for '--base': '1.5' is not a valid integer."),
        ("--tflops 788", "tflops and bandwidth must be given together, or with a gpu."),
        ("--bandwidth 4", "tflops and bandwidth must be given together, or with a gpu."),
        ("--tflops 0 --gpu L4", "tflops must be positive and finite, got 0."),
        ("--tflops 788 --bandwidth -4", "bandwidth must be positive and finite, got -4."),
        ("--tflops nan --bandwidth 4", "tflops must be positive and finite, got nan."),
        ("--tflops 1 --bandwidth inf", "bandwidth must be positive and finite, got inf."),
    ],
)
def test_bad_input(options, message):
    assert message in bench("--bound", *options.split(), code=2)


def test_unknown_dtype():
    with pytest.raises(
        ValueError, match="dtype must be one of float32, bfloat16, float16, got 'int8'"
    ):
        Network(dtype="int8")


@pytest.mark.parametrize("options", [(), ("--base", "32"), ("--json",)])
def test_measuring_lives_elsewhere(options):
    text = bench(*options, code=2)
    assert "measuring is done by `python -m benchmarks.run` in a checkout" in text
    assert "fastunet bench --bound" in text
