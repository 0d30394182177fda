"""Plans against every other choice, and run within the budget they were made for."""

import copy
import json
import random as numbers
import subprocess
import sys
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import random
from sampling import sampled

from fastunet import FastUNet
from fastunet.memory import (
    BudgetError,
    MemoryPlan,
    format_size,
    measure_allocations,
    parse_size,
    planning,
)
from fastunet.memory import plan as planned
from fastunet.memory.budget import available, control_group
from fastunet.memory.frontier import frontier
from fastunet.memory.ledger import training_step
from fastunet.memory.planning import step_of
from fastunet.memory.program import program

NETWORKS = {
    "transposed": ({}, (1, 3, 64, 65)),
    "bilinear": ({"bilinear": True}, (2, 3, 50, 64)),
    "no norm": ({"norm": "none", "concat_order": "up_first"}, (1, 3, 64, 64)),
    "instance": ({"norm": "instance"}, (2, 3, 40, 41)),
}


def build(**options):
    torch.manual_seed(0)
    return FastUNet(3, 2, **{"base_channels": 8, "depth": 2, **options})


def programmed(model, shape):
    return program(model, training_step(model, shape, policy="none"))


def forgetting(model, names):
    """A plan for this choice."""
    layers = {name: "recompute" if name in names else "keep" for name, _ in model.named_modules()}
    return MemoryPlan((1,), "float32", 1, 1, 1, 0.0, layers)


@pytest.mark.parametrize("depth", sampled([1, 3], [3]))
@pytest.mark.parametrize("network", NETWORKS)
def test_the_model_of_a_step(network, depth):
    """What the search takes a choice's peak to be is what the step comes to, to the byte."""
    options, shape = NETWORKS[network]
    model = build(depth=depth, **options)
    found = programmed(model, shape)
    names = [m.name for level in found.levels for m in level.maps]
    choose = numbers.Random(network)
    for _ in range(8):
        choice = choose.sample(names, choose.randint(0, len(names)))
        (predicted,) = frontier(found.levels, found.head, choice)
        model.use_checkpointing(forgetting(model, choice))
        assert predicted.peak == training_step(model, shape).peak()
        model.use_checkpointing("none")


@pytest.mark.parametrize("network", ["transposed", "bilinear"])
def test_no_other_choice_is_better(network):
    options, shape = NETWORKS[network]
    levels, head, _ = programmed(build(depth=1, **options), shape)
    maps = [m for level in levels for m in level.maps]
    best = frontier(levels, head)
    for count in range(len(maps) + 1):
        for choice in combinations(maps, count):
            cost = sum(m.cost for m in choice)
            (other,) = frontier(levels, head, [m.name for m in choice])
            assert any(b.peak <= other.peak and b.cost <= cost + 1e-6 * cost for b in best)


def test_no_other_choice_of_a_deeper_network_is_better():
    """Drawn at random, from the 2**23 of depth 4 and the 2**18 of depth 3."""
    for depth, bilinear in ((4, False), (3, True)):
        model = build(depth=depth, bilinear=bilinear)
        levels, head, _ = programmed(model, (4, 3, 96, 128))
        maps = [m for level in levels for m in level.maps]
        best = frontier(levels, head)
        assert len(best) > 10
        choose = numbers.Random(0)
        for _ in range(60):
            choice = choose.sample(maps, choose.randint(0, len(maps)))
            cost = sum(m.cost for m in choice)
            (other,) = frontier(levels, head, [m.name for m in choice])
            assert any(b.peak <= other.peak and b.cost <= cost * (1 + 1e-9) for b in best)


def peak_of(model, x):
    """With what was there before the step."""

    def step():
        logits = model(x)
        logits.backward(torch.empty_like(logits))

    model.zero_grad()
    static = sum(t.nbytes for t in (*model.parameters(), *model.buffers(), x))
    return measure_allocations(step).peak_bytes + static


@pytest.fixture(scope="module")
def budgeted():
    """A model, its batch and all its choices; the vectors' bytes count at this size too."""
    model = build(depth=3)
    x = random(2, 3, 96, 112)
    model(x).sum().backward()
    return model, x, step_of(model, x.shape)


