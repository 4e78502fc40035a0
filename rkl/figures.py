"""The report's plots: figure 4.1, accuracy against cost, gradient shares, confusion."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .records import Results, Run
from .report import new_figure, plot_confusion, tidy


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["tab10"](i) if count <= 10 else colormaps["tab20"](i % 20) for i in range(count)]


def accuracy_curves(results: Results, path: Path) -> None:
    """Figure 4.1: validation accuracy by epoch, the mean over seeds, with the range of the seeds shaded.

    The paper plots test accuracy; here the test images are looked at once, at the end.
    """
    figure, axes = new_figure(9.5, 5)
    for colour, (row, runs) in zip(_colours(len(results.rows)), results.rows.items(), strict=True):
        length = min(len(run.epochs) for run in runs)
        epochs = [entry["epoch"] for entry in runs[0].epochs[:length]]
        values = [[100 * run.epochs[i]["val"][-1]["accuracy"] for run in runs] for i in range(length)]
        style = {"color": colour, "marker": "o", "markersize": 3}
        axes.plot(epochs, [statistics.fmean(v) for v in values], linewidth=1.6, label=row, **style)
        axes.fill_between(epochs, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.12)
    axes.set(xlabel="epoch", ylabel="validation accuracy of the deepest head (%)", title=_title(results))
    # From a third of the way on; the first epochs' climb would press the lines together.
    shown = [
        100 * entry["val"][-1]["accuracy"]
        for runs in results.rows.values()
        for run in runs
        for entry in run.epochs[len(run.epochs) // 3 :]
    ]
    axes.set_ylim(min(shown) - 3, max(shown) + 2)
    axes.xaxis.get_major_locator().set_params(integer=True)
    tidy(axes)
    figure.savefig(path)


def _title(results: Results) -> str:
    seeds = max(len(runs) for runs in results.rows.values())
    return f"{results.data}, {seeds} seed{'s' if seeds > 1 else ''}"


COSTS: dict[str, Callable[[Run], float]] = {
    "deployed parameters (millions)": lambda run: run.metrics["size"]["deployed_parameters"] / 1e6,
    "multiply-accumulates an image (millions)": lambda run: run.metrics["size"]["macs"] / 1e6,
    "latency (ms a batch of 16)": lambda run: run.metrics["size"]["latency_ms"],
}


def accuracy_against_cost(results: Results, path: Path) -> None:
    """Test accuracy against parameters, multiply-accumulates and latency, one numbered point a row; rows of nearly
    equal cost stand side by side, so that each has its bar and number to itself."""
    figure, panels = new_figure(15, 5, columns=3)
    colours = _colours(len(results.rows))
    accuracies = [results.over_seeds(row, lambda run: 100 * run.deepest["accuracy"]) for row in results.rows]
    for panel, (name, cost) in zip(panels, COSTS.items(), strict=True):
        costs = [statistics.fmean(cost(run) for run in runs) for runs in results.rows.values()]
        for number, (row, x, accuracy) in enumerate(zip(results.rows, _apart(costs), accuracies, strict=True), 1):
            label, half = f"{number} {row}", accuracy.half or 0.0
            panel.errorbar(
                x, accuracy.mean, accuracy.half, fmt="o", ms=5, color=colours[number - 1], capsize=3, label=label
            )
            above = {"xytext": (0, 4), "textcoords": "offset points", "fontsize": 9, "ha": "center"}
            panel.annotate(str(number), (x, accuracy.mean + half), **above)
        panel.set(xlabel=name)
        _plain_log_axis(panel)
        tidy(panel, legend=False)
    panels[0].set_ylabel("test accuracy (%), 95% interval")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path)


def _apart(costs: list[float]) -> list[float]:
    """Places on a logarithmic axis, moved no further than keeps neighbours a fraction of the axis apart."""
    logs = [math.log10(cost) for cost in costs]
    return [10**place for place in spread(logs, 0.042 * max(max(logs) - min(logs), 0.3))]


def spread(values: list[float], gap: float) -> list[float]:
    """Values moved apart, as little as possible in the square, until neighbours are ``gap`` apart; the order stays."""
    order = sorted(range(len(values)), key=values.__getitem__)
    blocks: list[list[float]] = []  # of values that touch: the sum of their places less their distance, and their count
    for position, index in enumerate(order):
        blocks.append([values[index] - position * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] >= blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    places = [total / count for total, count in blocks for _ in range(int(count))]
    moved = {index: place + position * gap for position, (index, place) in enumerate(zip(order, places, strict=True))}
    return [moved[index] for index in range(len(values))]


def _plain_log_axis(axes: Any) -> None:
    """Logarithmic, with ticks at 1, 2, 5 and written as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_xlim()
    axes.set_xlim(low / 1.2, high * 1.2)


def confusion(results: Results, row: str, path: Path) -> None:
    """A row's confusion matrix on the test images, counts summed over its seeds."""
    runs = results.rows[row]
    matrices = [run.metrics["confusion"] for run in runs]
    counts = [[sum(values) for values in zip(*lines, strict=True)] for lines in zip(*matrices, strict=True)]
    plot_confusion(counts, runs[0].metrics["classes"], f"{row}: share of each true class (%)", path, shares=True)
