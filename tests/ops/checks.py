"""How a case of ``oracle`` is checked: the same ways for every operator."""

import torch
from oracle import random
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

FP32_BUDGET = 1e-5  # relative L2, of every operator
FP64_BUDGET = 1e-11
HALVES = (torch.bfloat16, torch.float16)
# Not differentiated: center is a constant of its readers.
CONSTANTS = ("center", "running")


def evaluate(function, tensors, cotangent=None):
    """The function's output and all its gradients, by name.

    cotangent: from the output to its gradient; by default random and exact in every dtype.
    """
    leaves = {k: t.detach().requires_grad_(not k.startswith(CONSTANTS)) for k, t in tensors.items()}
    out = function(**leaves)
    if cotangent is None:
        grad = random(*out.shape, seed=99).mul_(64).round_().div_(64).clamp_(-2, 2).to(out)
    else:
        grad = cotangent(out)
    inputs = {k: t for k, t in leaves.items() if t.requires_grad}
    grads = torch.autograd.grad(out, list(inputs.values()), grad)
    return {"out": out.detach()} | {f"d{k}": g for k, g in zip(inputs, grads, strict=True)}


def oracle(case, tensors):
    """The definition in float64, on the very inputs of the operator."""
    return evaluate(case.plain, {k: t.double() for k, t in tensors.items()})


def assert_within(got, want, budget, plain=None):
    """Relative L2 error of every result; or, where plain PyTorch's is given, twice that.

    Inputs are of order one, so a sum that comes to less has cancelled: then the error is absolute.
    The sums over pixels, dscale and dshift, are judged by their terms: those of dy, but for
    the factor scale of order one. What is rounded in a transformed weight is the same in every
    tile, so over large maps part of the error adds up as the terms' magnitudes do.
    """
    assert got.keys() == want.keys()
    for name, exact in want.items():
        assert got[name].shape == exact.shape, name
        error = (got[name].double() - exact.double()).norm().item()
        scale = max(exact.norm().item(), exact.numel() ** 0.5)
        if name.startswith(("dscale", "dshift")):
            terms = want[name.replace("scale", "y").replace("shift", "y")]
            scale = max(scale, 4 * terms.norm().item(), terms.abs().sum().item() / 2)
        limit = budget * scale
        if plain is not None:
            limit = max(limit, 2 * (plain[name].double() - exact.double()).norm().item())
        assert error <= limit, f"{name}: |error| {error:.3g} > {limit:.3g}"


def assert_no_worse(got, plain, want, eps):
    """At most twice plain PyTorch's error in the same dtype, plus one eps of the maximum."""
    for name, exact in want.items():
        error, plain_error = ((r[name].double() - exact).abs().max() for r in (got, plain))
        limit = 2 * plain_error + eps * exact.abs().max()
        assert error <= limit, f"{name}: error {error:.3g}, plain PyTorch's {plain_error:.3g}"


def assert_identical(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name


def check_oracle(case, *dtypes):
    """Within the budget of each dtype (fp32 and fp64 by default)."""
    for dtype in dtypes or (torch.float32, torch.float64):
        check_dtype(case, dtype)


def check_oracles(cases):
    """Many cases in one test, all of them before it fails."""
    failures = {}
    for name, case in cases.items():
        try:
            check_oracle(case)
        except Exception as error:
            failures[name] = error
    assert not failures, failures


def check_dtype(case, dtype):
    tensors = case.tensors(dtype)
    got, want = evaluate(case.fast, tensors), oracle(case, tensors)
    assert got["out"].dtype == dtype
    if dtype in HALVES:
        assert_no_worse(got, evaluate(case.plain, tensors), want, torch.finfo(dtype).eps)
        return
    if dtype == torch.float64:
        assert_within(got, want, FP64_BUDGET)
        return
    try:
        assert_within(got, want, FP32_BUDGET)
    except AssertionError:
        # Statistics of very few values are ill-conditioned: there plain PyTorch is off as well.
        assert_within(got, want, FP32_BUDGET, evaluate(case.plain, tensors))


def check_autocast(case):
    """fp32 tensors under autocast: 16-bit maps, gradients in the dtypes of the inputs."""
    tensors = case.tensors()
    with torch.autocast("cpu", torch.bfloat16):
        got, plain = evaluate(case.fast, tensors), evaluate(case.plain, tensors)
    assert got["out"].dtype == torch.bfloat16
    assert all(got[f"d{name}"].dtype == t.dtype for name, t in tensors.items() if f"d{name}" in got)
    assert_no_worse(got, plain, oracle(case, tensors), torch.finfo(torch.bfloat16).eps)


def check_empty(case):
    """No samples: empty maps, zero sums."""
    for name, t in evaluate(case.fast, case.tensors()).items():
        assert not t.any(), name


def check_gradients(case, function=None):
    """Gradcheck of every differentiable input."""
    tensors = case.tensors(torch.float64)
    names = [k for k in tensors if not k.startswith(CONSTANTS)]

    def of_inputs(*inputs):
        return (function or case.fast)(**tensors | dict(zip(names, inputs, strict=True)))

    assert gradcheck(of_inputs, [tensors[k].clone().requires_grad_() for k in names])


class Record(TorchDispatchMode):
    """The calls of one operator and of its backward, [(operator, arguments)]."""

    def __init__(self, name):
        super().__init__()
        self.names = (f"fastunet::{name}", f"fastunet::{name}_bwd")
        self.calls: list = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in self.names:
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def record(name, case):
    with Record(name) as mode:
        evaluate(case.fast, case.tensors())
    (forward, forward_args), (backward, backward_args) = mode.calls
    # A backward operator has no derivative and is never called where one is wanted.
    return (forward, forward_args), (
        backward,
        tree_map_only(torch.Tensor, torch.detach, backward_args),
    )


def check_registration(name, case):
    """What PyTorch demands of an operator, and its fake's promises about the outputs."""
    for operator, args in record(name, case):
        torch.library.opcheck(operator, args)
    check_fakes(name, case)


def check_fakes(name, case):
    for operator, args in record(name, case):
        with torch.no_grad(), FakeTensorMode() as mode:
            fakes = operator(*tree_map_only(torch.Tensor, mode.from_tensor, args))
        with torch.no_grad():
            reals = operator(*args)
        for fake, real in zip(as_tuple(fakes), as_tuple(reals), strict=True):
            assert describe(fake) == describe(real), operator


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple | list) else (outputs,)