@settings(deadline=None, max_examples=10)
@given(share=st.floats(0, 1))
def test_any_feasible_budget_is_met(budgeted, share):
    model, x, step = budgeted
    most = step.choices[0].peak
    budget = step.least + int(share * (most - step.least))
    plan = planned(model, x.shape, budget)
    assert plan.peak <= budget
    model.use_checkpointing(plan)
    assert peak_of(model, x) <= budget * 1.001
    cheaper = [c for c in step.choices if c.cost / step.cost < plan.cost]
    assert all(c.peak > budget for c in cheaper)


@pytest.mark.parametrize("budget", [1.0, 0.5, 0.0])
def test_the_same_bits_and_statistics(budget):
    """As under policy none, after several steps."""
    model = build(depth=3)
    other = copy.deepcopy(model)
    shape = (2, 3, 48, 64)
    step = step_of(model, shape)
    plan = planned(model, shape, step.least + budget * (step.choices[0].peak - step.least))
    assert bool(plan.recomputed) == (budget < 1)
    other.use_checkpointing(plan)
    assert other.memory_plan is plan
    for seed in range(5):
        x = random(*shape, seed=seed)
        for each in (model, other):
            each.zero_grad()
            each(x).square().mean().backward()
        for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad), name
        with torch.no_grad():
            for p in (*model.parameters(), *other.parameters()):
                p -= 0.1 * p.grad
    for (name, a), b in zip(model.named_buffers(), other.named_buffers(), strict=True):
        assert torch.equal(a, b[1]), name


def test_frozen_and_foreign_parts():
    """They keep what they keep; the rest is planned, and the budget is met."""
    for change in ("frozen encoder", "hooked block", "replaced layer"):
        model = build(depth=2)
        if change == "frozen encoder":
            for block in (model.inc, model.down1, model.down2):
                block.requires_grad_(False)
        elif change == "hooked block":
            model.up1.register_forward_hook(lambda *_: None)
        else:
            model.down1.maxpool_conv[1].double_conv[2] = torch.nn.SiLU()
        x = random(1, 3, 64, 64)
        model(x).sum().backward()
        step = step_of(model, x.shape)
        assert step.least < step.choices[0].peak, change
        plan = planned(model, x.shape, step.least)
        model.use_checkpointing(plan)
        inside = 1.0 if change == "frozen encoder" else 1.15  # PyTorch's convolutions
        assert peak_of(model, x) <= step.least * inside, change


def test_a_budget_that_cannot_be_met():
    model = build(depth=2)
    least = step_of(model, (4, 3, 64, 64)).least
    with pytest.raises(BudgetError, match=r"a batch of [1-3] would fit") as found:
        planned(model, (4, 3, 64, 64), least - 1)
    assert found.value.least == least
    assert f"the least peak of a training step at 4x3x64x64 is {format_size(least)}" in str(
        found.value
    )
    batch = int(str(found.value).split("a batch of ")[1].split()[0])
    assert planned(model, (batch, 3, 64, 64), least - 1)
    one = step_of(model, (1, 3, 64, 64)).least
    with pytest.raises(BudgetError, match="a batch of 1 with tiles of") as found:
        planned(model, (1, 3, 64, 64), one - 1)
    side = int(str(found.value).split("tiles of ")[1].split("x")[0])
    assert planned(model, (1, 3, side, side), one - 1)
    with pytest.raises(BudgetError, match="a base width of at most"):
        planned(model, (1, 3, 64, 64), 10_000)


def test_saved_as_json(tmp_path):
    model = build(depth=2)
    plan = planned(model, (1, 3, 64, 64), step_of(model, (1, 3, 64, 64)).least)
    path = tmp_path / "plan.json"
    plan.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    loaded = MemoryPlan.load(path)
    assert loaded == plan
    assert "recompute" in str(plan)
    assert "1x3x64x64 float32: peak" in str(plan)
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"plan\.json must be a memory plan in JSON"):
        MemoryPlan.load(path)
    found = {**json.loads(json.dumps(plan.__dict__)), "layers": {"inc": "drop"}}
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="layers must be 'keep' or 'recompute'"):
        MemoryPlan.load(path)


def test_of_another_model():
    plan = planned(build(depth=2), (1, 3, 64, 64), "1GiB")
    with pytest.raises(ValueError, match="which has no layer 'down2"):
        build(depth=1).use_checkpointing(plan)


