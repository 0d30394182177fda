"""The reference U-Net against itself written out by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastunet.reference import DoubleConv, Down, OutConv, UNet, Up

EXACT = {"rtol": 0, "atol": 0}
COURSE = {"bilinear": False, "norm": "none", "conv_bias": True, "concat_order": "up_first"}


def randomize(module, seed=0):
    """Random parameters and statistics, so that nothing is a neutral 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    for key, value in module.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 2, generator=generator)
        elif value.is_floating_point():
            value.normal_(0, 0.3, generator=generator)
    return module


def random(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def place(x, height, width):
    """Pads x with zeros (or crops it) to the size: floor(difference / 2) at the top and left."""
    top, left = (height - x.size(2)) // 2, (width - x.size(3)) // 2
    out = x.new_zeros(x.size(0), x.size(1), height, width)
    for i in range(height):
        for j in range(width):
            if 0 <= i - top < x.size(2) and 0 <= j - left < x.size(3):
                out[:, :, i, j] = x[:, :, i - top, j - left]
    return out


def forward_by_hand(state, x, *, depth, bilinear, norm, activation, concat_order, training=False):
    """The U-Net in functional PyTorch, from the keys of its state_dict."""

    def double_conv(x, name):
        index = 0
        for _ in range(2):
            key = f"{name}.double_conv.{index}"
            x = F.conv2d(x, state[f"{key}.weight"], state.get(f"{key}.bias"), padding=1)
            index += 1
            key = f"{name}.double_conv.{index}"
            if norm == "batch":
                mean, var = state[f"{key}.running_mean"], state[f"{key}.running_var"]
                affine = state[f"{key}.weight"], state[f"{key}.bias"]
                if training:
                    x = F.batch_norm(x, None, None, *affine, training=True)
                else:
                    x = F.batch_norm(x, mean, var, *affine)
            elif norm == "instance":
                weight, bias = state[f"{key}.weight"], state[f"{key}.bias"]
                x = F.instance_norm(x, weight=weight, bias=bias)
            elif norm == "group":
                groups = {4: 4, 8: 8, 12: 4, 16: 16, 24: 8, 48: 16}[x.size(1)]
                x = F.group_norm(x, groups, state[f"{key}.weight"], state[f"{key}.bias"])
            index += norm != "none"
            if activation == "relu":
                x = F.relu(x)
            elif activation == "leaky_relu":
                x = F.leaky_relu(x, 0.2)
            index += activation != "none"
        return x

    maps = [double_conv(x, "inc")]
    for level in range(1, depth + 1):
        maps.append(double_conv(F.max_pool2d(maps[-1], 2), f"down{level}.maxpool_conv.1"))
    x = maps.pop()
    for step in range(1, depth + 1):
        skip = maps.pop()
        if bilinear:
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        else:
            weight, bias = state[f"up{step}.up.weight"], state[f"up{step}.up.bias"]
            x = F.conv_transpose2d(x, weight, bias, stride=2)
        x = place(x, skip.size(2), skip.size(3))
        x = torch.cat([x, skip] if concat_order == "up_first" else [skip, x], dim=1)
        x = double_conv(x, f"up{step}.conv")
    return F.conv2d(x, state["outc.conv.weight"], state["outc.conv.bias"])


# The whole network


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bilinear": True},
        {"norm": "instance"},
        {"norm": "group", "activation": "leaky_relu"},
        {"norm": "none", "bilinear": True},
        {"activation": "none"},
        {"norm": "none", "activation": "none", "conv_bias": True},
        {"conv_bias": True, "concat_order": "up_first", "bilinear": True},
        {"depth": 1, "activation": "leaky_relu"},
        {"depth": 3, "bilinear": True},
        {"base_channels": 12, "norm": "group"},
        {"base_channels": 3, "bilinear": True},
        COURSE,
    ],
    ids=str,
)
def test_forward_by_hand(options, training):
    options = {"bilinear": False, "base_channels": 4, "depth": 2} | options
    model = randomize(UNet(3, 5, **options, negative_slope=0.2)).train(training)
    x = random(2, 3, 17, 22)
    described = {key: options[key] for key in ("depth", "bilinear")} | {
        "norm": options.get("norm", "batch"),
        "activation": options.get("activation", "relu"),
        "concat_order": options.get("concat_order", "skip_first"),
        "training": training,
    }
    expected = forward_by_hand(model.state_dict(), x, **described)
    assert expected.shape == (2, 5, 17, 22)
    torch.testing.assert_close(model(x), expected, **EXACT)