def describe(t):
    """dtype, shape, and strides where they mean something: of more than one index."""
    strides = [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]
    return t.dtype, tuple(t.shape), strides if t.numel() else []


def check_repeats(case, threads, counts, dtype=torch.float32):
    """Bitwise the same every time, whatever the number of threads."""
    tensors = case.tensors(dtype)
    results = []
    for count in counts:
        threads(count)
        results.append(evaluate(case.fast, tensors))
    for result in results[1:]:
        assert_identical(result, results[0])


def check_results_stay(case):
    """No result lives in memory that a later call reuses."""
    tensors = case.tensors()
    results = evaluate(case.fast, tensors)
    copies = {name: t.clone() for name, t in results.items()}
    evaluate(case.fast, {name: t + 1 for name, t in tensors.items()})
    assert_identical(results, copies)


def check_poisoned(case, poisoned):
    """Nothing that was never written is read, and everything handed out is written."""
    tensors = case.tensors()
    want = evaluate(case.fast, tensors)
    with poisoned:
        got = evaluate(case.fast, tensors)
    assert not any(t.isnan().any() for t in got.values())
    assert_identical(got, want)


# Other layouts of the same map.
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.transpose(2, 3).contiguous(memory_format=torch.channels_last).mT,
    "channel_slice": lambda x: torch.cat([x, x, x], 1).contiguous(
        memory_format=torch.channels_last
    )[:, x.size(1) : 2 * x.size(1)],
    "slice_of_contiguous": lambda x: torch.cat([x, x], 1).contiguous()[:, x.size(1) :],
    "cropped": lambda x: torch.nn.functional.pad(x, (1, 2, 3, 1))[:, :, 3:-1, 1:-2],
    "every_other_channel": lambda x: x.repeat_interleave(2, 1)[:, ::2],
}
# Gradients as they come from sum(), mean over a dimension, and a broadcast sample.
EXPANSIONS = {
    "scalar": lambda x: x.new_ones(()).expand_as(x),
    "row": lambda x: random(*x.shape[:3], 1, dtype=x.dtype).expand_as(x),
    "sample": lambda x: random(1, *x.shape[1:], dtype=x.dtype).expand_as(x),
    "channel": lambda x: random(x.size(0), 1, *x.shape[2:], dtype=x.dtype).expand_as(x),
}


def check_input_layout(case, layout, budget=0):
    """The same from maps in another layout."""
    tensors = case.tensors()
    other = {k: LAYOUTS[layout](t) if k.startswith("y") else t for k, t in tensors.items()}
    assert_within(evaluate(case.fast, other), evaluate(case.fast, tensors), budget)


def check_gradient_layout(case, layout, budget=0):
    """The same from gradients in another layout."""
    tensors = case.tensors()
    if layout in LAYOUTS:
        dense, other = torch.randn_like, lambda x: LAYOUTS[layout](torch.randn_like(x))
    else:
        dense, other = (lambda x: EXPANSIONS[layout](x).contiguous()), EXPANSIONS[layout]
    results = []
    for cotangent in (dense, other):
        torch.manual_seed(0)
        results.append(evaluate(case.fast, tensors, cotangent))
    assert_within(*results, budget)
