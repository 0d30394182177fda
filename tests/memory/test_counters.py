"""The memory counters against sums made by hand."""

import gc
import weakref

import pytest
import torch
from torch import nn

from fastunet.memory import measure_allocations, saved_for_backward
from fastunet.reference import UNet

FLOAT = 4  # bytes


def test_saved_conv_relu_chain():
    # [2, 3, 8, 10] -conv-> [2, 5, 8, 10] -relu-> [2, 5, 8, 10] -conv-> [2, 7, 8, 10]
    net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 7, 3, padding=1))
    x = torch.randn(2, 3, 8, 10)
    maps = (2 * 3 * 8 * 10 + 2 * 5 * 8 * 10) * FLOAT  # the input, and the ReLU's output once
    weights = (5 * 3 * 9 + 7 * 5 * 9) * FLOAT  # biases are not saved
    assert saved_for_backward(lambda: net(x), net.parameters()) == maps
    assert saved_for_backward(lambda: net(x)) == maps + weights


def test_saved_batch_norm():
    net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5))
    x = torch.randn(2, 3, 8, 10)
    maps = (2 * 3 * 8 * 10 + 2 * 5 * 8 * 10) * FLOAT
    statistics = 2 * 5 * FLOAT  # mean and 1/std
    excluded = [*net.parameters(), *net.buffers()]
    assert saved_for_backward(lambda: net(x), excluded) == maps + statistics


def test_saved_views_count_once_and_whole():
    base = torch.randn(100, requires_grad=True)
    assert saved_for_backward(lambda: base[:10].sin() + base[50:60].cos()) == 100 * FLOAT
    assert saved_for_backward(lambda: base[:10].sin() + base[50:60].cos(), [base[3:]]) == 0


def test_saved_storages_that_die_on_the_way():
    x = torch.randn(100, requires_grad=True)

    def forward():
        for _ in range(5):
            x.exp()  # saves its result, and is dropped at once

    assert saved_for_backward(forward) == 5 * 100 * FLOAT


def test_nothing_is_saved_without_grad():
    x = torch.randn(100, requires_grad=True)
    with torch.no_grad():
        assert saved_for_backward(lambda: x.exp()) == 0


def test_saved_while_backward_runs_inside():
    x = torch.randn(100, requires_grad=True)
    assert saved_for_backward(lambda: x.exp().sum().backward()) == 100 * FLOAT
    torch.testing.assert_close(x.grad, x.exp())


def test_saved_leaves_no_cycle_behind():
    x = torch.randn(100, requires_grad=True)
    outputs = []
    gc.disable()
    try:
        saved_for_backward(lambda: outputs.append(weakref.ref(x.exp())))
        assert outputs[0]() is None
    finally:
        gc.enable()


def test_allocations_of_three_tensors_one_freed():
    def function():
        a, b = torch.empty(1000), torch.empty(500)
        del a
        return b, torch.empty(200)

    result, live, peak = measure_allocations(function)
    assert [len(tensor) for tensor in result] == [500, 200]
    assert live == 700 * FLOAT
    assert peak == 1500 * FLOAT


def test_allocations_in_nested_calls():
    def inner():
        return torch.empty(300).sum()  # [300], then one number, then [300] is freed

    def outer():
        kept = torch.empty(100)
        inner()
        return kept

    _, live, peak = measure_allocations(outer)
    assert live == 100 * FLOAT
    assert peak == (100 + 300 + 1) * FLOAT


def test_allocations_inside_an_operator():
    x = torch.randn(50, 40)
    _, live, peak = measure_allocations(lambda: x.median(0))
    results = 40 * FLOAT + 40 * 8  # values and int64 indices
    assert live == results
    assert peak == results + x.numel() * FLOAT  # median works on a copy, freed before it returns


def test_allocations_do_not_count_memory_from_before():
    before = [torch.empty(1000)]

    def function():
        before.clear()
        return torch.empty(10)

    for _ in range(2):  # also once what an earlier measurement saw is freed or reused
        result, live, peak = measure_allocations(function)
        assert (live, peak) == (10 * FLOAT, 10 * FLOAT)
        before.append(result)
        before.append(torch.empty(1000))
        del result


def test_allocations_of_a_training_step():
    net = nn.Conv2d(1, 4, 3, padding=1, bias=False)
    x = torch.randn(1, 1, 32, 32)

    _, live, peak = measure_allocations(lambda: net(x).sum().backward())
    assert live == net.weight.numel() * FLOAT  # the gradient
    assert peak >= live + 4 * 32 * 32 * FLOAT


def test_both_counters_agree_on_a_network():
    net = UNet(1, 2, base_channels=4, depth=2)
    x = torch.randn(2, 1, 33, 47)
    saved = saved_for_backward(lambda: net(x), [*net.parameters(), *net.buffers()])
    logits, live, _ = measure_allocations(lambda: net(x))
    assert live == saved - x.numel() * FLOAT + logits.numel() * FLOAT


def test_allocations_error_passes_through():
    def function():
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        measure_allocations(function)
    assert measure_allocations(lambda: torch.empty(5)).live_bytes == 5 * FLOAT


def test_allocations_unknown_device():
    with pytest.raises(ValueError, match="cpu or cuda device, got 'meta'"):
        measure_allocations(lambda: None, "meta")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_allocations_on_cuda():
    def function():
        a, b = torch.empty(1 << 20, device="cuda"), torch.empty(1 << 19, device="cuda")
        del a
        return b

    _, live, peak = measure_allocations(function, "cuda")
    assert (live, peak) == ((1 << 19) * FLOAT, ((1 << 20) + (1 << 19)) * FLOAT)
