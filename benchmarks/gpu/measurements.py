"""The stages that measure: this GPU's ceilings, operators, networks and their memory."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.contest import (
    AUTOTUNED,
    BUDGETED,
    CHANNELS_LAST,
    COMPILED,
    CONTIGUOUS,
    EAGER,
    FASTUNET,
    ORACLE,
    POLICIES,
    Case,
    Contender,
    GateError,
    Setting,
)
from benchmarks.network_cases import (
    CLASSES,
    GPU_NETWORKS,
    Network,
    data,
    network_case,
    network_cases,
)
from benchmarks.operator_cases import GPU_SHAPES, Shapes, operator_cases
from benchmarks.run import measure
from benchmarks.timing import quantile, seconds
from fastunet import FastUNet, bound
from fastunet.memory import format_size, measure_allocations, profile, saved_for_backward

from .job import Job

TRITON, CUDA, REFERENCE = (f"{FASTUNET} {name}" for name in ("triton", "cuda", "reference"))
# Who runs against both eager layouts, interleaved; all cases of one line before the next.
LINES = (
    (REFERENCE, CUDA, f"{TRITON} graph", TRITON),
    (TRITON, COMPILED),
    (TRITON, BUDGETED),
    (TRITON, AUTOTUNED),
)
MEMORY_NETWORKS = [network for network in GPU_NETWORKS if network.batch == 4]
MEMORY = (
    *(TRITON, f"{TRITON} light", f"{TRITON} full", CUDA),
    *(CONTIGUOUS, CHANNELS_LAST, f"{CHANNELS_LAST} full", COMPILED),
)
# What each way of running a network is called in fastunet.bound.
MODELS = {FASTUNET: "fused", "eager": "eager", COMPILED: "compile"}


def find_ceilings(device: str, n: int, copied: int) -> dict[str, float]:
    """Medians: FLOP/s of an n x n x n matrix product in each precision, with random data, and
    bytes/s of a copy of ``copied`` bytes within the device, read and written."""

    def median(work: Any) -> float:
        for _ in range(3):
            work()
        return quantile([seconds(work, 2, device) for _ in range(15)], 0.5)

    found = {}
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # TF32
    for name in ("bfloat16", "float16", "float32"):
        a, b = (torch.randn(n, n, device=device).to(getattr(torch, name)) for _ in range(2))
        found["tfloat32" if name == "float32" else name] = 2 * n**3 / median(lambda: a @ b)  # noqa: B023
    torch.set_float32_matmul_precision(before)
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    found["copy"] = 2 * copied / median(lambda: target.copy_(source))
    return found


def ceilings(job: Job, n: int = 8192, copied: int = 2**30) -> dict[str, float]:
    found = job.result["ceilings"] = find_ceilings(job.setting.device, n, copied)
    job.save()
    job.rows["ceilings"] = {
        f"{name}, {'TB/s' if name == 'copy' else 'TFLOP/s'}": f"{value / 1e12:.4g}"
        for name, value in found.items()
    }
    return found


# Of less traffic than so many L2 caches, a part is still there from the call before, and a copy's
# bandwidth is no ceiling.
LEAST_L2 = 4


def l2_bytes(device: str) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size if device == "cuda" else 0


class BrokenError(Exception):
    def __init__(self, contender: str, error: Exception):
        super().__init__(f"{type(error).__name__}: {error}")
        self.contender = contender


def contest(job: Job, case: Case, names: Sequence[str]) -> dict[str, Any] | None:
    """What ``measure`` finds; without those of ``names`` that fail or have wrong results."""

    def make(name: str, setting: Setting) -> Contender:
        try:
            contender = case.make(name, setting)
            if name != ORACLE:
                contender.run()
        except Exception as error:
            raise BrokenError(name, error) from error
        return contender

    names = [name for name in names if name not in EAGER]
    while names:
        try:
            setting = replace(job.setting, contenders=(*EAGER, *names))
            return measure(replace(case, make=make), setting, job.rounds, job.min_time)
        except (BrokenError, GateError) as error:
            job.fail(f"{case.id}/{error.contender}", error)
            if error.contender not in names:
                break
            names.remove(error.contender)
        job.synchronize()
    return None


def add(job: Job, found: dict[str, Any], limit: dict[str, float]) -> None:
    """A contest's rates, as fractions of the ceilings too, where they are ceilings; and its part of
    its case's row, whose rates are the last contender's."""
    title = f"{found['group'].removeprefix('operators/')}/{found['name']}/{found['phase']}"
    row = job.rows.setdefault(title, {"case": title})
    uncached = found["bytes"] is not None and (
        found["bytes"] >= LEAST_L2 * l2_bytes(job.setting.device)
    )
    for name, c in found["contenders"].items():
        c["flops_per_second"] = found["flops"] / c["median"]
        c["of_flops_ceiling"] = c["flops_per_second"] / limit["bfloat16"]
        if found["bytes"] is not None:
            c["bytes_per_second"] = found["bytes"] / c["median"]
        if uncached:
            c["of_copy_ceiling"] = c["bytes_per_second"] / limit["copy"]
        ratio = "" if name in EAGER else f" ({c['ratio']:.2f})"
        row.setdefault(name, f"{1e3 * c['median']:.3f}{ratio}")
    row.setdefault("TFLOP/s", f"{c['flops_per_second'] / 1e12:.0f} ({c['of_flops_ceiling']:.0%})")
    if found["bytes"] is not None:
        part = f"{c['of_copy_ceiling']:.0%}" if uncached else "cached"
        row["GB/s"] = f"{c['bytes_per_second'] / 1e9:.0f} ({part})"
    job.result["results"].append(found)


def operators(
    job: Job,
    shapes: Shapes = GPU_SHAPES,
    names: Sequence[str] = (REFERENCE, CUDA, TRITON),
    **sizes: int,
) -> None:
    """Each operator in the backends ``names``. GB/s count what a case reads and its results, once
    each; eager PyTorch moves more."""
    job.result["shapes"] = shapes._asdict()
    job.result["l2_bytes"] = l2_bytes(job.setting.device)
    limit = ceilings(job, **sizes)
    for case in operator_cases(shapes):

        def work(case: Case = case) -> None:
            if found := contest(job, case, names):
                add(job, found, limit)

        job.do(case.id, "operator", work)


def networks(
    job: Job,
    chosen: Sequence[Network] = tuple(GPU_NETWORKS),
    lines: Sequence[Sequence[str]] = LINES,
    **sizes: int,
) -> None:
    """Inference and training steps, and the least time they can take (fastunet.bound)."""
    limit = ceilings(job, **sizes)
    of_bound = bound.Ceilings(limit["bfloat16"], limit["copy"])
    job.result["bounds"] = {n.name: bound.report(counted(n), of_bound)["models"] for n in chosen}
    for names in lines:
        for case in network_cases(chosen):
            if BUDGETED in names and case.phase == "forward":
                continue  # it decides what is kept for backward

            def work(case: Case = case, names: Sequence[str] = names) -> None:
                if found := contest(job, case, names):
                    add(job, found, limit)

            job.do(f"{case.id}/{names[-1]}", names[-1], work)


def counted(network: Network) -> bound.Network:
    n, b = network, bound.Network
    return b(3, CLASSES, n.bilinear, n.base, batch=n.batch, height=n.height, width=n.width)


def memory(
    job: Job,
    chosen: Sequence[Network] = tuple(MEMORY_NETWORKS),
    names: Sequence[str] = MEMORY,
) -> None:
    """The peak of a training step, parameters and their gradients included, and what it saves."""
    for network in chosen:
        for name in names:

            def work(network: Network = network, name: str = name) -> None:
                found = footprint(job, network, name)
                about = {"network": network.name, "contender": name}
                job.result["results"].append({**about, **found})
                sizes = {
                    f"{key}, MiB": "" if value is None else f"{value / 2**20:.1f}"
                    for key, value in found.items()
                }
                job.rows[f"{network.name} {name}"] = {**about, **sizes}

            job.do(f"networks/{network.name}/step/{name}", name, work)

        def predict(network: Network = network) -> None:
            check_prediction(job, network)

        job.do(f"networks/{network.name}/step/predicted", "predicted", predict)


# By which a predicted peak may differ from the allocator's, cuDNN's workspace included.
PREDICTION_ERROR = 0.05


def check_prediction(job: Job, network: Network) -> None:
    """Every policy's peak as fastunet.memory.profile predicts it, against the allocator's."""
    device = job.setting.device
    shape = (network.batch, 3, network.height, network.width)
    snapshot = job.path.parent / f"memory-{network.name}.pickle" if device == "cuda" else None
    model = network.build(FastUNet).to(device)
    assert isinstance(model, FastUNet)
    report = profile(model, shape, dtype=job.setting.dtype, measure=True, snapshot=snapshot)
    wrong = []
    for run in report.runs:
        assert run.measured is not None
        about = {"network": network.name, "contender": f"predicted {run.name}"}
        figures = {"peak": run.measured, "predicted": run.peak}
        job.result["results"].append({**about, **figures, "at_peak": run.at_peak.nbytes})
        sizes = {f"{key}, MiB": f"{value / 2**20:.1f}" for key, value in figures.items()}
        job.rows[" ".join(about.values())] = {**about, **sizes}
        if run.cost is not None and abs(run.peak / run.measured - 1) > PREDICTION_ERROR:
            wrong.append(
                f"{run.name}: {format_size(run.peak)} predicted, {format_size(run.measured)} found"
            )
    if wrong:
        raise GateError("; ".join(wrong))


def footprint(job: Job, network: Network, name: str) -> dict[str, int | None]:
    """In bytes. peak: above what there was before the model; step: before the step. predicted: of
    what is saved, by fastunet.bound."""
    device = job.setting.device
    data(network, device)  # shared: there from now on
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    contender = network_case(network, "step").make(name, job.setting)
    for _ in range(3):
        contender.run()
    step = measure_allocations(contender.run, device).peak_bytes
    peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else step
    assert contender.record is not None
    saved = saved_for_backward(contender.record, contender.parameters)
    predicted = None
    if not any(policy in name.split() for policy in POLICIES):
        model = MODELS[name.split()[0]]
        predicted = sum(layer.saved(model) for layer in counted(network).layers())
    return {"peak": peak, "step": step, "saved": saved, "predicted": predicted}
