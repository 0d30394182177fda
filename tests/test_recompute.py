"""Checkpointing policies: the same to the bit, and less kept."""

import copy

import pytest
import torch
from networks import random
from torch.autograd.graph import save_on_cpu

import fastunet
from fastunet import FastUNet, extension
from fastunet.memory import measure_allocations, saved_for_backward
from fastunet.reference import UNet

POLICIES = ("light", "full")
VARIANTS = {
    "bilinear": {"bilinear": True},
    "transposed": {"conv_bias": True},
    "up first": {"concat_order": "up_first", "activation": "leaky_relu"},
    "instance": {"norm": "instance", "bilinear": True},
    "group": {"norm": "group", "conv_bias": True},
    "no norm": {"norm": "none"},
    "shallow": {"depth": 1},
}


def build(**options):
    torch.manual_seed(0)
    return FastUNet(3, 2, **{"base_channels": 8, "depth": 3, **options})


def step(model, x, autocast=None, retain_graph=False):
    """Logits, gradients and buffers."""
    model.zero_grad()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        logits = model(x)
    loss = logits.float().square().mean()
    loss.backward(retain_graph=retain_graph)
    if retain_graph:
        loss.backward()
    grads = {f"d{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = {"logits": logits.detach(), **grads, **dict(model.named_buffers())}
    return {name: t.clone() for name, t in found.items()}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", ["train", "frozen"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_bits(variant, mode, policy):
    model = build(**VARIANTS[variant]).train(mode == "train")
    other = copy.deepcopy(model)
    other.use_checkpointing(policy)
    x = random(2, 3, 37, 50).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    assert_same(step(other, twin), step(model, x))
    assert torch.equal(twin.grad, x.grad)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype, policy):
    model = build()
    autocast = dtype if dtype == torch.bfloat16 else None
    x = random(1, 3, 33, 40)
    if autocast is None:
        model, x = model.double(), x.double()
    other = copy.deepcopy(model)
    other.use_checkpointing(policy)
    assert_same(step(other, x, autocast), step(model, x, autocast))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("backend", ["reference", "cuda"])
def test_other_backends(backend, policy):
    if backend == "cuda" and extension.load_cuda("cuda_host"):
        pytest.skip(extension.load_cuda("cuda_host"))
    model = build(depth=2)
    other = copy.deepcopy(model)
    other.use_checkpointing(policy)
    x = random(1, 3, 17, 20)
    with fastunet.backend(backend):
        assert_same(step(other, x), step(model, x))


@pytest.mark.parametrize("policy", POLICIES)
def test_running_statistics_after_several_steps(policy):
    """Once a step, however often a layer runs."""
    model = build(bilinear=True)
    other = copy.deepcopy(model)
    other.use_checkpointing(policy)
    for seed in range(5):
        x = random(2, 3, 32, 40, seed=seed)
        want, got = step(model, x), step(other, x)
        assert_same(got, want)
        for each in (model, other):
            with torch.no_grad():
                for p in each.parameters():
                    p -= 0.1 * p.grad
    assert other.inc.double_conv[1].num_batches_tracked == 5


@pytest.mark.parametrize("policy", POLICIES)
def test_a_graph_that_is_kept(policy):
    """Backward twice makes the maps twice."""
    model = build()
    other = copy.deepcopy(model)
    other.use_checkpointing(policy)
    x = random(1, 3, 24, 32)
    assert_same(step(other, x, retain_graph=True), step(model, x, retain_graph=True))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("frozen", ["inc", "down1", "up2", "outc"])
def test_frozen_parts(policy, frozen):
    model = build()
    getattr(model, frozen).requires_grad_(False)
    other = copy.deepcopy(model)
    other.use_checkpointing(policy)
    x = random(1, 3, 24, 32)
    assert_same(step(other, x), step(model, x))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("where", ["down1", "up1.conv.double_conv.0", "up1.up", "inc.double_conv"])