def test_concat_order_matters():
    skip_first = randomize(UNet(3, 2, base_channels=4, depth=2))
    up_first = UNet(3, 2, base_channels=4, depth=2, concat_order="up_first")
    up_first.load_state_dict(skip_first.state_dict())
    x = random(1, 3, 8, 8)
    assert not torch.allclose(skip_first.eval()(x), up_first.eval()(x))


@pytest.mark.parametrize("bilinear", [False, True])
@pytest.mark.parametrize("height", range(16, 33))
def test_logits_have_the_size_of_the_image(height, bilinear):
    model = UNet(1, 2, bilinear, base_channels=2).eval()
    with torch.no_grad():
        assert model(random(1, 1, height, 47 - height + 1)).shape == (1, 2, height, 48 - height)


# The course U-Net

COURSE_SHAPES = {
    "e1": (1, 32, 256, 256),
    "e2": (1, 64, 128, 128),
    "e3": (1, 128, 64, 64),
    "e4": (1, 256, 32, 32),
    "bottleneck": (1, 512, 16, 16),
    "up + concat e4": (1, 512, 32, 32),
    "logits": (1, 3, 256, 256),
}


def test_course_shapes():
    model = UNet(3, 3, **COURSE, base_channels=32).eval()
    shapes = {}

    def note(name, pick):
        return lambda module, inputs, output: shapes.__setitem__(name, tuple(pick(inputs, output)))

    for name, module in (
        ("e1", model.inc),
        ("e2", model.down1),
        ("e3", model.down2),
        ("e4", model.down3),
        ("bottleneck", model.down4),
        ("logits", model.outc),
    ):
        module.register_forward_hook(note(name, lambda inputs, output: output.shape))
    concat = note("up + concat e4", lambda inputs, output: inputs[0].shape)
    model.up1.conv.register_forward_hook(concat)
    with torch.no_grad():
        logits = model(random(1, 3, 256, 256))
    assert shapes == COURSE_SHAPES
    assert logits.shape == COURSE_SHAPES["logits"]
    assert logits.argmax(dim=1).shape == (1, 256, 256)


def test_course_keys():
    model = UNet(3, 3, **COURSE, base_channels=32)
    blocks = ["inc", *(f"down{k}.maxpool_conv.1" for k in (1, 2, 3, 4))]
    blocks += [f"up{k}.conv" for k in (1, 2, 3, 4)]
    expected = {
        f"{block}.double_conv.{i}.{name}"
        for block in blocks
        for i in (0, 2)
        for name in ("weight", "bias")
    }
    expected |= {f"up{k}.up.{name}" for k in (1, 2, 3, 4) for name in ("weight", "bias")}
    expected |= {"outc.conv.weight", "outc.conv.bias"}
    assert set(model.state_dict()) == expected
    convs = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    assert len(convs) == 18 + 4 + 1
    assert all(conv.bias is not None for conv in convs)


def test_course_double_conv():
    block = randomize(DoubleConv(3, 6, norm="none", conv_bias=True))
    kinds = [type(layer) for layer in block.double_conv]
    assert kinds == [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU]
    first, second = block.double_conv[0], block.double_conv[2]
    x = random(2, 3, 7, 5)
    y = torch.relu(F.conv2d(x, first.weight, first.bias, stride=1, padding=1))
    y = torch.relu(F.conv2d(y, second.weight, second.bias, stride=1, padding=1))
    torch.testing.assert_close(block(x), y, **EXACT)


def test_course_up_puts_the_upsampled_map_first():
    up = randomize(Up(8, 4, bilinear=False, norm="none", conv_bias=True, concat_order="up_first"))
    x, skip = random(1, 8, 3, 4), random(1, 4, 6, 8, seed=2)
    raised = F.conv_transpose2d(x, up.up.weight, up.up.bias, stride=2)  # [1, 4, 6, 8]
    first, second = up.conv.double_conv[0], up.conv.double_conv[2]
    y = torch.relu(F.conv2d(torch.cat([raised, skip], 1), first.weight, first.bias, padding=1))
    y = torch.relu(F.conv2d(y, second.weight, second.bias, padding=1))
    torch.testing.assert_close(up(x, skip), y, **EXACT)


