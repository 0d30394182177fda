"""Checkpoints as they are found in the wild, into the U-Net."""

import contextlib
import io
import os
import pathlib
import pickle
import random
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastunet.reference import UNet
from fastunet.weights import load_weights

EXACT = {"rtol": 0, "atol": 0}
ROUNDING = {"rtol": 1e-10, "atol": 1e-10}  # float64: about 1e-16 in each of some 1e3 operations


def make(*args, seed=0, base_channels=4, depth=2, **options):
    """A U-Net in which every parameter and buffer is random, as after training."""
    args = args or (3, 2)
    model = UNet(*args, base_channels=base_channels, depth=depth, **options).eval()
    generator = torch.Generator().manual_seed(seed)
    for key, value in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            value.fill_(7 + seed)
        elif key.endswith("running_var"):
            value.uniform_(0.5, 2, generator=generator)
        else:
            value.normal_(0, 0.3, generator=generator)
    return model


def image(n=2, size=(9, 14), channels=3, dtype=torch.float32):
    return torch.randn(n, channels, *size, generator=torch.Generator().manual_seed(1)).to(dtype)


def assert_same(model, other):
    """The same weights, and the same logits in evaluation."""
    theirs = other.state_dict()
    assert list(model.state_dict()) == list(theirs)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, theirs[key], **EXACT, msg=key)
    x = image(channels=model.n_channels)
    torch.testing.assert_close(model(x), other(x), **EXACT)


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def without(state, suffix):
    return {key: value for key, value in state.items() if not key.endswith(suffix)}


