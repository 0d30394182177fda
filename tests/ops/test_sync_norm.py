"""Synchronised BatchNorm: two processes with a part of the batch each, against one with all."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from networks import end_process, random
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastunet
from fastunet import FastUNet, reference
from fastunet.activation import Activation
from fastunet.ops.sync_norm import sync_norm

SIZE = (3, 3, 24, 40)  # the first process has one image, the second two
OPTIONS = {"base_channels": 4, "depth": 2}


def build(**options):
    torch.manual_seed(0)
    model = FastUNet(3, 2, **OPTIONS, **options).double()
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(0.5, 1.5)
                m.bias.normal_()
    return model


def step(model, x, share=1.0):
    """Sums over the batch, so that parts of it add up; DDP takes the mean over processes."""
    logits = model(x)
    (logits.sin().sum() * share).backward()
    return logits.detach()


def found(model, logits):
    unet = model.module if isinstance(model, DistributedDataParallel) else model
    grads = {f"d{name}": p.grad for name, p in unet.named_parameters()}
    return {"logits": logits, **grads, **dict(unet.named_buffers())}


def process(rank, folder, backend, options, policy):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    model = build(**options)
    model.use_checkpointing(policy)
    wrapped = DistributedDataParallel(model)
    # In this order, as on CPUs DistributedDataParallel refuses to wrap a SyncBatchNorm.
    nn.SyncBatchNorm.convert_sync_batchnorm(wrapped.module)
    x = random(*SIZE).double()
    part = x[:1] if rank == 0 else x[1:]
    with fastunet.backend(backend):
        for _ in range(2):
            wrapped.zero_grad()
            logits = step(wrapped, part, share=2.0)
    torch.save(found(wrapped, logits), f"{folder}/{rank}.pt")
    end_process()


@pytest.mark.parametrize(
    ("backend", "options", "policy"),
    [
        ("auto", {"bilinear": True}, "none"),
        ("auto", {"conv_bias": True}, "full"),
        ("reference", {}, "none"),
    ],
    ids=["bilinear", "full", "reference"],
)
def test_two_processes(tmp_path, backend, options, policy):
    mp.start_processes(
        process, (str(tmp_path), backend, options, policy), nprocs=2, start_method="forkserver"
    )
    model = build(**options)
    with fastunet.backend(backend):
        for _ in range(2):
            model.zero_grad()
            logits = step(model, random(*SIZE).double())
    want = found(model, logits)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, t in want.items():
        if name == "logits":
            got = torch.cat([part[name] for part in parts])
            torch.testing.assert_close(got, t, rtol=1e-9, atol=1e-9)
            continue
        for part in parts:
            torch.testing.assert_close(
                part[name], t, rtol=1e-8, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
            )


def test_one_process():
    """Without others it is BatchNorm, in training and in evaluation."""
    model = build()
    sync = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    x = random(*SIZE).double()
    for train in (True, False):
        results = [found(m, step(m.train(train), x)) for m in (model, sync)]
        for (name, a), b in zip(results[0].items(), results[1].values(), strict=True):
            assert torch.equal(a, b), name


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_kernels_run_on_the_maps_device(group, monkeypatch):
    """Which need not be the current one, on which Triton launches."""
    entered, seen = [], []

    class Device:
        def __init__(self, tensor):
            self.tensor = tensor

        def __enter__(self):
            entered.append(self.tensor.data_ptr())

        def __exit__(self, *_):
            entered.pop()

    def normalization(y, *args):
        seen.append(entered == [y.data_ptr()])
        return reference.normalization(y, *args)

    def normalization_bwd(dy, dscale, dshift, y, *args):
        seen.append(entered == [y.data_ptr()])
        args[-1].zero_()

    kernels = SimpleNamespace(normalization=normalization, normalization_bwd=normalization_bwd)
    monkeypatch.setattr(fastunet.backends, "select", lambda *_: kernels)
    monkeypatch.setattr(torch.cuda, "device_of", Device)
    y = random(2, 3, 4, 5).requires_grad_()
    output, *_ = sync_norm(Activation.of(y), None, None, None, 1e-5, 0.0, group)
    output.scale.sum().backward()
    assert seen == [True, True]


def test_its_memory_is_predicted():
    model = build()
    sync = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    step_of = fastunet.memory.profile(sync, SIZE).run("none")
    assert step_of.peak == fastunet.memory.profile(model, SIZE).run("none").peak