# The FCN-era blocks


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_fcn_double_conv(training):
    block = randomize(DoubleConv(3, 6, conv_bias=True)).train(training)
    kinds = [type(layer) for layer in block.double_conv]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 2
    assert block.double_conv[0].out_channels == block.double_conv[3].out_channels == 6
    assert sum(p.numel() for p in block.parameters()) == 6 * 27 + 6 + 12 + 6 * 54 + 6 + 12
    x = y = random(2, 3, 7, 5)
    before = copy.deepcopy(block)
    for index in (0, 3):
        conv, norm = before.double_conv[index], before.double_conv[index + 1]
        y = F.conv2d(y, conv.weight, conv.bias, padding=1)
        y = F.batch_norm(
            y, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=training
        )
        y = torch.relu(y)
    torch.testing.assert_close(block(x), y, **EXACT)
    for key, buffer in dict(before.named_buffers()).items():
        if not key.endswith("num_batches_tracked"):
            torch.testing.assert_close(dict(block.named_buffers())[key], buffer, **EXACT)


def fcn_up():
    return randomize(Up(8, 3, bilinear=True, mid_channels=3, conv_bias=True)).eval()


@settings(max_examples=80, deadline=None)
@given(
    low=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    size=st.tuples(st.integers(1, 13), st.integers(1, 13)),
)
def test_fcn_up(low, size):
    """Any size: also a skip that is much larger or smaller than the upsampled map."""
    up = fcn_up()
    x, skip = random(2, 5, *low), random(2, 3, *size, seed=2)
    y = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
    y = torch.cat([skip, place(y, *size)], dim=1)
    for index in (0, 3):
        conv, norm = up.conv.double_conv[index], up.conv.double_conv[index + 1]
        assert conv.out_channels == 3
        y = F.conv2d(y, conv.weight, conv.bias, padding=1)
        y = torch.relu(F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias))
    torch.testing.assert_close(up(x, skip), y, **EXACT)


@pytest.mark.parametrize(("skip", "expected"), [(7, [0, 1, 2, 3, 4, 0, 0]), (3, [2, 3, 4])])
def test_place_puts_the_odd_row_last(skip, expected):
    """The helper itself: of 3 rows to add 1 is above and 2 below; of 1 to crop it is the first."""
    rows = torch.tensor([1.0, 2, 3, 4]).view(1, 1, 4, 1)
    assert place(rows, skip, 1).flatten().tolist() == expected


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 2), (5, 7)])
def test_bilinear_upsampling_aligns_the_corners(size):
    """x[i (n - 1) / (2 n - 1)], interpolated linearly, in each direction."""

    def matrix(n):
        rows = torch.zeros(2 * n, n, dtype=torch.float64)
        for i in range(2 * n):
            position = i * (n - 1) / (2 * n - 1)
            low = min(int(position), n - 1)
            rows[i, low] += 1 - (position - low)
            rows[i, min(low + 1, n - 1)] += position - low
        return rows

    up = fcn_up().up
    x = random(2, 3, *size, dtype=torch.float64)
    expected = matrix(size[0]) @ x @ matrix(size[1]).T
    torch.testing.assert_close(up(x), expected, rtol=1e-12, atol=1e-12)
    assert not list(up.parameters())


@pytest.mark.parametrize("size", [(2, 2), (5, 4), (9, 7)])
def test_transposed_upsampling(size):
    """Each pixel becomes a 2x2 block: the kernel weighted by it, plus the bias."""
    up = randomize(Up(6, 3, bilinear=False)).up
    x = random(2, 6, *size)
    blocks = torch.einsum("ncij,coab->noiajb", x, up.weight) + up.bias.view(1, -1, 1, 1, 1, 1)
    expected = blocks.reshape(2, 3, 2 * size[0], 2 * size[1])
    torch.testing.assert_close(up(x), expected, rtol=1e-5, atol=1e-5)