@contextlib.contextmanager
def refused(model, match, error=ValueError):
    """Raises one sentence that matches, and leaves the model as it was."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error, match=match) as caught:
        yield
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], **EXACT, msg=key)


# Sources


@pytest.mark.parametrize("options", [{}, {"bilinear": True}, {"norm": "instance"}], ids=str)
@pytest.mark.parametrize("kind", ["mapping", "zip", "legacy", "safetensors"])
@pytest.mark.parametrize("as_path", [str, pathlib.Path])
def test_sources(tmp_path, kind, as_path, options):
    trained, model = make(**options), make(**options, seed=1)
    path = tmp_path / ("unet.safetensors" if kind == "safetensors" else "unet.pth")
    if kind == "mapping":
        source = trained.state_dict()
    elif kind == "safetensors":
        save_file(trained.state_dict(), path)
        source = as_path(path)
    else:
        torch.save(trained.state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
        source = as_path(path)
    assert load_weights(model, source) == {}
    assert_same(model, trained)


def test_safetensors_under_another_name_and_metadata(tmp_path):
    trained, model = make(), make(seed=1)
    path = tmp_path / "weights.bin"
    save_file(trained.state_dict(), path, metadata={"mask_values": "[0, 1]"})
    assert load_weights(model, path) == {"mask_values": "[0, 1]"}
    assert_same(model, trained)


def test_default_depth_and_milesial_checkpoint(tmp_path):
    """What its train script saves: the state_dict with ``mask_values`` in it."""
    trained = make(3, 2, base_channels=2, depth=4)
    state = trained.state_dict()
    state["mask_values"] = [0, 1]
    torch.save(state, tmp_path / "checkpoint_epoch5.pth")
    model = make(3, 2, base_channels=2, depth=4, seed=1)
    assert load_weights(model, tmp_path / "checkpoint_epoch5.pth") == {"mask_values": [0, 1]}
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, trained.state_dict()[key], **EXACT)


def test_source_mapping_is_not_changed():
    trained = make(conv_bias=True)
    checkpoint = prefixed("module.", trained.state_dict()) | {"mask_values": [0, 1]}
    before = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in checkpoint.items()}
    load_weights(make(seed=1), checkpoint)
    assert list(checkpoint) == list(before)
    assert checkpoint["mask_values"] == [0, 1]
    for key, value in before.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(checkpoint[key], value, **EXACT)


def test_own_state_dict():
    model, twin = make(), make()
    assert load_weights(model, model.state_dict()) == {}
    assert_same(model, twin)


# Nesting, prefixes and extras


@pytest.mark.parametrize("entry", ["state_dict", "model_state_dict", "model", "net", "model_state"])
def test_nested(tmp_path, entry):
    trained, model = make(), make(seed=1)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1).state_dict()
    checkpoint = {
        "epoch": 3,
        "loss": torch.tensor(0.5),
        entry: trained.state_dict() | {"mask_values": [0, 255]},
        "optimizer": optimizer,
    }
    torch.save(checkpoint, tmp_path / "last.pt")
    extras = load_weights(model, tmp_path / "last.pt")
    assert extras == {"epoch": 3, "loss": 0.5, "optimizer": optimizer, "mask_values": [0, 255]}
    assert_same(model, trained)


def test_nested_twice():
    trained, model = make(), make(seed=1)
    checkpoint = {"state_dict": {"model": trained.state_dict(), "ema": 0.9}, "epoch": 3}
    assert load_weights(model, checkpoint) == {"ema": 0.9, "epoch": 3}
    assert_same(model, trained)


def test_mapping_named_model_that_holds_no_weights_is_an_extra():
    trained, model = make(), make(seed=1)
    config = {"name": "unet", "base_channels": 4}
    assert load_weights(model, trained.state_dict() | {"model": config}) == {"model": config}
    assert_same(model, trained)
    extras = load_weights(model, {"model": config, "state_dict": trained.state_dict()})
    assert extras == {"model": config}


def test_lightning():
    trained, model = make(), make(seed=1)
    checkpoint = {
        "epoch": 1,
        "pytorch-lightning_version": "2.5",
        "state_dict": prefixed("model.", trained.state_dict()),
        "hyper_parameters": {"lr": 0.1},
    }
    extras = load_weights(model, checkpoint)
    assert set(extras) == {"epoch", "pytorch-lightning_version", "hyper_parameters"}
    assert_same(model, trained)


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "model.",
        "net.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "model._orig_mod.",
        "net.module.",
        "module.module.",
        "unet.",
    ],
)
def test_prefixes(prefix):
    trained, model = make(), make(seed=1)
    assert load_weights(model, prefixed(prefix, trained.state_dict()) | {"mask_values": [0]}) == {
        "mask_values": [0]
    }
    assert_same(model, trained)


def test_prefix_with_old_biases():
    trained = make(conv_bias=True)
    plain, nested = make(seed=1), make(seed=2)
    load_weights(plain, trained.state_dict())
    load_weights(nested, {"net": prefixed("module.", trained.state_dict())})
    assert_same(nested, plain)


def test_prefix_only_where_every_key_has_it():
    state = prefixed("model.", make().state_dict())
    model = make(seed=1)
    with refused(model, r"U-Net under 'model\.' and beside it criterion\.weight: pass a mapping"):
        load_weights(model, state | {"criterion.weight": torch.ones(2)})
    state["outc.conv.bias"] = state.pop("model.outc.conv.bias")
    with refused(model, r"under 'model\.' and beside it outc\.conv\.bias"):
        load_weights(model, state)


def test_two_networks_in_one_state_dict():
    state = prefixed("model.", make().state_dict()) | prefixed("ema_model.", make().state_dict())
    model = make(seed=1)
    with refused(model, r"under 'model\.' and beside it ema_model\.inc.*, and \d+ more"):
        load_weights(model, state)


def test_prefix_is_whole_names():
    """``xinc.double_conv`` is no ``inc.double_conv`` with a prefix."""
    model = make(seed=1)
    with refused(model, "not of a U-Net"):
        load_weights(model, prefixed("x", make().state_dict()))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrapped_model(wrap):
    trained, inner = make(), make(seed=1)
    load_weights(wrap(inner), prefixed("module.", trained.state_dict()))
    assert_same(inner, trained)
    load_weights(wrap(inner), make(seed=2).state_dict())
    assert_same(inner, make(seed=2))


# Convolution biases


@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("bilinear", [False, True])
def test_old_biases_fold_into_the_running_means(bilinear, activation):
    options = {"bilinear": bilinear, "activation": activation}
    old = make(conv_bias=True, **options).double()
    model = make(**options, seed=1).double()
    load_weights(model, old.state_dict())
    x = image(dtype=torch.float64)
    torch.testing.assert_close(model(x), old(x), **ROUNDING)
    # Training does not see the bias, and evaluation still agrees after updates by training.
    for _ in range(3):
        torch.testing.assert_close(model.train()(x), old.train()(x), **ROUNDING)
    torch.testing.assert_close(model.eval()(x), old.eval()(x), **ROUNDING)
    for key, value in without(model.state_dict(), "running_mean").items():
        torch.testing.assert_close(value, old.state_dict()[key], **ROUNDING, msg=key)


def test_old_biases_fold_exactly():
    """running_mean - bias, rounded once to the model's dtype."""
    old, model = make(conv_bias=True), make(seed=1)
    load_weights(model, old.state_dict())
    for index in (0, 3):
        conv, norm = old.down2.maxpool_conv[1].double_conv[index : index + 2]
        folded = model.down2.maxpool_conv[1].double_conv[index + 1].running_mean
        torch.testing.assert_close(folded, norm.running_mean - conv.bias.detach(), **EXACT)
    half = {key: value.half() for key, value in old.state_dict().items()}
    load_weights(model, half)
    conv, norm = old.inc.double_conv[:2]
    mean, bias = norm.running_mean.half().float(), conv.bias.detach().half().float()
    torch.testing.assert_close(model.inc.double_conv[1].running_mean, mean - bias, **EXACT)


