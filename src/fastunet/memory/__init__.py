"""How much memory a step takes, how little it can take, and where it goes. All figures in bytes."""

from fastunet.maps import kept_map_memory, release_map_memory

from .budget import available, format_size, parse_size
from .counters import Allocations, measure_allocations, saved_for_backward
from .pictures import draw
from .planning import BudgetError, MemoryPlan, fit, plan
from .report import MemoryReport, profile

__all__ = [
    "Allocations",
    "BudgetError",
    "MemoryPlan",
    "MemoryReport",
    "available",
    "draw",
    "fit",
    "format_size",
    "kept_map_memory",
    "measure_allocations",
    "parse_size",
    "plan",
    "profile",
    "release_map_memory",
    "saved_for_backward",
]
