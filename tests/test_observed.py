"""FastUNet under hooks, with layers replaced, and its blocks called by themselves: whoever looks
sees what the plain U-Net shows."""

import types

import pytest
import torch
from networks import (
    FORMATS,
    SMALL,
    assert_same_step,
    channels_last,
    double_pair,
    pair,
    random,
    step,
    strides,
    to_mode,
)
from sampling import sampled
from torch import Tensor, nn

from fastunet import FastUNet
from fastunet.activation import NEAREST, Activation, Concat
from fastunet.ops import materialize
from fastunet.reference import UNet
from fastunet.unet import DoubleConv, Down, Up

MODULES = (
    "",
    "inc",
    "inc.double_conv",
    "inc.double_conv.0",
    "inc.double_conv.1",
    "inc.double_conv.2",
    "down1",
    "down2.maxpool_conv",
    "down2.maxpool_conv.0",
    "down2.maxpool_conv.1",
    "down2.maxpool_conv.1.double_conv.3",
    "up1",
    "up1.up",
    "up1.conv",
    "up2.conv.double_conv.4",
    "outc",
    "outc.conv",
)


class Recorder:
    """Hooks that write down what they are given: a list of (kind, tensors)."""

    def __init__(self):
        self.seen: list[tuple[str, list[Tensor]]] = []

    def note(self, kind, *values):
        tensors = [t for value in values for t in (value if isinstance(value, tuple) else [value])]
        assert all(t is None or isinstance(t, Tensor) for t in tensors)
        self.seen.append((kind, [None if t is None else t.detach().clone() for t in tensors]))

    def forward_pre(self, module, inputs):
        self.note("forward_pre", inputs)

    def forward(self, module, inputs, output):
        self.note("forward", inputs, output)

    def full_backward_pre(self, module, grads):
        self.note("full_backward_pre", grads)

    def full_backward(self, module, grads_in, grads_out):
        self.note("full_backward", grads_in, grads_out)


def assert_saw_the_same(fast: Recorder, plain: Recorder) -> None:
    assert [kind for kind, _ in fast.seen] == [kind for kind, _ in plain.seen]
    assert plain.seen
    for (kind, actual), (_, expected) in zip(fast.seen, plain.seen, strict=True):
        for t, u in zip(actual, expected, strict=True):
            torch.testing.assert_close(t, u, rtol=1e-9, atol=1e-9)
            if t is not None and kind.startswith("forward"):  # gradients have no promised layout
                assert strides(t) == strides(u), kind


def without_inplace(model: nn.Module) -> nn.Module:
    """Backward hooks and in-place activations do not go together, in the plain U-Net too."""
    for module in model.modules():
        if isinstance(module, nn.ReLU | nn.LeakyReLU):
            module.inplace = False
    return model


@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward_pre", "full_backward"])
@pytest.mark.parametrize("format", sampled(FORMATS, [torch.channels_last]), ids=str)
@pytest.mark.parametrize("path", MODULES)
def test_hooks(path, format, kind):
    x = random(2, 3, 13, 18, dtype=torch.float64).to(memory_format=format)
    recorders, steps = [], []
    for model in double_pair():
        recorders.append(Recorder())
        module = without_inplace(model).to(memory_format=format).get_submodule(path)
        getattr(module, f"register_{kind}_hook")(getattr(recorders[-1], kind))
        steps.append(step(model, x))
    plain, fast = recorders
    assert_saw_the_same(fast, plain)
    assert_same_step(steps[1], steps[0])


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("options", [{"norm": "instance"}, {"norm": "group", "bilinear": True}])
def test_hooks_on_everything(options, format):
    x = random(2, 3, 13, 18, dtype=torch.float64).to(memory_format=format)
    recorders, steps = [], []
    for model in double_pair(**options):
        recorders.append(Recorder())
        for module in model.to(memory_format=format).modules():
            module.register_forward_hook(recorders[-1].forward)
        steps.append(step(model, x))
    assert_saw_the_same(recorders[1], recorders[0])
    assert_same_step(steps[1], steps[0])