def test_down_and_out_conv():
    down = randomize(Down(3, 4)).eval()
    x = random(2, 3, 7, 6)
    pooled = x[:, :, :6].unfold(2, 2, 2).unfold(3, 2, 2).amax(dim=(-1, -2))
    assert pooled.shape == (2, 3, 3, 3)
    torch.testing.assert_close(down(x), down.maxpool_conv[1](pooled), **EXACT)
    out = randomize(OutConv(3, 2))
    expected = torch.einsum("oc,ncij->noij", out.conv.weight[:, :, 0, 0], x)
    expected = expected + out.conv.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(out(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("up", "mid"),
    [
        (lambda: Up(8, 3, bilinear=True), 4),
        (lambda: Up(8, 3, bilinear=False), 3),
        (lambda: Up(8, 3, bilinear=True, mid_channels=5), 5),
        (lambda: Up(8, 3, bilinear=False, mid_channels=5), 5),
    ],
)
def test_mid_channels(up, mid):
    first, second = up().conv.double_conv[0], up().conv.double_conv[3]
    assert (first.in_channels, first.out_channels) == (8, mid)
    assert (second.in_channels, second.out_channels) == (mid, 3)


# Keys

PLANS = {
    False: {
        "inc": (3, 64, 64),
        "down1.maxpool_conv.1": (64, 128, 128),
        "down2.maxpool_conv.1": (128, 256, 256),
        "down3.maxpool_conv.1": (256, 512, 512),
        "down4.maxpool_conv.1": (512, 1024, 1024),
        "up1.conv": (1024, 512, 512),
        "up2.conv": (512, 256, 256),
        "up3.conv": (256, 128, 128),
        "up4.conv": (128, 64, 64),
    },
    True: {
        "inc": (3, 64, 64),
        "down1.maxpool_conv.1": (64, 128, 128),
        "down2.maxpool_conv.1": (128, 256, 256),
        "down3.maxpool_conv.1": (256, 512, 512),
        "down4.maxpool_conv.1": (512, 512, 512),
        "up1.conv": (1024, 512, 256),
        "up2.conv": (512, 256, 128),
        "up3.conv": (256, 128, 64),
        "up4.conv": (128, 64, 64),
    },
}


@pytest.mark.parametrize(
    ("bilinear", "keys", "parameters"), [(False, 118, 31_037_698), (True, 110, 17_263_042)]
)
def test_default_keys(bilinear, keys, parameters):
    with torch.device("meta"):
        model = UNet(3, 2, bilinear=bilinear)
    expected = {}
    for block, (cin, mid, cout) in PLANS[bilinear].items():
        for conv, norm, i, o in ((0, 1, cin, mid), (3, 4, mid, cout)):
            expected[f"{block}.double_conv.{conv}.weight"] = (o, i, 3, 3)
            for name in ("weight", "bias", "running_mean", "running_var"):
                expected[f"{block}.double_conv.{norm}.{name}"] = (o,)
            expected[f"{block}.double_conv.{norm}.num_batches_tracked"] = ()
    if not bilinear:
        for step, channels in enumerate((1024, 512, 256, 128), start=1):
            expected[f"up{step}.up.weight"] = (channels, channels // 2, 2, 2)
            expected[f"up{step}.up.bias"] = (channels // 2,)
    expected["outc.conv.weight"], expected["outc.conv.bias"] = (2, 64, 1, 1), (2,)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected
    assert len(expected) == keys
    assert sum(p.numel() for p in model.parameters()) == parameters
    order = list(dict.fromkeys(key.split(".")[0] for key in model.state_dict()))
    assert order == ["inc", "down1", "down2", "down3", "down4", "up1", "up2", "up3", "up4", "outc"]


def test_attributes_of_the_anchor():
    with torch.device("meta"):
        model = UNet(1, 4)
    assert (model.n_channels, model.n_classes, model.bilinear) == (1, 4, False)
    assert [type(m) for m in model.children()] == [DoubleConv, *[Down] * 4, *[Up] * 4, OutConv]


def test_norm_modules():
    for norm, channels, groups in (("group", 48, 16), ("group", 64, 32), ("group", 6, 2)):
        layer = DoubleConv(3, channels, norm=norm).double_conv[1]
        assert isinstance(layer, nn.GroupNorm)
        assert layer.num_groups == groups
    layer = DoubleConv(3, 4, norm="instance").double_conv[1]
    assert isinstance(layer, nn.InstanceNorm2d)
    assert layer.affine
    assert not layer.track_running_stats
    layer = DoubleConv(3, 4, activation="leaky_relu", negative_slope=0.3).double_conv[2]
    assert layer.negative_slope == 0.3


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "layer"}, "norm must be one of batch, instance, group, none, got 'layer'"),
        ({"norm": None}, "norm must be one of batch, instance, group, none, got None"),
        ({"activation": "gelu"}, "activation must be one of relu, leaky_relu, none, got 'gelu'"),
        ({"concat_order": "x"}, "concat_order must be one of skip_first, up_first, got 'x'"),
        ({"checkpointing": "some"}, "checkpointing must be one of none, full, got 'some'"),
        ({"n_channels": 0}, "n_channels must be a positive integer, got 0"),
        ({"n_classes": -1}, "n_classes must be a positive integer, got -1"),
        ({"base_channels": 2.5}, "base_channels must be a positive integer, got 2.5"),
        ({"depth": 0}, "depth must be a positive integer, got 0"),
        ({"depth": "4"}, "depth must be a positive integer, got '4'"),
    ],
)
def test_option_errors(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        UNet(**{"n_channels": 3, "n_classes": 2, "base_channels": 2} | options)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 16, 16), r"the input must be a \[N, C, H, W\] tensor, got \[3, 16, 16\]"),
        (torch.zeros(1, 3, 1, 8, 8), r"the input must be a \[N, C, H, W\] tensor, got \[1, 3, 1"),
        ([[1.0]], r"the input must be a \[N, C, H, W\] tensor, got list"),
        (torch.zeros(1, 4, 16, 16), "the input must have n_channels = 3 channels, got 4"),
        (torch.zeros(1, 3, 3, 16), r"height and width must be at least 2\*\*depth = 4, got 3x16"),
        (torch.zeros(1, 3, 16, 3), r"height and width must be at least 2\*\*depth = 4, got 16x3"),
    ],
)
def test_input_errors(x, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        UNet(3, 2, base_channels=2, depth=2)(x)


# Checkpointing


def step(model, x, target):
    """One training step: the loss, and the gradients by name."""
    model.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(x), target)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def batch(size=(13, 18)):
    target = torch.randint(2, (2, *size), generator=torch.Generator().manual_seed(3))
    return random(2, 3, *size), target