def test_old_biases_before_instance_norm_cancel():
    old = make(conv_bias=True, norm="instance").double()
    model = make(norm="instance", seed=1).double()
    load_weights(model, old.state_dict())
    x = image(dtype=torch.float64)
    torch.testing.assert_close(model(x), old(x), **ROUNDING)


@pytest.mark.parametrize("norm", ["group", "none"])
def test_old_biases_that_cannot_be_folded(norm):
    old, model = make(conv_bias=True, norm=norm), make(norm=norm, seed=1)
    with refused(model, r"convolution biases \(.*double_conv\.0\.bias\).*conv_bias=True$"):
        load_weights(model, old.state_dict())


def test_old_biases_of_another_shape():
    state = make(conv_bias=True).state_dict()
    state["inc.double_conv.0.bias"] = torch.ones(1)
    model = make(seed=1)
    with refused(model, r"inc\.double_conv\.0\.bias \[1\]"):
        load_weights(model, state)


@pytest.mark.parametrize("norm", ["batch", "instance", "group", "none"])
def test_biases_that_the_checkpoint_lacks_are_zero(norm):
    old, model = make(norm=norm), make(norm=norm, conv_bias=True, seed=1)
    load_weights(model, old.state_dict())
    biases = [m.bias for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0] == 3]
    assert len(biases) == 10
    assert all(torch.count_nonzero(bias) == 0 for bias in biases)
    x = image()
    torch.testing.assert_close(model(x), old(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", ["batch", "instance", "group", "none"])
def test_biases_of_both(norm):
    trained, model = make(norm=norm, conv_bias=True), make(norm=norm, conv_bias=True, seed=1)
    load_weights(model, trained.state_dict())
    assert_same(model, trained)


def test_some_biases_are_missing_weights():
    state = without(make(conv_bias=True).state_dict(), "down1.maxpool_conv.1.double_conv.3.bias")
    model = make(conv_bias=True, seed=1)
    with refused(model, r"it lacks down1\.maxpool_conv\.1\.double_conv\.3\.bias"):
        load_weights(model, state)


# Old and half checkpoints


def test_missing_num_batches_tracked_is_zero():
    trained, model = make(), make(seed=1)
    load_weights(model, without(trained.state_dict(), "num_batches_tracked"))
    for key, value in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            assert value == 0
            assert value.dtype == torch.int64
        else:
            torch.testing.assert_close(value, trained.state_dict()[key], **EXACT)


@pytest.mark.parametrize("theirs", [torch.float16, torch.bfloat16, torch.float64, torch.float32])
@pytest.mark.parametrize("ours", [torch.float32, torch.bfloat16])
def test_dtypes(theirs, ours):
    trained, model = make().to(theirs), make(seed=1).to(ours)
    parameters = dict(model.named_parameters())
    load_weights(model, trained.state_dict())
    for key, value in model.state_dict().items():
        tensor = trained.state_dict()[key]
        assert value.dtype == (ours if tensor.is_floating_point() else torch.int64)
        torch.testing.assert_close(value, tensor.to(value.dtype), **EXACT)
    assert all(parameters[name] is p for name, p in model.named_parameters())  # in place


def test_layout_and_gradient_flags_of_the_model_stay():
    trained, model = make(), make(seed=1).to(memory_format=torch.channels_last)
    model.inc.requires_grad_(False)
    load_weights(model, trained.state_dict())
    assert (
        model.down1.maxpool_conv[1]
        .double_conv[0]
        .weight.is_contiguous(memory_format=torch.channels_last)
    )
    assert not model.inc.double_conv[0].weight.requires_grad
    assert model.outc.conv.weight.requires_grad


# Mismatches


@pytest.mark.parametrize(
    ("theirs", "ours", "needed", "have"),
    [
        ({"bilinear": True}, {}, "bilinear=True", "bilinear=False"),
        ({}, {"bilinear": True}, "bilinear=False", "bilinear=True"),
        ({"depth": 3}, {}, "depth=3", "depth=2"),
        ({"depth": 1}, {}, "depth=1", "depth=2"),
        ({"base_channels": 8}, {}, "base_channels=8", "base_channels=4"),
        ({"norm": "instance"}, {}, "norm='instance' or 'group'", "norm='batch'"),
        ({"norm": "group"}, {}, "norm='instance' or 'group'", "norm='batch'"),
        ({"norm": "none"}, {}, "norm='none'", "norm='batch'"),
        ({}, {"norm": "none"}, "norm='batch'", "norm='none'"),
        ({}, {"norm": "group"}, "norm='batch'", "norm='instance' or 'group'"),
        ({"norm": "none"}, {"norm": "instance"}, "norm='none'", "norm='instance' or 'group'"),
        (
            {"norm": "none", "activation": "none", "conv_bias": True},
            {"activation": "none"},
            "norm='none'",
            "norm='batch'",
        ),
        (
            {"bilinear": True, "depth": 3, "norm": "none"},
            {},
            "bilinear=True, depth=3, norm='none'",
            "bilinear=False, depth=2, norm='batch'",
        ),
    ],
    ids=str,
)
def test_options_that_differ(theirs, ours, needed, have):
    model = make(**ours, seed=1)
    sentence = f"the checkpoint is of a model with {needed} and this one has {have}: "
    with refused(model, f"^{sentence}construct the model with {needed}$"):
        load_weights(model, make(**theirs).state_dict())


@pytest.mark.parametrize(
    ("theirs", "needed", "have"),
    [
        ((1, 2), "n_channels=1", "n_channels=3"),
        ((3, 5), "n_classes=5", "n_classes=2"),
        ((4, 1), "n_channels=4, n_classes=1", "n_channels=3, n_classes=2"),
    ],
)
def test_channels_that_differ(tmp_path, theirs, needed, have):
    model = make(3, 2, seed=1)
    torch.save(make(*theirs).state_dict(), tmp_path / "unet.pth")
    with refused(model, f"unet.pth' is of a model with {needed} and this one has {have}: "):
        load_weights(model, tmp_path / "unet.pth")


def test_checkpoints_of_what_was_asked_for_then_load():
    """The message is right: the model that it asks for takes the checkpoint."""
    trained = make(1, 3, bilinear=True, depth=3, norm="none", conv_bias=True)
    model = make(1, 3, bilinear=True, depth=3, norm="none", conv_bias=True, seed=1)
    load_weights(model, trained.state_dict())
    assert_same(model, trained)


def test_missing_unexpected_and_misshaped():
    state = make().state_dict()
    model = make(seed=1)
    with refused(model, r"does not fit the model: it lacks outc\.conv\.bias$"):
        load_weights(model, without(state, "outc.conv.bias"))
    with refused(model, r"does not fit the model: the model lacks attention\.weight$"):
        load_weights(model, state | {"attention.weight": torch.ones(3)})
    with refused(model, r"model: outc\.conv\.bias is \[3\] instead of \[2\]$"):
        load_weights(model, state | {"outc.conv.bias": torch.ones(3)})
    with refused(model, r"it lacks .*, .*, .*, and \d+ more; the model lacks x$"):
        load_weights(model, without(state, "weight") | {"x": torch.ones(1)} | first(state))


def first(state):
    """What the options are read from, to get past them."""
    keys = [key for key in state if "inc." in key or "up.weight" in key or "outc" in key]
    return {key: state[key] for key in keys}


def test_activation_none():
    """The second convolution then has another number: the keys that differ are named."""
    model = make(seed=1)
    with refused(model, r"it lacks .*double_conv.*; the model lacks .*double_conv"):
        load_weights(model, make(activation="none").state_dict())


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (torch.ones(2, dtype=torch.int8), r"outc\.conv\.bias is torch\.int8 on cpu"),
        (torch.ones(2, dtype=torch.complex64), r"outc\.conv\.bias is torch\.complex64"),
        (torch.empty(2, device="meta"), r"outc\.conv\.bias is torch\.float32 on meta"),
    ],
)
def test_tensors_that_are_no_weights(value, match):
    model = make(seed=1)
    with refused(model, match):
        load_weights(model, make().state_dict() | {"outc.conv.bias": value})