def test_hooks_that_change_things():
    """A hook may replace inputs, outputs and gradients."""
    x = random(2, 3, 13, 18, dtype=torch.float64)
    steps = []
    for model in double_pair():
        without_inplace(model)
        model.down1.register_forward_hook(lambda m, i, o: o * 2)
        model.up1.register_forward_pre_hook(lambda m, i: (i[0] + 1, i[1]))
        model.inc.double_conv[3].register_forward_hook(lambda m, i, o: o.tanh())
        model.up2.conv.register_full_backward_hook(lambda m, i, o: (i[0] * 3,))
        steps.append(step(model, x))
    assert_same_step(steps[1], steps[0])


def test_hooks_that_were_removed():
    """The fused path is back: nothing of the hook is left."""
    x = random(2, 3, 13, 18)
    fast = pair()[1].eval()
    expected = step(fast, x)
    handle = fast.inc.double_conv[0].register_forward_hook(lambda m, i, o: o * 2)
    assert not torch.equal(fast(x), expected["logits"])
    handle.remove()
    assert torch.equal(fast(x), expected["logits"])


@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward"])
def test_global_hooks(kind):
    x = random(2, 3, 13, 18, dtype=torch.float64)
    recorders = []
    for model in map(without_inplace, double_pair(bilinear=True)):
        recorder = Recorder()
        register = getattr(nn.modules.module, f"register_module_{kind}_hook")
        handle = register(getattr(recorder, kind))
        try:
            step(model, x)
        finally:
            handle.remove()
        recorders.append(recorder)
    assert len(recorders[0].seen) > 40
    assert_saw_the_same(recorders[1], recorders[0])