def test_auto(monkeypatch):
    """The cheapest that the memory left allows, at each step anew."""
    model, x = build(depth=2), random(2, 3, 64, 64)
    twin = copy.deepcopy(model)
    step = step_of(model, x.shape)
    left = [2**40]
    monkeypatch.setattr(planning, "available", lambda device: left[0])
    model.use_checkpointing("auto")
    assert model.memory_plan is None
    keys = list(model.state_dict())
    recomputed = []
    there = sum(t.nbytes for t in (*model.parameters(), *model.buffers(), x))
    middle = (step.least + step.choices[0].peak) // 2
    for budget in (2**40, middle, 0):
        more = max(0, budget - there)
        left[0] = int((more + planning.RESERVED) / (1 - planning.RESERVED_SHARE)) + 2
        for each in (model, twin):
            each.zero_grad()
        if budget:
            model(x).square().mean().backward()
        else:
            with pytest.warns(UserWarning, match="of memory are left on cpu, and a training step"):
                model(x).square().mean().backward()
        twin(x).square().mean().backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
        assert abs(model.memory_plan.budget - max(budget, there)) < 5
        recomputed.append(len(model.memory_plan.recomputed))
    assert recomputed[0] == 0 < recomputed[1] < recomputed[2]
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        model(x)
    copied = copy.deepcopy(model)
    assert copied.checkpointing == "auto"
    assert training_step(model, x.shape).peak() == step.choices[0].peak  # fake maps fit always
    model.use_checkpointing(None)
    assert model.memory_plan is None


def test_sizes():
    assert parse_size("6GiB") == 6 * 2**30
    assert parse_size(" 1.5 gb ") == 1_500_000_000
    assert parse_size(123) == 123
    assert format_size(3 * 2**20) == "3.0 MiB"
    assert format_size(80 * 2**30) == "80.00 GiB"
    for wrong in ("6 GiBs", "much", "", 0, "-1GB", float("nan"), float("inf")):
        with pytest.raises(ValueError, match="a size must be"):
            parse_size(wrong)


def test_limits_of_a_control_group(tmp_path):
    own, outer = tmp_path / "own", tmp_path / "user.slice"
    job, jobs = outer / "job", tmp_path / "memory" / "jobs"
    for folder in (job, jobs):
        folder.mkdir(parents=True)

    def left():
        return sorted(control_group(tmp_path, own))

    assert left() == []
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert left() == []
    (tmp_path / "memory.max").write_text("5000\n")
    assert left() == [4000]
    own.write_text("0::/../outside\n")
    assert left() == [4000]
    (tmp_path / "memory.max").write_text("max\n")
    own.write_text("1:cpu,memory:/jobs\n0::/user.slice/job\n")
    assert left() == []
    for folder in (outer, job):
        (folder / "memory.max").write_text("900\n")
        (folder / "memory.current").write_text("800\n")
    (job / "memory.stat").write_text("anon 500\ninactive_file 150\nactive_file 90\n")
    assert left() == [100, 250]
    (jobs / "memory.limit_in_bytes").write_text("700\n")
    (jobs / "memory.usage_in_bytes").write_text("100\n")
    assert left() == [100, 250, 600]
    with pytest.raises(ValueError, match="cpu or cuda device, got 'meta'"):
        available("meta")


LIMITED = """
import resource, sys
import psutil, torch
from fastunet import FastUNet
from fastunet.reference import UNet

def steps(model, x, count=2):
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses

# As under ulimit, before memory for maps is reserved.
resource.setrlimit(resource.RLIMIT_AS, (2**40, -1))
torch.manual_seed(0)
kind, policy = sys.argv[1:]
model = UNet(3, 2, base_channels=16) if kind == "UNet" else FastUNet(3, 2, base_channels=16)
model.use_checkpointing(policy)
steps(model, torch.randn(1, 3, 32, 32))  # whatever is loaded at first use
x = torch.randn(2, 3, 512, 512)
limit = psutil.Process().memory_info().vms + 500 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    print(steps(model, x), len(model.memory_plan.recomputed) if policy == "auto" else "")
except RuntimeError as error:
    print(str(error).splitlines()[0])
    sys.exit(3)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space are Linux's")
@pytest.mark.slow
def test_under_a_limit():
    """What the plain network cannot do under a limit, FastUNet can, by itself."""

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-c", LIMITED, *arguments], capture_output=True, text=True
        )

    plain = run("UNet", "none")
    assert plain.returncode == 3, plain.stderr
    assert "allocate memory" in plain.stdout
    auto = run("FastUNet", "auto")
    assert auto.returncode == 0, auto.stdout + auto.stderr
    assert int(auto.stdout.split()[-1]) > 0  # without forgetting, it would not have fitted