def test_model_without_storage():
    with torch.device("meta"):
        model = UNet(3, 2, base_channels=4, depth=2)
    with pytest.raises(ValueError, match="of the model is on the meta device"):
        load_weights(model, make().state_dict())


def test_other_networks():
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model = make(seed=1)
    with refused(model, r"not of a U-Net: no inc\.double_conv\.0\.weight among 0\.weight, 0\.bias"):
        load_weights(model, other.state_dict())
    with refused(other, "the model must be a UNet or FastUNet, got Sequential"):
        load_weights(other, other.state_dict())


def test_no_weights():
    model = make(seed=1)
    with refused(model, "the checkpoint holds no weights, its entries are: nothing"):
        load_weights(model, {})
    with refused(model, "holds no weights, its entries are: epoch, generator"):
        load_weights(model, {"epoch": 1, "generator": make().state_dict()})
    with refused(model, "holds no weights"):
        load_weights(model, {0: torch.ones(2)})


# Files


def saved(state, kind):
    """The bytes of a checkpoint file."""
    if kind == "safetensors":
        from safetensors.torch import save

        return save(state)
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=kind == "zip")
    return buffer.getvalue()


def test_no_file(tmp_path):
    model = make(seed=1)
    path = tmp_path / "nothing.pth"
    with refused(model, "checkpoint '.*nothing.pth' is not a file", FileNotFoundError):
        load_weights(model, path)
    with refused(model, "is not a file", FileNotFoundError):
        load_weights(model, tmp_path)