@pytest.mark.parametrize("path", ["down2.maxpool_conv.1.double_conv.3", "up2.conv", "outc.conv"])
def test_grad_cam(path):
    """Activations and their gradients, by a tensor hook."""
    x = random(2, 3, 13, 18, dtype=torch.float64)
    maps = []
    for model in double_pair(mode="eval"):
        kept = []
        model.get_submodule(path).register_forward_hook(lambda m, i, o, k=kept: k.append(o))
        logits = model(x)
        kept[0].retain_grad()
        logits[:, 1].sum().backward()
        maps.append((kept[0].detach(), kept[0].grad))
    for actual, expected in zip(maps[1], maps[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_parameter_hooks():
    x = random(2, 3, 13, 18, dtype=torch.float64)
    steps, called = [], []
    for model in double_pair():
        for p in model.parameters():
            p.register_hook(lambda grad: grad * 2)
            p.register_post_accumulate_grad_hook(lambda p: called.append(p.grad.norm()))
        steps.append(step(model, x))
    assert_same_step(steps[1], steps[0])
    assert len(called) == 2 * len(list(model.parameters()))


# Replaced layers


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class OwnDoubleConv(DoubleConv):
    def forward(self, x):
        return super().forward(x) + 1


def set_layer(path, make):
    def edit(model):
        model.set_submodule(path, make(model.get_submodule(path)))

    return edit


def set_attributes(path, **values):
    def edit(model):
        for name, value in values.items():
            setattr(model.get_submodule(path), name, value)

    return edit


def own_forward(path):
    """Replaces forward on an instance, as quantisation and profiling tools do."""

    def edit(model):
        module = model.get_submodule(path)
        forward = module.forward
        module.forward = types.MethodType(lambda self, *x: forward(*x) * 1.5, module)

    return edit


def parametrize(path):
    return lambda model: nn.utils.parametrizations.weight_norm(model.get_submodule(path))


def old_weight_norm(model):
    nn.utils.weight_norm(model.inc.double_conv[3])


def spectral_norm(model):
    nn.utils.parametrizations.spectral_norm(model.up2.conv.double_conv[0])


def batch_norm(**options):
    return lambda old: nn.BatchNorm2d(old.num_features, **options)


def conv(kind=nn.Conv2d, **options):
    return lambda old: kind(old.in_channels, old.out_channels, 3, **{"padding": 1} | options)


def share_activation(model):
    model.inc.double_conv[2] = model.inc.double_conv[5]


def append_dropout(model):
    model.down1.maxpool_conv[1].double_conv.append(nn.Dropout2d(0.0))


def three_convolutions(model):
    model.inc.double_conv.extend([nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()])


def norm_after_activation(model):
    """The order of jvanvugt's U-Net."""
    layers = model.inc.double_conv
    layers[1], layers[2] = layers[2], layers[1]


def activation_first(model):
    layers = model.up1.conv.double_conv
    model.up1.conv.double_conv = nn.Sequential(nn.ReLU(), *layers)


def frozen_layer(model):
    model.down1.maxpool_conv[1].double_conv[1].eval()


FIRST, SECOND = "inc.double_conv", "up1.conv.double_conv"
EDITS = {
    "GELU": set_layer(f"{FIRST}.2", lambda old: nn.GELU()),
    "PReLU": set_layer(f"{SECOND}.2", lambda old: nn.PReLU(init=0.3)),
    "LeakyReLU": set_layer(f"{FIRST}.2", lambda old: nn.LeakyReLU(0.2)),
    "increasing LeakyReLU": set_layer(f"{FIRST}.2", lambda old: nn.LeakyReLU(1.5)),
    "decreasing LeakyReLU": set_layer(f"{FIRST}.2", lambda old: nn.LeakyReLU(-0.5)),
    "no activation": set_layer(f"{SECOND}.5", lambda old: nn.Identity()),
    "one activation, twice": share_activation,
    "no norm": set_layer(f"{FIRST}.1", lambda old: nn.Identity()),
    "cumulative norm": set_layer(f"{FIRST}.1", batch_norm(momentum=None)),
    "plain norm": set_layer(f"{FIRST}.1", batch_norm(affine=False)),
    "batch norm for ever": set_layer(f"{SECOND}.1", batch_norm(track_running_stats=False)),
    "another eps": set_attributes(f"{SECOND}.4", eps=0.1, momentum=0.7),
    "statistics switched off": set_attributes(f"{FIRST}.1", track_running_stats=False),
    "statistics removed": set_attributes(f"{FIRST}.1", running_mean=None, running_var=None),
    "one norm frozen": frozen_layer,
    "GroupNorm": set_layer(f"{FIRST}.1", lambda old: nn.GroupNorm(2, old.num_features)),
    "plain GroupNorm": set_layer(f"{FIRST}.1", lambda old: nn.GroupNorm(1, 4, affine=False)),
    "InstanceNorm": set_layer(f"{FIRST}.1", lambda old: nn.InstanceNorm2d(old.num_features)),
    "tracking InstanceNorm": set_layer(
        f"{FIRST}.1", lambda old: nn.InstanceNorm2d(4, track_running_stats=True)
    ),
    "LocalResponseNorm": set_layer(f"{FIRST}.4", lambda old: nn.LocalResponseNorm(2)),
    "conv subclass": set_layer(f"{FIRST}.0", conv(OwnConv)),
    "conv with bias": set_layer(f"{SECOND}.0", conv(bias=True)),
    "reflected padding": set_layer(f"{FIRST}.3", conv(padding_mode="reflect")),
    "same padding": set_layer(f"{FIRST}.3", conv(padding="same")),
    "dilated": set_layer(f"{FIRST}.3", conv(padding=2, dilation=2)),
    "depthwise": set_layer(f"{FIRST}.3", conv(groups=4)),
    "1x1": set_layer(f"{FIRST}.3", lambda old: nn.Conv2d(4, 4, 1)),
    "5x5": set_layer(f"{FIRST}.3", lambda old: nn.Conv2d(4, 4, 5, padding=2)),
    "transposed 4x4": set_layer(
        "up2.up", lambda old: nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1)
    ),
    "norm after activation": norm_after_activation,
    "activation first": activation_first,
    "dropout at the end": append_dropout,
    "three convolutions": three_convolutions,
    "average pool": set_layer("down1.maxpool_conv.0", lambda old: nn.AvgPool2d(2)),
    "pool 3x3": set_layer("down1.maxpool_conv.0", lambda old: nn.MaxPool2d(3, 2, padding=1)),
    "padded pool": set_layer("down1.maxpool_conv.0", lambda old: nn.MaxPool2d(2, padding=1)),
    "dilated pool": set_layer("down1.maxpool_conv.0", lambda old: nn.MaxPool2d(2, dilation=2)),
    "pool by one": set_layer("down1.maxpool_conv.0", lambda old: nn.MaxPool2d(2, stride=1)),
    "ceiling pool": set_layer("down1.maxpool_conv.0", lambda old: nn.MaxPool2d(2, ceil_mode=True)),
    "nearest": set_layer("up2.up", lambda old: nn.Upsample(scale_factor=2)),
    "unaligned bilinear": set_layer(
        "up2.up", lambda old: nn.Upsample(scale_factor=2, mode="bilinear")
    ),
    "bicubic": set_layer("up2.up", lambda old: nn.Upsample(scale_factor=2, mode="bicubic")),
    "upsample x3": set_layer("up2.up", lambda old: nn.Upsample(scale_factor=3)),
    "upsample to a size": set_layer("up2.up", lambda old: nn.Upsample(size=(9, 9))),
    "UpsamplingNearest2d": set_layer("up2.up", lambda old: nn.UpsamplingNearest2d(scale_factor=2)),
    "conv head 3x3": set_layer("outc.conv", conv()),
    "no head": set_layer("outc", lambda old: nn.Identity()),
    "sigmoid head": set_layer("outc", lambda old: nn.Sequential(old, nn.Sigmoid())),
    "head without bias": set_attributes("outc.conv", bias=None),
    "weight norm": parametrize(f"{FIRST}.3"),
    "weight norm of the head": parametrize("outc.conv"),
    "weight norm by hook": old_weight_norm,
    "spectral norm": spectral_norm,
    "forward of a conv": own_forward(f"{SECOND}.0"),
    "forward of a norm": own_forward(f"{SECOND}.1"),
    "forward of a pool": own_forward("down1.maxpool_conv.0"),
    "forward of a sequence": own_forward("down1.maxpool_conv"),
    "forward of a block": own_forward("down1"),
    "forward of the first block": own_forward("inc"),
    "forward of an upsampling": own_forward("up1.up"),
    "forward of the head": own_forward("outc"),
    "forward of the head's conv": own_forward("outc.conv"),
    "forward of the model": own_forward(""),
}
BILINEAR_ONLY = {"nearest", "unaligned bilinear", "bicubic", "upsample x3", "upsample to a size"}
BILINEAR_ONLY |= {"UpsamplingNearest2d"}


@pytest.mark.parametrize("mode", sampled(["train", "eval"], ["train"]))
@pytest.mark.parametrize("edit", EDITS)
def test_replaced_layers(edit, mode):
    x = random(2, 3, 13, 18, dtype=torch.float64)
    steps = []
    for model in double_pair(bilinear=edit in BILINEAR_ONLY):
        torch.manual_seed(0)  # new layers draw their parameters
        EDITS[edit](model)
        steps.append(step(to_mode(model.double(), mode) if edit != "one norm frozen" else model, x))
    assert_same_step(steps[1], steps[0])


def test_replaced_blocks():
    """Blocks of other people, between ours."""
    x = random(2, 3, 13, 18, dtype=torch.float64)
    steps = []
    for model in double_pair():
        torch.manual_seed(0)
        model.inc = nn.Sequential(nn.Conv2d(3, 4, 5, padding=2), nn.ELU())
        model.down2.maxpool_conv[1] = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.SiLU())
        model.up2.conv = nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), nn.ReLU())
        steps.append(step(model.double(), x))
    assert_same_step(steps[1], steps[0])


