"""The page of one run: report.md and its plots, made only from the run's own records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from .files import RunError, read_lines, read_record, resuming, save_figure, understood, write_text

EXIT_METRICS = {"accuracy": "accuracy", "recall": "macro recall", "f1": "macro F1", "nll": "NLL", "ece": "ECE"}


def exit_names(count: int) -> list[str]:
    """The exits' names in tables and plots, shallow to deep."""
    return ["output"] if count == 1 else [*(f"exit {i}" for i in range(1, count)), f"exit {count} (deepest)"]


def read_metrics(folder: Path) -> dict[str, Any]:
    """The run's metrics.json."""
    file = folder / "metrics.json"
    try:
        return read_record(file)
    except FileNotFoundError:
        raise RunError(
            f"{file}: a finished run must have one, got no such file; finish it by {resuming(folder)}"
        ) from None


def exit_rows(exits: list[dict[str, float]]) -> list[list[str]]:
    """One row for each exit: its name, percentages with two digits, NLL and ECE with four."""
    rows = []
    for name, values in zip(exit_names(len(exits)), exits, strict=True):
        digits = [
            f"{values[key]:.4f}" if key in ("nll", "ece") else f"{100 * values[key]:.2f}%" for key in EXIT_METRICS
        ]
        rows.append([name, *digits])
    return rows


def size_rows(record: dict[str, Any]) -> list[list[str]]:
    """Parameters (training, deployed), multiply-accumulates for one image and latency, before and after each cut."""
    rows = []
    states = [
        (f"epoch {cut['epoch']}, {when} the cut", cut[when]) for cut in record["cuts"] for when in ("before", "after")
    ]
    for name, size in [*states, ("end of training", record["size"])]:
        latency = f"{size['latency_ms']:.2f} ms for {size['latency_batch']}"
        accuracy = f"{size['val_accuracy']:.2%}" if "val_accuracy" in size else "-"
        if size is record["size"] and record["val"]:
            accuracy = f"{record['val'][-1]['accuracy']:.2%}"
        counts = [f"{size[key]:,}" for key in ("parameters", "deployed_parameters", "macs")]
        rows.append([name, *counts, latency, accuracy])
    return rows


SIZE_HEADER = ["", "parameters in training", "deployed", "MACs an image", "latency (deployed)", "validation accuracy"]