def pair(**options):
    plain = randomize(UNet(3, 2, **{"base_channels": 4, "depth": 2} | options)).train()
    return plain, copy.deepcopy(plain)


def assert_same_step(plain, other, x, target):
    for expected, got in zip(step(plain, x, target), step(other, x, target), strict=True):
        torch.testing.assert_close(got, expected, **EXACT)
    assert_same_state(plain, other)


def assert_same_state(plain, other):
    assert list(plain.state_dict()) == list(other.state_dict())
    torch.testing.assert_close(other.state_dict(), plain.state_dict(), **EXACT)


def count_calls(module):
    calls = []
    # Before the call: a recomputation stops as soon as it has what backward asked for.
    module.register_forward_pre_hook(lambda *args: calls.append(1))
    return calls


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bilinear": True},
        {"norm": "instance"},
        {"norm": "group"},
        {"norm": "none", "conv_bias": True, "concat_order": "up_first"},
        {"activation": "leaky_relu", "conv_bias": True},
        {"depth": 3, "bilinear": True},
    ],
    ids=str,
)
def test_checkpointing_changes_nothing(options):
    """Loss, gradients, running statistics and keys, bit for bit, over several steps."""
    plain, checkpointed = pair(**options)
    checkpointed.use_checkpointing()
    calls = count_calls(checkpointed.inc), count_calls(plain.inc)
    x, target = batch()
    for number in (1, 2, 3):
        assert_same_step(plain, checkpointed, x, target)
        assert tuple(map(len, calls)) == (2 * number, number)  # it did recompute
        for key, buffer in checkpointed.named_buffers():
            if key.endswith("num_batches_tracked"):
                assert buffer == number