def test_subclasses():
    """A user's own model with a block of its own."""

    def own(base):
        class Own(base):
            def forward(self, x):
                return super().forward(x) + 1

        class Net(UNet if base is UNet.DoubleConv else FastUNet):
            DoubleConv = Own

        return Net(3, 2, **SMALL).double()

    plain, fast = own(UNet.DoubleConv), own(FastUNet.DoubleConv)
    fast.load_state_dict(plain.state_dict())
    x = random(2, 3, 13, 18, dtype=torch.float64)
    assert_same_step(step(fast, x), step(plain, x))


def test_sync_batch_norm():
    """Converts, and in eval, where it needs no process group, computes the same."""
    x = random(2, 3, 13, 18, dtype=torch.float64)
    plain, fast = double_pair(mode="eval")
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(fast)
    assert any(isinstance(m, nn.SyncBatchNorm) for m in converted.modules())
    assert_same_step(step(converted, x), step(plain, x))


# Blocks by themselves


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_blocks_on_tensors(mode, format):
    def run(model):
        model = model.to(memory_format=format)
        x = random(2, 3, 13, 18, dtype=torch.float64).to(memory_format=format)
        first = model.inc(x)
        low = model.down1(first)
        return [first, low, model.up2(low, first), model.outc(first)]

    plain, fast = double_pair(mode=mode)
    for ours, theirs in zip(run(fast), run(plain), strict=True):
        assert isinstance(ours, Tensor)
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    for (name, p), q in zip(plain.named_buffers(), fast.buffers(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-12, msg=name)


SKIPS = [(12, 16), (13, 17), (15, 19), (12, 13), (11, 16), (9, 13), (7, 30)]


@pytest.mark.parametrize("lazy", [False, True], ids=["tensors", "activations"])
@pytest.mark.parametrize("concat_order", ["skip_first", "up_first"])
@pytest.mark.parametrize("bilinear", [False, True], ids=["transposed", "bilinear"])
@pytest.mark.parametrize("size", SKIPS, ids=str)
def test_up_pads_and_crops(size, bilinear, concat_order, lazy):
    """A map of 6x8, upsampled to 12x16, beside a skip that is larger or smaller."""
    plain, fast = double_pair(bilinear=bilinear, concat_order=concat_order)
    low_channels = 4 if bilinear else 8

    def run(up, lazy):
        skip = random(2, 4, *size, dtype=torch.float64).requires_grad_()
        low = random(2, low_channels, 6, 8, seed=2, dtype=torch.float64).requires_grad_()
        inputs = (Activation.of(t) if lazy else t for t in (low, skip))
        z = materialize(up(*inputs))
        z.backward(random(*z.shape, seed=3, dtype=torch.float64))
        return [z, low.grad, skip.grad, *(p.grad for p in up.parameters())]

    for ours, theirs in zip(run(fast.up2, lazy), run(plain.up2, False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def pending(seed, channels=4, size=(6, 8), slope=0.1):
    """An Activation with everything but resampling pending."""
    vectors = [random(1, channels, seed=seed + i, dtype=torch.float64) for i in range(3)]
    y = channels_last(random(2, channels, *size, seed=seed, dtype=torch.float64))
    x = Activation.of(y)
    return x._replace(center=vectors[0], scale=vectors[1], shift=vectors[2], slope=slope)


def test_blocks_on_activations():
    """What a block reads lazily it would also have read from the materialised tensor."""
    plain, fast = double_pair(mode="eval", bilinear=True)
    low = pending(1)
    skip = pending(5, size=(11, 18))
    cases = [
        (fast.down1, plain.down1, (skip,)),
        (fast.up2, plain.up2, (low, skip)),
        (fast.up2.conv, plain.up2.conv, (Concat(low, low._replace(slope=1.0)),)),
        (fast.outc, plain.outc, (skip,)),
    ]
    for ours, theirs, inputs in cases:
        expected = theirs(*map(materialize, inputs))
        torch.testing.assert_close(materialize(ours(*inputs)), expected, rtol=1e-9, atol=1e-9)
    # A tensor beside an Activation.
    actual = fast.up2(low, materialize(skip))
    expected = plain.up2(materialize(low), materialize(skip))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_one_resampling_at_a_time():
    """A second one must not silently take the place of the first."""
    fast = double_pair(mode="eval", bilinear=True)[1]
    for x in (pending(1).pool(), pending(1).upsample(NEAREST), pending(1).place((13, 15))):
        for run in (fast.down1, lambda x: fast.up2(x, pending(5, size=(11, 18)))):
            with pytest.raises(ValueError, match="pending already"):
                run(x)


def test_default_blocks():
    """Constructed by themselves, blocks have the plain blocks' signature and keys."""
    for ours, theirs in (
        (DoubleConv(3, 8, 6), UNet.DoubleConv(3, 8, 6)),
        (Down(4, 8), UNet.Down(4, 8)),
        (Up(8, 4), UNet.Up(8, 4)),
        (Up(8, 4, bilinear=False), UNet.Up(8, 4, bilinear=False)),
    ):
        assert list(ours.state_dict()) == list(theirs.state_dict())
