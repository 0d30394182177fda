"""fastunet.capture on a CPU: a recording of kernel calls that computes what the model does."""

import pytest
import torch
from networks import FORMATS, pair, random
from torch import nn

import fastunet
from fastunet import extension
from fastunet.unet import DoubleConv

OPTIONS = {
    "bilinear": {"bilinear": True},
    "transposed": {},
    "group": {"norm": "group", "activation": "leaky_relu"},
    "none": {"norm": "none", "conv_bias": True, "depth": 2},
}


def captured(example, **options):
    _, model = pair(**options)
    return model.eval(), fastunet.capture(model, example)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("size", [(32, 48), (37, 51)], ids=str)
def test_is_the_model(name, size):
    x, other = random(2, 3, *size), random(2, 3, *size, seed=1)
    model, recording = captured(x, **OPTIONS[name])
    with torch.no_grad():
        for image in (x, other, x):
            assert torch.equal(recording(image), model(image))
    first = recording(x)
    recording(other)  # results have memory of their own
    assert torch.equal(recording(x), first)
    assert not first.requires_grad


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_under_autocast(backend):
    x = random(1, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16), fastunet.backend(backend):
        model, recording = captured(x)
    got = recording(x)
    with torch.autocast("cpu", torch.bfloat16), fastunet.backend(backend), torch.no_grad():
        assert torch.equal(got, model(x))


@pytest.mark.parametrize("first", FORMATS)
def test_memory_formats(first):
    x = random(1, 3, 32, 32)
    model, recording = captured(x.to(memory_format=first))
    for other in FORMATS:
        with torch.inference_mode():
            assert torch.equal(recording(x.to(memory_format=other)), model(x))


def test_follows_the_parameters():
    x = random(1, 3, 32, 32)
    model, recording = captured(x)
    with torch.no_grad():
        model.inc.double_conv[0].weight.mul_(1.5)
        assert torch.equal(recording(x), model(x))
        model.inc.double_conv[1].running_var.add_(0.5)
        assert torch.equal(recording(x), model(x))
        model.load_state_dict({k: v * 0.9 for k, v in model.state_dict().items()})
        assert torch.equal(recording(x), model(x))


def test_keeps_transformed_weights():
    """Which it makes again when it is told, where a weight has changed without a trace."""
    x = random(1, 3, 32, 32)
    model, recording = captured(x)
    assert len(recording.kept) == 4  # on smaller maps they are transformed each time
    before = recording(x)
    with torch.no_grad():
        model.inc.double_conv[0].weight.data.mul_(1.5)
        assert torch.equal(recording(x), before)
        recording.refresh()
        assert torch.equal(recording(x), model(x))
        model.inc.double_conv[0].weight.data = torch.randn(model.inc.double_conv[0].weight.shape)
        assert torch.equal(recording(x), model(x))
    with torch.inference_mode():  # these have no versions, and are read as they are
        _, model = pair()
        recording = fastunet.capture(model.eval(), x)
        assert torch.equal(recording(x), model(x))
        model.inc.double_conv[0].weight.mul_(1.5)
        assert torch.equal(recording(x), model(x))


def test_weights_that_are_made_each_time():
    x = random(1, 3, 32, 32)
    _, model = pair()
    for block in (model.inc, model.down1.maxpool_conv[1]):
        nn.utils.parametrizations.weight_norm(block.double_conv[0])
    recording = fastunet.capture(model.eval(), x)
    with torch.no_grad():
        assert torch.equal(recording(x), model(x))
        model.inc.double_conv[0].parametrizations.weight.original0.mul_(2)
        assert torch.equal(recording(x), model(x))


def test_runs_nothing_of_the_model(monkeypatch):
    x = random(1, 3, 32, 32)
    model, recording = captured(x)
    with torch.no_grad():
        expected = model(x)

    def fail(*_):
        raise AssertionError("the model ran")

    monkeypatch.setattr(DoubleConv, "forward", fail)
    assert torch.equal(recording(x), expected)


def test_hooks_run_while_recording():
    seen = []
    x = random(1, 3, 32, 32)
    _, model = pair()
    model.inc.register_forward_hook(lambda *_: seen.append(1))
    recording = fastunet.capture(model.eval(), x)
    assert seen
    with torch.no_grad():
        assert torch.equal(recording(x), model(x))


def test_without_kernels(monkeypatch):
    x = random(1, 3, 32, 32)
    monkeypatch.setattr(extension, "load", lambda: (None, "they were left out"))
    model, recording = captured(x)
    with torch.no_grad():
        model.outc.conv.weight.mul_(2)
        assert torch.equal(recording(x), model(x))


def test_says_what_it_needs():
    _, model = pair()
    x = random(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"must be in evaluation mode"):
        fastunet.capture(model.train(), x)
    with pytest.raises(ValueError, match="must be on the CPU, or on one CUDA GPU, got cpu, meta"):
        fastunet.capture(model.eval(), x.to("meta"))
    recording = fastunet.capture(model, x)
    with pytest.raises(ValueError, match="must have the example's shape"):
        recording(x[:, :, :16])
    with pytest.raises(ValueError, match="must have the example's dtype"):
        recording(x.double())
    pairs = nn.Sequential(nn.MaxPool2d(2, return_indices=True)).eval()
    with pytest.raises(ValueError, match="the model must return a tensor, got tuple"):
        fastunet.capture(pairs, x)