@pytest.mark.parametrize("fraction", [0, 0.001, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated(tmp_path, kind, fraction):
    whole = saved(make().state_dict(), kind)
    path = tmp_path / "truncated.ckpt"
    path.write_bytes(whole[: int(fraction * len(whole))])
    model = make(seed=1)
    with refused(model, "truncated.ckpt' cannot be read: it is truncated, or was not written by"):
        load_weights(model, path)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("seed", range(20))
def test_random_bytes(tmp_path, seed, suffix):
    path = tmp_path / f"noise.{suffix}"
    path.write_bytes(random.Random(seed).randbytes(1000))
    model = make(seed=1)
    with refused(model, rf"noise\.{suffix}' cannot be read"):
        load_weights(model, path)


def test_foreign_files(tmp_path):
    model = make(seed=1)
    path = tmp_path / "file.pth"
    for content in (b"{}", b'{"epoch": 3}', b"a text, longer than a header", b"\x89PNG\r\n\x1a\n0"):
        path.write_bytes(content)
        with refused(model, "cannot be read"):
            load_weights(model, path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no checkpoint")
    with refused(model, "cannot be read"):
        load_weights(model, path)
    torch.save(torch.ones(2), path)
    with refused(model, "file.pth' holds a Tensor instead of a state_dict"):
        load_weights(model, path)
    torch.save([1, 2], path)
    with refused(model, "holds a list instead of a state_dict"):
        load_weights(model, path)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_is_not_run(tmp_path, kind):
    trace, path = tmp_path / "trace", tmp_path / "evil.pth"
    checkpoint = make().state_dict() | {"mask_values": Malicious(trace)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"mask_values": Malicious(trace)}, protocol=2))
    else:
        path.write_bytes(saved(checkpoint, kind))
    model = make(seed=1)
    name = os.mkdir.__module__ + ".mkdir"
    with refused(model, rf"evil\.pth' holds {name}, which .* refuses: "):
        load_weights(model, path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Malicious(trace)))  # it would have run
    assert trace.exists()


def test_whole_model_is_refused(tmp_path):
    torch.save(make(), tmp_path / "model.pt")
    model = make(seed=1)
    with refused(model, r"holds fastunet\.reference\.unet\.UNet, which .*save model\.state_dict"):
        load_weights(model, tmp_path / "model.pt")
