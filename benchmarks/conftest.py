"""What both pytest front ends share."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .contest import Case, Gated, Setting, gate, memory

# Our defaults for pytest-benchmark's own, so that the whole takes minutes; flags come first.
DEFAULTS = {"--benchmark-max-time": ("benchmark_max_time", 0.2),
            "--benchmark-min-rounds": ("benchmark_min_rounds", 3)}  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="cpu, or cuda (bf16 autocast)")


def pytest_configure(config: pytest.Config) -> None:
    for flag, (option, value) in DEFAULTS.items():
        if not any(str(arg).startswith(flag) for arg in config.invocation_params.args):
            setattr(config.option, option, value)


@pytest.fixture(scope="session")
def setting(pytestconfig: pytest.Config) -> Setting:
    device = pytestconfig.getoption("--device", default="cpu")
    return Setting(device, torch.float32 if device == "cpu" else torch.bfloat16)


@pytest.fixture(scope="module")
def gated(request: pytest.FixtureRequest, setting: Setting) -> Gated:
    """A case's contenders after its gate; pytest keeps them while tests ask for the same case."""
    return gate(request.param, setting)


@pytest.fixture
def measure(benchmark: BenchmarkFixture, gated: Gated, setting: Setting):
    """Times one contender, with memory in extra_info."""

    def run(case: Case, name: str) -> None:
        contender = gated.contenders[name]
        benchmark.group = case.id
        benchmark.name = name
        benchmark.extra_info.update(phase=case.phase, error=gated.errors[name])
        if not benchmark.disabled:
            benchmark.extra_info.update(memory(contender, setting.device))

        def synchronized() -> None:
            contender.run()
            torch.cuda.synchronize()

        benchmark(contender.run if setting.device == "cpu" else synchronized)

    return run


def contests(cases: list[Case]) -> list:
    """The parameters ("case", "gated", "contender") of a front end's test."""
    return [
        pytest.param(case, case, name, id=f"{case.id}/{name}".replace(" ", "_"))
        for case in cases
        for name in case.contenders(Setting())
    ]
