"""Pictures of a memory report: stacked timelines, and memory against work."""

from pathlib import Path
from typing import TYPE_CHECKING

from .ledger import BACKWARD, CATEGORIES
from .report import EAGER, MemoryReport, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIB = 2**20
COLORS = dict(
    zip(
        CATEGORIES,
        ("#6c757d", "#adb5bd", "#dee2e6", "#e09f3e", "#2a6f97", "#7fb069", "#c1666b"),
        strict=True,
    )
)


def draw(report: MemoryReport, directory: Path) -> list[Path]:
    """Writes ``memory-timeline.png`` and ``memory-against-work.png``; returns their paths.

    Raises:
        RuntimeError: where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RuntimeError("pictures need matplotlib: pip install matplotlib") from None
    directory.mkdir(parents=True, exist_ok=True)
    title = f"{'x'.join(map(str, report.shape))}, {report.dtype}, {report.device}"

    figure = Figure(figsize=(10, 2.1 * len(report.runs)), layout="constrained")
    every = figure.subplots(len(report.runs), 1, sharey=True)
    for axes, run in zip(every, report.runs, strict=True):
        stack(axes, run)
    every[0].legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    every[-1].set_xlabel("operator by operator, forward, then backward")
    figure.suptitle(f"A training step's memory, MiB: {title}", fontsize=11)
    timeline = directory / "memory-timeline.png"
    figure.savefig(timeline, dpi=130)

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    against_work(figure.subplots(), report)
    figure.suptitle(f"Memory against work done again: {title}", fontsize=11)
    against = directory / "memory-against-work.png"
    figure.savefig(against, dpi=130)
    return [timeline, against]


def stack(axes: "Axes", run: Run) -> None:
    moments = run.timeline
    columns = [[m.nbytes[c] / MIB for m in moments] for c in CATEGORIES]
    axes.stackplot(
        range(len(moments)),
        columns,
        labels=CATEGORIES,
        colors=[COLORS[c] for c in CATEGORIES],
        step="mid",
    )
    axes.axhline(run.peak / MIB, color="black", linewidth=0.8, linestyle=":")
    turn = next(i for i, m in enumerate(moments) if m.phase == BACKWARD)
    axes.axvline(turn, color="black", linewidth=0.8)
    axes.set_title(f"{run.name}: {run.peak / MIB:.0f} MiB", fontsize=9, loc="left")
    axes.set_xlim(0, len(moments) - 1)
    axes.set_xticks([])
    axes.spines[["top", "right"]].set_visible(False)


def against_work(axes: "Axes", report: MemoryReport) -> None:
    peaks, work = zip(*report.choices, strict=True)
    axes.step([100 * w for w in work], [p / MIB for p in peaks], where="post", color="#2a6f97",
              label="plans: the least memory for the work")  # fmt: skip
    for run in report.runs:
        if run.cost is not None:
            axes.plot(100 * run.cost, run.peak / MIB, "o", color="#c1666b")
            axes.annotate(run.name, (100 * run.cost, run.peak / MIB), (4, 4),
                          textcoords="offset points", fontsize=9)  # fmt: skip
    eager = next(run for run in report.runs if run.name == EAGER)
    axes.axhline(
        eager.peak / MIB, color="black", linewidth=0.8, linestyle=":", label="eager PyTorch"
    )
    if report.budget is not None:
        axes.axhline(report.budget / MIB, color="#e09f3e", linewidth=1, label="the budget")
    axes.set_xlabel("work done again, % of a step's FLOPs and memory traffic")
    axes.set_ylabel("peak of the step, MiB")
    axes.set_ylim(0)
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
