"""The README's bar plot: FastUNet's training step against eager PyTorch, time and memory; and of a
GPU's contests, everyone's time against eager PyTorch."""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .contest import EAGER, FASTUNET

COLORS = {"step time": "#2a6f97", "saved for backward": "#e09f3e"}
WIDTH = 0.38


def plot(results: Path, directory: Path) -> Path:
    """Draws the training steps of a result file into ``directory``; returns the image's path."""
    run = json.loads(results.read_text())
    steps = [case for case in run["results"] if case["phase"] == "step"]
    if not steps:
        raise ValueError(f"{results} has no training steps: measure with --filter networks")
    figure = Figure(figsize=(8, 0.7 * len(steps) + 1.6), layout="constrained")
    axes = figure.subplots()
    for i, case in enumerate(steps):
        for offset, (label, (ratio, interval)) in zip((-0.5, 0.5), bars(case).items(), strict=True):
            error = None if interval is None else [[ratio - interval[0]], [interval[1] - ratio]]
            y = i + offset * WIDTH
            axes.barh(
                y,
                ratio,
                WIDTH,
                xerr=error,
                color=COLORS[label],
                label=label if i == 0 else None,
                error_kw={"elinewidth": 1, "capsize": 2},
            )
            axes.text(0.015, y, f"{ratio:.2f}", va="center", color="white", fontsize=9)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(steps)), [case["name"] for case in steps])
    axes.invert_yaxis()
    axes.set_xlabel("FastUNet / eager PyTorch in its faster memory format (less is better)")
    hardware = run["hardware"]
    axes.set_title(
        f"Training step, {run['dtype']}, {hardware['gpu'] or hardware['cpu']}, "
        f"{run['threads']} CPU threads, torch {run['versions']['torch']}",
        fontsize=10,
    )
    axes.legend(loc="lower right", frameon=False, bbox_to_anchor=(1, 1.06), ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{results.stem}.png"
    figure.savefig(path, dpi=150)
    return path


def plot_contests(results: Path) -> Path:
    """Draws the ratios to eager PyTorch of every contender of a file, beside that file."""
    run = json.loads(results.read_text())
    ratios: dict[str, dict[str, float]] = {}  # contender -> case -> ratio
    for case in run["results"]:
        for name, contender in case["contenders"].items():
            if name not in EAGER:
                title = f"{case['name']} {case['phase']}"
                ratios.setdefault(name, {}).setdefault(title, contender["ratio"])
    cases = sorted({case for found in ratios.values() for case in found})
    figure = Figure(figsize=(9, 0.3 * len(cases) + 1.6), layout="constrained")
    axes = figure.subplots()
    for name, found in ratios.items():
        axes.plot(list(found.values()), [cases.index(case) for case in found], "o", label=name)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    axes.set_xlabel("time / eager PyTorch's in its faster memory format (less is better)")
    device = run["hardware"]["gpu"] or run["hardware"]["cpu"]
    axes.set_title(f"{device}, {run['dtype']}, torch {run['versions']['torch']}")
    axes.legend(fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    path = results.with_suffix(".png")
    figure.savefig(path, dpi=120)
    return path


def bars(case: dict[str, Any]) -> dict[str, tuple[float, list[float] | None]]:
    """(ratio, interval) by label."""
    fast = case["contenders"][FASTUNET]
    eager = case["contenders"][fast["baseline"]]
    time, memory = COLORS
    return {
        time: (fast["ratio"], fast["ratio_interval"]),
        memory: (fast["saved_bytes"] / eager["saved_bytes"], None),
    }