def test_hooked_parts(policy, where):
    """Blocks that somebody watches keep what they keep."""
    model = build()
    seen = []
    other = copy.deepcopy(model)
    for each in (model, other):
        each.get_submodule(where).register_forward_hook(lambda *args: seen.append(args[-1].shape))
    other.use_checkpointing(policy)
    x = random(1, 3, 24, 32)
    assert_same(step(other, x), step(model, x))
    assert len(seen) == 2


@pytest.mark.parametrize("policy", POLICIES)
def test_several_graphs_at_once(policy):
    """Two forward passes before any backward, the first one's last."""
    model = build()
    other = copy.deepcopy(model)
    other.use_checkpointing(policy)
    images = [random(1, 3, 24, 32, seed=seed) for seed in range(2)]
    results = []
    for each in (model, other):
        losses = [each(x).square().mean() for x in images]
        each.zero_grad()
        for loss in reversed(losses):
            loss.backward()
        results.append({name: p.grad for name, p in each.named_parameters()})
    assert_same(results[1], results[0])


def test_changed_in_place():
    """What a recomputation would read must still be what it was."""
    model = build()
    model.use_checkpointing("full")
    loss = model(random(1, 3, 24, 32)).sum()
    with torch.no_grad():
        model.inc.double_conv[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_callers_hooks_see_what_is_kept(policy):
    model = build()
    other = copy.deepcopy(model)
    other.use_checkpointing(policy)
    x = random(1, 3, 24, 32)
    want = step(model, x)
    with save_on_cpu():
        assert_same(step(other, x), want)


# The limits; in shares of what the plain U-Net keeps.
KEPT = {
    (True, "none"): 0.38,
    (True, "light"): 0.21,
    (True, "full"): 0.12,
    (False, "none"): 0.47,
    (False, "light"): 0.29,
    (False, "full"): 0.14,
}


@pytest.mark.parametrize(("bilinear", "policy"), KEPT)
def test_share_that_is_kept(bilinear, policy):
    """Base 64, one 256x256 image, without computing anything."""
    kinds, counts = (UNet, FastUNet), []
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(1, 3, 256, 256)
        for kind in kinds:
            model = kind(3, 2, bilinear)
            model.use_checkpointing(policy if kind is FastUNet else None)
            excluded = [*model.parameters(), *model.buffers()]
            counts.append(saved_for_backward(lambda model=model: model(x), excluded))
    plain, fast = counts
    assert fast <= KEPT[bilinear, policy] * plain


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("bilinear", [True, False])
def test_what_is_kept_is_what_is_counted(bilinear, policy):
    """And a step's peak is lower, as maps are dropped as soon as they are read."""
    x = random(1, 3, 128, 128)

    def measured(checkpointing):
        model = build(bilinear=bilinear, base_channels=16)
        model.use_checkpointing(checkpointing)
        excluded = [*model.parameters(), *model.buffers(), x]
        counted = saved_for_backward(lambda: model(x), excluded)
        forward = measure_allocations(lambda: model(x))
        live = forward.live_bytes - forward.result.numel() * forward.result.element_size()
        assert live == pytest.approx(counted, rel=0.05)
        del forward
        model(x).sum().backward()  # allocates the gradients
        return measure_allocations(lambda: model(x).sum().backward()).peak_bytes

    assert measured(policy) < 0.85 * measured("none")


def test_policies():
    model = build()
    keys = list(model.state_dict())
    for policy in (*POLICIES, None, "none"):
        model.use_checkpointing(policy)
        assert list(model.state_dict()) == keys
    assert build(checkpointing="light").checkpointing == "light"
    with pytest.raises(ValueError, match="must be one of none, light, full, auto, got 'some'"):
        model.use_checkpointing("some")
    with torch.no_grad():
        model.use_checkpointing("full")
        assert model(random(1, 3, 16, 16)).grad_fn is None
