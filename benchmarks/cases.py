"""The registry: every case that ``pytest benchmarks`` and ``python -m benchmarks.run`` measure."""

import re
from collections.abc import Iterable

from .contest import Case
from .network_cases import network_cases
from .operator_cases import operator_cases

CASES: list[Case] = [*operator_cases(), *network_cases()]


def matching(pattern: str = "", cases: Iterable[Case] = CASES) -> list[Case]:
    """The cases whose id (``group/name/phase``) a regular expression finds a match in."""
    return [case for case in cases if re.search(pattern, case.id)]
