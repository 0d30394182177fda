"""A sample of a test's parameters for `make test`; `make test-all` runs the rest as well."""

import pytest


def sampled(values, sample):
    """All values as parameters, marked slow but for those in the sample."""
    values, sample = list(values), list(sample)
    assert all(v in values for v in sample), "a sample is of what there is"
    return [pytest.param(v, marks=() if v in sample else pytest.mark.slow) for v in values]
