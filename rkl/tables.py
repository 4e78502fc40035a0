"""The page of `rkl report`: the paper's tables beside ours, what each factor is worth, and what cannot be.

Every figure of ours is read from run records (:mod:`rkl.records`), every other one from published.yaml.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import figures
from .checkpoint import write_text
from .comparison import Estimate, f1_ceiling, impossible, verdict
from .experiments import FACTORS, TABLES, slug
from .records import Results, Run, load_results, published
from .report import exit_names, markdown_table

NEGLIGIBLE = 0.2
"""Percentage points of accuracy; a factor whose whole interval lies within this of zero does nothing."""


def write(folder: Path) -> Path:
    """Write report.md and its plots into a folder of `rkl experiments`; the page's path.

    Raises:
        RunError: no finished run there.
    """
    others = published()
    parts = ["# Experiments", _reading()]
    for results in load_results(folder):
        parts += _section(results, others, folder)
    parts += [_paper_check(others)]
    write_text(folder / "report.md", "\n\n".join(parts) + "\n")
    return folder / "report.md"


def _reading() -> str:
    return (
        "Ours: the mean over seeds ± half of the 95% t interval, n runs; last epoch, unless a column says best. A seed "
        "gives every row the same validation split and the same batches. The test images are looked at once a run, "
        "after training. Loss is the deepest head's NLL; the paper's adds all terms of the training loss for "
        "ResNet-KL, so it cannot be compared. † marks a figure of the paper that cannot be (last section). "
        "Public: what others report for the same model and data with their own recipe."
    )


def _section(results: Results, others: dict[str, Any], folder: Path) -> list[str]:
    name = f"{results.table}-{slug(results.data)}"
    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    figures.accuracy_curves(results, plots / f"{name}-curves.png")
    figures.accuracy_against_cost(results, plots / f"{name}-cost.png")
    shown = min(results.rows, key=lambda row: (row != "ResNet-KL", not row.startswith("ResNet-KL")), default="")
    figures.confusion(results, shown, plots / f"{name}-confusion.png")
    parts = [
        f"## {TABLES[results.table].title} on {results.data}",
        _setting(results),
        _quality(results, others),
        "### Cost",
        _cost(results),
    ]
    sentences = _verdicts(results)
    if sentences:
        parts += ["### What each factor is worth", sentences]
    parts += [
        "### Exits",
        _exits(results),
        "### Share of each loss term in the gradient",
        "L2 norm of each term's gradient with respect to the weights that remain after deployment, over the sum of the "
        "norms; at the last weights, mean over batches and seeds.",
        _gradient_shares(results),
        "### Plots",
        f"![Figure 4.1: validation accuracy by epoch](plots/{name}-curves.png)",
        f"![accuracy against parameters, MACs and latency](plots/{name}-cost.png)",
        "Rows of nearly equal cost are moved apart, to stand side by side; the table above has the figures.",
        f"![confusion matrix of {shown}](plots/{name}-confusion.png)",
    ]
    return parts


def _setting(results: Results) -> str:
    runs = [run for runs in results.rows.values() for run in runs]
    config, metrics = runs[0].config, runs[0].metrics
    images = "all" if config["train_size"] is None else f"a fixed {config['train_size']:,}"
    devices = ", ".join(sorted({run.metrics["device"] for run in runs}))
    augmented = "no other augmentation" if config["augment"] == "none" else "random crops and mirrors"
    return (
        f"Scale `{results.scale}`: width {config['width']}, {images} training images ({config['val_fraction']:.0%} of "
        f"them for validation), {metrics['test_images']:,} test images, epochs: {config['epochs']}, batch "
        f"{config['batch_size']}, lr {config['lr']:g} ({config['schedule']}), CutMix, {augmented}: the "
        f"same for every row but for what its name says. Trained on {devices}; {results.finished} of {results.planned} "
        "runs finished."
    )


def percent(value: Estimate, digits: int = 2, scale: float = 100) -> str:
    """An estimate as text: mean ± half interval."""
    mean = f"{scale * value.mean:.{digits}f}"
    return mean if value.half is None else f"{mean} ± {scale * value.half:.{digits}f}"


def _quality(results: Results, others: dict[str, Any]) -> str:
    paper = others["paper"].get(results.table, {"data": "", "rows": {}})
    public = others["public"].get(results.data, {"source": "none found", "rows": {}})
    of = f"paper ({paper['data']})"
    header = ["", "n"]
    for column in ("accuracy %", "recall %", "F1", "loss"):
        header += [*([of] if paper["rows"] else []), f"{column}, ours"]
    header += ["accuracy %, best epoch", "training total", "public accuracy %"]
    rows = []
    for row, runs in results.rows.items():
        printed = paper["rows"].get(row)
        marked = _impossible(printed) if printed else set()
        cells = [row, str(len(runs))]
        for key, digits, scale in (("accuracy", 2, 100.0), ("recall", 2, 100.0), ("f1", 3, 1.0), ("nll", 3, 1.0)):
            if paper["rows"]:
                mark = "†" if key in marked else ""
                cells.append(f"{printed['loss' if key == 'nll' else key]:g}{mark}" if printed else "-")
            cells.append(percent(results.over_seeds(row, lambda run, k=key: run.deepest[k]), digits, scale))
        cells += [
            percent(results.over_seeds(row, lambda run: run.metrics["best"]["test"][-1]["accuracy"])),
            percent(results.over_seeds(row, lambda run: run.metrics["training_loss"]["total"]), 2, 1),
            f"{public['rows'][row]:g}" if row in public["rows"] else "-",
        ]
        rows.append(cells)
    return f"{markdown_table(header, rows)}\n\nPublic figures: {public['source']}."


COSTS: dict[str, tuple[Callable[[Run], float], int, float]] = {
    "parameters in training": (lambda run: run.metrics["size"]["parameters"], 0, 1),
    "deployed": (lambda run: run.metrics["size"]["deployed_parameters"], 0, 1),
    "MACs an image": (lambda run: run.metrics["size"]["macs"], 0, 1),
    "latency, ms for 16": (lambda run: run.metrics["size"]["latency_ms"], 2, 1),
    "training, s": (lambda run: run.metrics["seconds"], 0, 1),
    "waiting for data, %": (lambda run: run.metrics["data_share"], 1, 100),
    "peak memory, MiB": (lambda run: run.metrics["peak_memory_bytes"] / 2**20, 0, 1),
}


def _cost(results: Results) -> str:
    rows = []
    for row in results.rows:
        cells = [row]
        for value, digits, scale in COSTS.values():
            cells.append(f"{scale * results.over_seeds(row, value).mean:,.{digits}f}")
        rows.append(cells)
    return (
        f"{markdown_table(['', *COSTS], rows)}\n\nMeans over the seeds. Latency is of the deployed network; "
        "latency and training time share the machine with whatever else ran on it. Peak memory is the process's, the "
        "data included."
    )


def _verdicts(results: Results) -> str:
    """One sentence a factor; the rows differ in that factor alone, so the difference is its doing."""
    lines = []
    for factor in FACTORS:
        change = results.difference(factor.row, factor.against, lambda run: 100 * run.deepest["accuracy"])
        if change is None:
            continue
        found = verdict(change, NEGLIGIBLE)
        words = f"not decided by {change.n} seed{'s' if change.n > 1 else ''}" if found == "not decided" else found
        interval = "" if change.half is None else f", 95% interval {change.low:+.2f} to {change.high:+.2f}"
        ratios = [
            f"{results.over_seeds(factor.row, COSTS[key][0]).mean / base.mean:.2f} times the {noun}"
            for key, noun in (("deployed", "deployed parameters"), ("MACs an image", "multiply-accumulates"))
            if (base := results.over_seeds(factor.against, COSTS[key][0])).mean
        ]
        lines.append(
            f"- **{factor.name}**: {words}. ({factor.row}) - ({factor.against}): {change.mean:+.2f} points{interval}, "
            f"n = {change.n}, with {' and '.join(ratios)}."
        )
    if not lines:
        return ""
    rule = (
        f"Paired differences in test accuracy. Helps or harms: the interval lies on one side of zero; does nothing: it "
        f"lies within {NEGLIGIBLE} points of zero; else not decided. The intervals are not corrected for their number."
    )
    return rule + "\n\n" + "\n".join(lines)


def _exits(results: Results) -> str:
    count = max(len(run.metrics["test"]) for runs in results.rows.values() for run in runs)
    rows = []
    for row, runs in results.rows.items():
        exits = len(runs[0].metrics["test"])
        cells = [
            percent(results.over_seeds(row, lambda run, i=i: run.metrics["test"][i]["accuracy"])) for i in range(exits)
        ]
        rows.append([row, *["-"] * (count - exits), *cells])
    return markdown_table(["test accuracy %", *exit_names(count)], rows)


def _gradient_shares(results: Results) -> str:
    terms = list(
        dict.fromkeys(term for runs in results.rows.values() for run in runs for term in run.gradients["shares"])
    )
    rows = []
    for row in results.rows:
        shares = [
            results.over_seeds(row, lambda run, t=term: run.gradients["shares"].get(t, 0.0)).mean for term in terms
        ]
        rows.append([row, *(f"{100 * share:.1f}" if share else "-" for share in shares)])
    return markdown_table(["%", *terms], rows)


def _impossible(printed: dict[str, float]) -> set[str]:
    return impossible(printed["accuracy"], printed["recall"], 100 * printed["f1"])


def _paper_check(others: dict[str, Any]) -> str:
    """What in the paper's tables and words cannot be, or contradicts itself."""
    rows = []
    for table, content in others["paper"].items():
        for row, printed in content["rows"].items():
            marked = _impossible(printed)
            recall, f1 = (f"{printed[key]:g}{'†' if key in marked else ''}" for key in ("recall", "f1"))
            ceiling = f"{f1_ceiling(printed['accuracy']) / 100:.3f}"
            rows.append([TABLES[table].title, row, f"{printed['accuracy']:g}", recall, f1, ceiling])
    header = ["table", "row", "accuracy % (= recall)", "recall %, printed", "F1, printed", "F1, at most"]
    lines = []
    for statement in others["statements"]:
        printed = others["paper"][statement["table"]]["rows"]
        ours, theirs = (printed[row][statement["column"]] for row in statement["rows"])
        title = TABLES[statement["table"]].title
        if abs(ours - theirs - statement["claimed"]) > 0.05:
            lines.append(f"- The paper says: {statement['claim']}; {title} has {ours - theirs:+.2f}.")
    return "\n\n".join(
        [
            "## † What cannot be in the paper",
            "The three test sets have equally many images of each class, so macro recall is accuracy, and macro F1 is "
            "at most 2A / (1 + A) of accuracy A.",
            markdown_table(header, rows),
            "\n".join(lines),
        ]
    )
