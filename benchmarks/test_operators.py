"""``pytest benchmarks``: the operator cases. Nothing timed is asserted; the gates are."""

import pytest

from .cases import matching
from .conftest import contests


@pytest.mark.parametrize(
    ("case", "gated", "contender"), contests(matching("^operators")), indirect=["gated"]
)
def test_operators(measure, case, gated, contender):
    measure(case, contender)
