"""The report's plots: figure 4.1, accuracy against cost, gradient shares, confusion."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..training.files import save_figure
from ..training.report import DOTTED, new_figure, plot_confusion, tidy
from .latency import Latency
from .records import Results, Run


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["tab10"](i) if count <= 10 else colormaps["tab20"](i % 20) for i in range(count)]


def accuracy_curves(results: Results, path: Path) -> None:
    """Plot figure 4.1 with one panel for each row: validation accuracy by epoch. The line is the mean over seeds, their
    range is shaded, and the first row's mean is grey.

    The paper plots test accuracy. Here the test images are looked at only once, at the end.
    """
    rows = {row: runs for row, runs in results.rows.items() if runs[0].epochs[0]["val"]}
    if not rows:
        return
    columns = min(4, len(rows))
    lines = math.ceil(len(rows) / columns)
    figure, grid = new_figure(3.2 * columns, 2.5 * lines, columns, lines)
    panels = grid.ravel() if hasattr(grid, "ravel") else [grid]
    reference = _validation(next(iter(rows.values())))
    for panel, (row, runs) in zip(panels, rows.items(), strict=False):
        epochs, lowest, mean, highest = _validation(runs)
        panel.plot(reference[0], reference[2], DOTTED, color="0.7", linewidth=1.2)
        panel.plot(epochs, mean, DOTTED, color="#31688e", linewidth=1.6)
        panel.fill_between(epochs, lowest, highest, color="#31688e", alpha=0.2)
        panel.set_title(f"{row} (n = {len(runs)})", fontsize=8)
        panel.xaxis.get_major_locator().set_params(integer=True)
        tidy(panel, legend=False)
    # The limits ignore the first third of the epochs: their climb would press the lines together.
    shown = [value for runs in rows.values() for curve in _validation(runs)[1:] for value in curve[len(curve) // 3 :]]
    for panel in panels:
        panel.set_ylim(min(shown) - 3, max(shown) + 2)
    for panel in panels[len(rows) :]:
        panel.set_visible(False)
    figure.supxlabel("epoch", fontsize=9)
    figure.supylabel("validation accuracy of the deepest head (%)", fontsize=9)
    figure.suptitle(f"{results.data}; grey: {next(iter(rows))}", fontsize=9)
    save_figure(figure, path)


def _validation(runs: list[Run]) -> tuple[list[int], list[float], list[float], list[float]]:
    """The epochs, and for each the lowest, mean and highest validation accuracy of the runs in percent."""
    length = min(len(run.epochs) for run in runs)
    values = [[100 * run.epochs[i]["val"][-1]["accuracy"] for run in runs] for i in range(length)]
    epochs = [entry["epoch"] for entry in runs[0].epochs[:length]]
    return epochs, [min(v) for v in values], [statistics.fmean(v) for v in values], [max(v) for v in values]


COSTS: dict[str, Callable[[Run], float]] = {
    "deployed parameters (millions)": lambda run: run.metrics["size"]["deployed_parameters"] / 1e6,
    "multiply-accumulates an image (millions)": lambda run: run.metrics["size"]["macs"] / 1e6,
}


def accuracy_against_cost(results: Results, latencies: dict[str, Latency], path: Path) -> None:
    """Plot test accuracy over parameters, multiply-accumulates and latency, with one numbered point for each row."""
    figure, panels = new_figure(15, 5, columns=3)
    colours = dict(zip(results.rows, _colours(len(results.rows)), strict=True))
    latency = {row: value.median for row, value in latencies.items()}
    axes = {
        name: {row: statistics.fmean(map(cost, runs)) for row, runs in results.rows.items()}
        for name, cost in COSTS.items()
    }
    axes["latency (ms a batch of 16)"] = latency
    for panel, (name, costs) in zip(panels, axes.items(), strict=True):
        for number, row in enumerate(results.rows, 1):
            if row not in costs:
                continue
            accuracy = results.over_seeds(row, lambda run: 100 * run.deepest["accuracy"])
            style = {
                "fmt": "o",
                "ms": 5,
                "color": colours[row],
                "capsize": 3,
                "label": f"{number} {row} (n = {accuracy.n})",
            }
            panel.errorbar(costs[row], accuracy.mean, accuracy.half, **style)
            above = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 8}
            panel.annotate(str(number), (costs[row], accuracy.mean), **above)
        panel.set(xlabel=name)
        if costs:
            _plain_log_axis(panel)
        tidy(panel, legend=False)
    panels[0].set_ylabel("test accuracy (%), 95% interval")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    save_figure(figure, path)


def _plain_log_axis(axes: Any) -> None:
    """Make the x axis logarithmic, with ticks at 1, 2, 5 and their labels as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_xlim()
    axes.set_xlim(low / 1.2, high * 1.2)


def confusion(results: Results, row: str, path: Path) -> None:
    """Plot a row's confusion matrix on the test images, with counts summed over its seeds."""
    runs = results.rows[row]
    matrices = [run.metrics["confusion"] for run in runs]
    counts = [[sum(values) for values in zip(*lines, strict=True)] for lines in zip(*matrices, strict=True)]
    plot_confusion(counts, runs[0].metrics["classes"], f"{row}: share of each true class (%)", path, shares=True)
