"""``pytest benchmarks``: the network cases. Nothing timed is asserted; the gates are."""

import pytest

from .cases import matching
from .conftest import contests


@pytest.mark.parametrize(
    ("case", "gated", "contender"), contests(matching("^networks")), indirect=["gated"]
)
def test_networks(measure, case, gated, contender):
    measure(case, contender)