def test_checkpointing_by_constructor():
    plain, _ = pair()
    model = UNet(3, 2, base_channels=4, depth=2, checkpointing="full").train()
    model.load_state_dict(plain.state_dict(), strict=True)
    calls = count_calls(model.down1)
    assert_same_step(plain, model, *batch())
    assert len(calls) == 2


def test_checkpointing_with_cumulative_average():
    """momentum=None averages by num_batches_tracked, so a second update would show in both."""
    plain, checkpointed = pair()
    checkpointed.use_checkpointing()
    for model in (plain, checkpointed):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
    for _ in range(3):
        assert_same_step(plain, checkpointed, *batch())


def test_checkpointing_with_frozen_norms():
    """Norms in evaluation inside a training model use and keep their running statistics."""
    plain, checkpointed = pair()
    checkpointed.use_checkpointing()
    for model in (plain, checkpointed):
        for block in (model.inc, model.up2):
            block.eval()
    before = {key: value.clone() for key, value in checkpointed.inc.named_buffers()}
    assert_same_step(plain, checkpointed, *batch())
    torch.testing.assert_close(dict(checkpointed.inc.named_buffers()), before, **EXACT)
    norms = [m for m in checkpointed.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.track_running_stats for norm in norms)


def test_checkpointing_through_a_retained_graph():
    """Backward twice recomputes twice."""
    plain, checkpointed = pair()
    checkpointed.use_checkpointing()
    x, target = batch()
    for model in (plain, checkpointed):
        loss = F.cross_entropy(model(x), target)
        loss.backward(retain_graph=True)
        loss.backward()
    grads = [{name: p.grad for name, p in m.named_parameters()} for m in (plain, checkpointed)]
    torch.testing.assert_close(grads[1], grads[0], **EXACT)
    assert_same_state(plain, checkpointed)


def test_checkpointing_needs_gradients():
    plain, checkpointed = pair()
    checkpointed.use_checkpointing()
    calls = count_calls(checkpointed.inc)
    x, _ = batch()
    for training in (True, False):
        with torch.no_grad():
            expected = plain.train(training)(x)
            torch.testing.assert_close(checkpointed.train(training)(x), expected, **EXACT)
    assert len(calls) == 2
    assert_same_state(plain, checkpointed)


def test_checkpointing_after_out_of_memory():
    """A training script's fallback: catch the error, turn checkpointing on, try again."""
    x, target = batch()
    results = []
    for fallback in (None, "full"):
        model, _ = pair()
        keys = list(model.state_dict())
        step(model, x, target)

        def fail(module, inputs):
            raise torch.OutOfMemoryError("out of memory")

        handle = model.up2.register_forward_pre_hook(fail)
        with pytest.raises(torch.OutOfMemoryError):
            step(model, x, target)
        handle.remove()
        model.use_checkpointing(fallback)
        calls = count_calls(model.inc)
        losses = [step(model, x, target) for _ in range(2)]
        assert len(calls) == (4 if fallback else 2)
        assert list(model.state_dict()) == keys
        results.append((losses, model.state_dict()))
    torch.testing.assert_close(results[1], results[0], **EXACT)


def test_checkpointing_off_again():
    plain, model = pair()
    calls = count_calls(model.inc)
    expected = 0
    for policy, times in (("full", 2), (None, 1), ("full", 2), ("none", 1)):
        model.use_checkpointing(policy)
        assert_same_step(plain, model, *batch())
        expected += times
        assert len(calls) == expected
    assert model.checkpointing == "none"
    model.use_checkpointing()
    assert model.checkpointing == "full"


def test_checkpointing_errors():
    model = UNet(3, 2, base_channels=2, depth=2, checkpointing="full")
    with pytest.raises(ValueError, match=r"^checkpointing must be one of none, full, got 'half'"):
        model.use_checkpointing("half")
    assert model.checkpointing == "full"


def test_checkpointing_keeps_less():
    """Bytes that autograd saves outside the recomputed blocks."""

    def saved(model):
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(batch()[0])
        return total

    plain, checkpointed = pair()
    checkpointed.use_checkpointing()
    assert saved(checkpointed) < saved(plain) / 4
