"""Memory for maps on the CPU: reused, joined, given back, and left to PyTorch where asked."""

import gc
import subprocess
import sys
import threading

import pytest
import torch

from fastunet import FastUNet
from fastunet.maps import (
    LEAST_KEPT,
    allocated_by_pytorch,
    empty_map,
    kept_map_memory,
    release_map_memory,
)
from fastunet.memory import available, measure_allocations

MIB = 2**20


@pytest.fixture(autouse=True)
def nothing_kept():
    gc.collect()
    make()
    if kept_map_memory() == 0:
        pytest.skip("PyTorch allocates: not on Linux, under a limit, or with sanitizers")
    release_map_memory()
    yield
    release_map_memory()


def make(mib=1, channels=16, like=None):
    like = torch.empty(1, 1, 1, 1) if like is None else like
    return empty_map(like, channels, (mib * MIB // (4 * channels * 64), 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 16, 64, 64), (3, 5, 131, 77), (2, 1, 256, 256)])
def test_is_a_channels_last_map(dtype, shape):
    n, c, h, w = shape
    x = empty_map(torch.empty(n, 3, 2, 2, dtype=dtype), c, (h, w))
    expected = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
    assert x.shape == expected.shape
    assert x.stride() == expected.stride()
    assert x.dtype == dtype
    assert x.data_ptr() % 64 == 0
    assert not x.requires_grad
    numbers = torch.arange(x.numel()).view(shape).to(dtype)
    assert torch.equal(x.copy_(numbers), numbers)


def test_maps_do_not_overlap():
    """Random sizes, lives and order; each map still holds what was written to it."""
    generator = torch.Generator().manual_seed(0)

    def number(end):
        return int(torch.randint(end, (), generator=generator))

    alive = []
    for i in range(600):
        if alive and number(5) < 2:
            x, value = alive.pop(number(len(alive)))
            assert (x == value).all()
            del x
        else:
            x = empty_map(torch.empty(1, 1, 1, 1), 1 + number(40), (20 + number(60), 60))
            alive.append((x.fill_(i), i))
    assert all((x == value).all() for x, value in alive)


def test_the_place_is_reused():
    x = make(4).zero_()
    address = x.data_ptr()
    del x
    assert kept_map_memory() >= 4 * MIB
    assert make(4).data_ptr() == address


def test_free_neighbours_become_one():
    parts = [make(2) for _ in range(4)]
    first = min(x.data_ptr() for x in parts)
    parts.clear()
    assert make(8).data_ptr() == first


def test_the_smallest_that_fits():
    large, _wall, small, _end = make(6), make(), make(3), make()
    address = small.data_ptr()
    del large, small
    assert make(2).data_ptr() == address


def test_views_keep_it():
    x = make(2).fill_(3)
    view, address = x[:, :2], x.data_ptr()
    del x
    assert make(2).data_ptr() != address
    assert (view == 3).all()


def test_given_back_to_the_system():
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    x = make(256).zero_()
    before = resident()
    del x
    assert resident() > before - 16 * MIB
    assert kept_map_memory() >= 256 * MIB
    release_map_memory()
    assert resident() < before - 200 * MIB
    assert kept_map_memory() == 0


def test_what_is_not_needed_any_more_goes_by_itself():
    make(256).zero_()
    assert kept_map_memory() >= 256 * MIB
    for _ in range(3000):
        make().zero_()
    assert kept_map_memory() <= 16 * MIB


def test_available_counts_what_is_kept():
    x = make(512).zero_()
    while_used = available("cpu")
    del x
    assert available("cpu") > while_used + 400 * MIB


def test_small_maps_are_pytorchs():
    before = kept_map_memory()
    small = empty_map(torch.empty(1, 1, 1, 1), 1, (16, LEAST_KEPT // 4 // 16 - 1))
    del small
    assert kept_map_memory() == before


def test_counted_when_asked():
    x = torch.empty(1, 1, 1, 1)
    with allocated_by_pytorch():
        assert measure_allocations(lambda: make(2, like=x)).live_bytes == 2 * MIB
    assert measure_allocations(lambda: make(2, like=x)).live_bytes == 2 * MIB


def test_threads():
    wrong = []

    def work(value):
        for _ in range(100):
            x = make(channels=1 + value).fill_(value)
            y = make(channels=2 + value).fill_(-value)
            if not (x == value).all() or not (y == -value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


FORKS = """
import os, signal, threading
import torch
from fastunet.maps import empty_map

def make():
    return empty_map(torch.empty(1, 1, 1, 1), 16, (64, 64))

def work():
    while not done.is_set():
        make()

signal.alarm(60)
done = threading.Event()
threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads:
    thread.start()
for _ in range(200):
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        make()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
done.set()
"""


def test_forks():
    """No child finds the lock held by a thread that it does not have."""
    subprocess.run([sys.executable, "-c", FORKS], check=True, capture_output=True)


GROWTH = """
import resource
import torch
from fastunet import FastUNet
model, x = FastUNet(3, 2, True, base_channels=16).eval(), torch.randn(1, 3, 256, 256)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
with torch.inference_mode():
    for _ in range(5): model(x)
    before = peak()
    for _ in range(60): model(x)
print(peak() - before)
"""


def test_inference_does_not_grow():
    """By two maps a pass it did, where the C library could not use their places again."""
    done = subprocess.run(
        [sys.executable, "-c", GROWTH], check=True, capture_output=True, text=True
    )
    assert int(done.stdout) <= 16  # MiB


LIMITED = """
import resource
import torch
resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))
from fastunet import FastUNet
from fastunet.maps import kept_map_memory
FastUNet(3, 2, base_channels=16)(torch.randn(1, 3, 256, 256)).sum().backward()
print(kept_map_memory())
"""


def test_under_a_limit():
    """Processes whose address space is limited take no more of it than PyTorch does."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED], check=True, capture_output=True, text=True
    )
    assert int(done.stdout) == 0


def test_a_step_is_the_same(compiled):
    """Bit by bit, whoever allocates."""

    def step():
        torch.manual_seed(0)
        model = FastUNet(3, 2, base_channels=16)
        loss = model(torch.randn(1, 3, 64, 96)).square().sum()
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    ours = step()
    with allocated_by_pytorch():
        theirs = step()
    assert all(map(torch.equal, ours, theirs))