def rich_table(title: str, header: list[str], rows: list[list[str]]) -> Table:
    """A table for the terminal, with numbers aligned to the right. Brackets in texts are not read as markup."""
    table = Table(title=Text(title))
    for i, column in enumerate(header):
        table.add_column(Text(column), justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def rich_tables(record: dict[str, Any]) -> list[Table]:
    """The two tables that a run prints at its end."""
    images = f"{record['test_images']} test images, epoch {record['epoch']}"
    title = f"{record['model']} on {record['data']}: {images}"
    return [
        rich_table(title, ["", *EXIT_METRICS.values()], exit_rows(record["test"])),
        rich_table("before and after the cuts" if record["cuts"] else "size", SIZE_HEADER, size_rows(record)),
    ]


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_report(folder: Path) -> Path:
    """Write report.md and its plots into the run's folder, and return the page's path."""
    record, rows = read_metrics(folder), read_lines(folder / "log.jsonl")
    if not rows:
        raise RunError(
            f"{folder / 'log.jsonl'}: a run's log must have its epochs, got none; copy it from the run that was trained"
        )
    with understood(folder / "metrics.json", "a run's record"):
        page = _page(record)
    plots = folder / "plots"
    with understood(folder / "log.jsonl", "a run's log, one line an epoch"):
        _plot_curves(rows, record, plots / "curves.png")
    with understood(folder / "metrics.json", "a run's record"):
        title = "Confusion matrix, deepest head"
        plot_confusion(record["confusion"], record["classes"], title, plots / "confusion.png")
    write_text(folder / "report.md", page)
    return folder / "report.md"


def _page(record: dict[str, Any]) -> str:
    return f"""# {record["model"]} on {record["data"]}, seed {record["seed"]}

{record["test_images"]} test images, looked at once, with the model of epoch {record["epoch"]}: the {record["tested"]}
one, as the configuration said beforehand ({record["test_looked_at"]}).

{markdown_table(["", *EXIT_METRICS.values()], exit_rows(record["test"]))}

{_training_words(record)}

## Size

{markdown_table(SIZE_HEADER, size_rows(record))}

Trained in {record["seconds"]:.0f} s on {record["device"]} ({record["precision"]}), {record["data_share"]:.1%} of it
making batches; at most {record["peak_memory_bytes"] / 2**20:.0f} MiB held.

## Training

![validation accuracy of each exit and the loss terms, by epoch](plots/curves.png)

![confusion matrix of the deepest head on the test images](plots/confusion.png)
"""


def _training_words(record: dict[str, Any]) -> str:
    """Sentences on the best epoch and on the loss terms of the last epoch."""
    loss, best = record["training_loss"], record["best"]
    words = []
    if best:
        words.append(
            f"The best epoch by validation since the last cut was {best['epoch']}, with {best['accuracy']:.2%} of the "
            "validation images right."
        )
    terms = ", ".join(f"{name} {value:.4f}" for name, value in loss.items() if name != "total")
    words.append(
        "The loss to compare with other models is the deepest head's NLL above; the training total of the last epoch, "
        f"all terms added, was {loss['total']:.4f}: {terms}."
    )
    return "\n".join(words)


def new_figure(width: float, height: float, columns: int = 1, rows: int = 1):  # type: ignore[no-untyped-def]
    """A figure and its axes, without pyplot: the figure needs no display and no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


DOTTED = ".-"
"""The style of curves over epochs. With dots, a curve of one epoch is visible too."""


def tidy(axes, legend: bool = True) -> None:  # type: ignore[no-untyped-def]
    """Give axes a light grid, no box, and the legend beside the plot rather than over its lines."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _plot_curves(rows: list[dict[str, Any]], record: dict[str, Any], path: Path) -> None:
    from matplotlib import colormaps

    figure, (left, right) = new_figure(13, 4.2, columns=2)
    epochs = [row["epoch"] for row in rows]
    names = exit_names(len(rows[0]["val"])) if rows[0]["val"] else []
    shades = colormaps["viridis"]([0.85 - 0.75 * i / max(1, len(names) - 1) for i in range(len(names))])
    for number, name in reversed(list(enumerate(names))):
        accuracy = [100 * row["val"][number]["accuracy"] for row in rows]
        left.plot(epochs, accuracy, DOTTED, color=shades[number], linewidth=1.8, label=name)
    left.set(xlabel="epoch", ylabel="validation accuracy (%)", title="Accuracy of each exit")
    if names:
        final = [100 * row["val"][i]["accuracy"] for row in rows[len(rows) // 3 :] for i in range(len(names))]
        left.set_ylim(max(0.0, min(final) - 15), 100.5)
    drawn = [name for name in rows[0]["losses"] if any(row["losses"][name] > 0 for row in rows)]
    for name in drawn:
        style = {"color": "black", "linewidth": 2.0} if name == "total" else {"linewidth": 1.3}
        right.plot(epochs, [row["losses"][name] for row in rows], DOTTED, label=name, **style)
    right.set(xlabel="epoch", ylabel="training loss", title="Terms of the training loss")
    right.set_yscale("log", nonpositive="mask")  # L1 is zero after the last cut
    for axes in (left, right):
        for i, cut in enumerate(record["cuts"]):
            axes.axvline(cut["epoch"] + 0.5, color="grey", linestyle=":", label=None if i else "channels cut")
        axes.xaxis.get_major_locator().set_params(integer=True)
        tidy(axes)
    save_figure(figure, path)


def plot_confusion(counts: list[list[int]], classes: list[str], title: str, path: Path, shares: bool = False) -> None:
    """Draw a confusion matrix with true classes as rows, coloured by the share of each true class. ``shares`` prints
    the shares in percent instead of the counts. From 26 classes on there are only colours."""
    side = min(12.0, max(5.0, 0.5 * len(classes) + 2))
    figure, axes = new_figure(side, side)
    share = [[value / max(1, sum(row)) for value in row] for row in counts]
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(title, parse_math=False)  # a name may have dollar signs
    if len(classes) <= 25:
        long = max(map(len, classes)) > 2
        turn = {"rotation": 40, "ha": "right"} if long else {}
        axes.set_xticks(range(len(classes)), classes, parse_math=False, **turn)
        axes.set_yticks(range(len(classes)), classes, parse_math=False)
        for i, row in enumerate(counts):
            for j, count in enumerate(row):
                value = round(100 * share[i][j]) if shares else count
                if value:
                    colour = "white" if share[i][j] > 0.5 else "black"
                    axes.text(j, i, str(value), ha="center", va="center", color=colour, fontsize=8)
    save_figure(figure, path)
