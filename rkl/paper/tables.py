"""The page of `rkl report`: the paper's tables and ours, what each factor is worth, and impossible figures.

Our figures are read from run records (:mod:`rkl.paper.records`), all others from published.yaml.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..training.files import check_writable, write_text
from ..training.report import exit_names, markdown_table
from . import figures
from .comparison import Estimate, Judged, f1_ceiling, holm, impossible, smallest_decidable
from .experiments import data_slug
from .latency import Latency, measure
from .records import APART, Results, Run, load_results, published
from .rows import FACTORS, ROWS, TABLES, Factor

NEGLIGIBLE = 0.2
"""Percentage points of accuracy. A factor does nothing if its whole interval lies within this distance of zero."""


def write(folder: Path) -> Path:
    """Write report.md and its plots into a folder of `rkl experiments`, and return the page's path.

    Raises:
        RunError: no finished run in the folder.
    """
    others, found = published(), load_results(folder)
    check_writable(folder / "report.md")  # before the latencies are measured, which takes long
    latencies = measure(found)
    headlines: dict[tuple[str, str], str] = {}
    for results, own in zip(found, latencies, strict=True):
        # If several tables on the same data can judge a claim, the first of them does.
        headlines = _headlines(results, own) | headlines
    ordered = sorted(headlines, key=lambda key: [factor.name for factor in FACTORS].index(key[0]))
    parts = ["# Experiments", "\n".join(headlines[key] for key in ordered), _reading(found)]
    for results, own in zip(found, latencies, strict=True):
        parts += _section(results, own, others, folder)
    parts += [_paper_check(others)]
    write_text(folder / "report.md", "\n\n".join(parts) + "\n")
    return folder / "report.md"


TESTED = {"last": "the last epoch's", "best": "the best epoch's by validation"}


def _reading(found: list[Results]) -> str:
    tested = {run.metrics.get("tested", "last") for results in found for runs in results.rows.values() for run in runs}
    named = " or ".join(words for name, words in TESTED.items() if name in tested)
    return (
        "Ours: the mean over seeds ± half of the 95% t interval, n runs. A seed gives every row the same validation "
        "split, the same batches and, in layers that rows share, the same initial values. The test images are looked "
        f"at once a run, after training, with the model named beforehand ({named}). Loss is the deepest head's "
        "NLL. Latencies are measured when this page is written."
    )


def _section(results: Results, latencies: dict[str, Latency], others: dict[str, Any], folder: Path) -> list[str]:
    name = f"{results.table}-{data_slug(results.data)}"
    plots = folder / "plots"
    figures.accuracy_curves(results, plots / f"{name}-curves.png")
    figures.accuracy_against_cost(results, latencies, plots / f"{name}-cost.png")
    shown = max(results.rows, key=lambda row: results.over_seeds(row, _accuracy).mean)
    figures.confusion(results, shown, plots / f"{name}-confusion.png")
    parts = [
        f"## {TABLES[results.table].title} on {results.data}, {_seeds(results)}",
        _setting(results),
        _quality(results, others),
        "### Cost",
        _cost(results, latencies),
    ]
    sentences = _verdicts(results, latencies)
    if sentences:
        parts += ["### What each factor is worth", sentences]
    if results.table in others["paper"]:
        parts += ["### The paper's figures", _paper_table(results, others)]
    parts += [
        "### Exits",
        _exits(results),
        "### Share of each loss term in the gradient",
        "L2 norm of each term's gradient with respect to the weights that remain after deployment, over the sum of the "
        "norms; at the last weights, mean over batches and seeds. L1 as it was before the last cut.",
        _gradient_shares(results),
        "### Plots",
    ]
    curves = f"![Figure 4.1: validation accuracy by epoch](plots/{name}-curves.png)"
    return [
        *parts,
        *([curves] if (plots / f"{name}-curves.png").exists() else []),
        f"![accuracy against parameters, MACs and latency](plots/{name}-cost.png)",
        f"![confusion matrix of {shown}, the best row](plots/{name}-confusion.png)",
    ]


def _accuracy(run: Run) -> float:
    return 100 * run.deepest["accuracy"]


def _seeds(results: Results) -> str:
    """The number of runs of a row, for the title."""
    counts = sorted({len(runs) for runs in results.rows.values()})
    return f"n = {counts[0]}" + (f" to {counts[-1]}" if len(counts) > 1 else "") + " a row"


def _own_settings(row: str) -> tuple[bool, int]:
    """A key by which the row with the fewest settings of its own is the smallest. A fitted width is one."""
    own = ROWS.get(row)
    return (True, 0) if own is None else (own.macs_of is not None, len(own.settings))


def _setting(results: Results) -> str:
    runs = [run for runs in results.rows.values() for run in runs]
    (first, *_) = results.rows[min(results.rows, key=_own_settings)]
    config, metrics = first.config, first.metrics
    images = "all" if config["train_size"] is None else f"a fixed {config['train_size']:,}"
    devices = ", ".join(sorted({run.metrics["device"] for run in runs}))
    augmented = {
        "none": "no random crops",
        "standard": "random crops, mirrored where the classes allow it",
        "trivial": "random crops, mirrored where the classes allow it, TrivialAugment",
    }[config["augment"]]
    mixed = "CutMix" if config["cutmix"] else "no CutMix"
    return (
        f"Scale `{results.scale}`: width {config['width']}, {images} training images ({config['val_fraction']:.0%} of "
        f"them for validation), {metrics['test_images']:,} test images, epochs: {config['epochs']}, batch "
        f"{config['batch_size']}, lr {config['lr']:g} ({config['schedule']}), {mixed}, {augmented}: the "
        f"same for every row but for what its name says. Trained on {devices}; {results.finished} of {results.planned} "
        "runs finished."
    )


def percent(value: Estimate, digits: int = 2, scale: float = 100) -> str:
    """An estimate as text: mean ± half of the interval."""
    mean = f"{scale * value.mean:.{digits}f}"
    return mean if value.half is None else f"{mean} ± {scale * value.half:.{digits}f}"


def _deepest(key: str) -> Callable[[Run], float]:
    return lambda run: run.deepest[key]


def _exit_accuracy(number: int) -> Callable[[Run], float]:
    return lambda run: run.metrics["test"][number]["accuracy"]


def _gradient_share(term: str) -> Callable[[Run], float]:
    return lambda run: run.gradients["shares"].get(term, 0.0)


def _quality(results: Results, others: dict[str, Any]) -> str:
    public = others["public"].get(results.data, {"source": "none found", "rows": {}})
    header = ["", "n", "accuracy %", "recall %", "F1", "loss", "ECE", "training total", "public accuracy %"]
    rows = []
    for row, runs in results.rows.items():
        cells = [row, str(len(runs))]
        for key, digits, scale in (
            ("accuracy", 2, 100),
            ("recall", 2, 100),
            ("f1", 3, 1),
            ("nll", 3, 1),
            ("ece", 3, 1),
        ):
            cells.append(percent(results.over_seeds(row, _deepest(key)), digits, scale))
        total = percent(results.over_seeds(row, lambda run: run.metrics["training_loss"]["total"]), 2, 1)
        cells += [total, f"{public['rows'][row]:g}" if row in public["rows"] else "-"]
        rows.append(cells)
    return f"{markdown_table(header, rows)}\n\nPublic figures, others' with their own recipes: {public['source']}."


def _paper_table(results: Results, others: dict[str, Any]) -> str:
    """The figures that the paper prints for the rows, with our accuracy in the last column."""
    paper = others["paper"][results.table]
    rows = []
    for row, printed in paper["rows"].items():
        marked = _impossible(printed)
        recall, f1 = (f"{printed[key]:g}{'†' if key in marked else ''}" for key in ("recall", "f1"))
        ours = percent(results.over_seeds(row, lambda run: run.deepest["accuracy"])) if row in results.rows else "-"
        rows.append([row, f"{printed['accuracy']:g}", recall, f1, f"{printed['loss']:g}", ours])
    header = ["", "accuracy %", "recall %", "F1", "loss", f"accuracy %, ours on {results.data}"]
    return (
        f"On {paper['data']}. † cannot be (last section). The paper's loss adds all terms for ResNet-KL: not to be "
        f"compared.\n\n{markdown_table(header, rows)}"
    )


COSTS: dict[str, tuple[Callable[[Run], float], int, float]] = {
    "parameters in training": (lambda run: run.metrics["size"]["parameters"], 0, 1),
    "deployed": (lambda run: run.metrics["size"]["deployed_parameters"], 0, 1),
    "MACs an image": (lambda run: run.metrics["size"]["macs"], 0, 1),
    "training, s": (lambda run: run.metrics["seconds"], 0, 1),
    "making batches, %": (lambda run: run.metrics["data_share"], 1, 100),
    "peak memory, MiB": (lambda run: run.metrics["peak_memory_bytes"] / 2**20, 0, 1),
}


def _cost(results: Results, latencies: dict[str, Latency]) -> str:
    rows = []
    for row in results.rows:
        cells = [row]
        for value, digits, scale in COSTS.values():
            cells.append(f"{scale * results.over_seeds(row, value).mean:,.{digits}f}")
        rows.append([*cells, str(latencies[row]) if row in latencies else "-"])
    apart = any(not results.together(*pair) for pair in itertools.combinations(results.rows, 2))
    far = (
        f" Some rows are not known to have run within {APART.days} days of others: those training times do not compare."
    )
    return (
        f"{markdown_table(['', *COSTS, 'latency, ms for 16'], rows)}\n\nMeans over the seeds. Latency is of the "
        "deployed network, norms folded and shallow heads gone, on images of its run's size, median and quartiles of "
        "15 passes, the rows in turns when this page was written; training time shared the machine with whatever else "
        "ran on it. Peak memory is of the process of a run that held most, the data included."
        f"{far if apart else ''}"
    )


def _compared(results: Results) -> list[tuple[Factor, Judged]]:
    """The factors whose two rows the table has, judged together."""
    found = [(factor, results.difference(factor.row, factor.against, _accuracy)) for factor in FACTORS]
    there = [(factor, change) for factor, change in found if change is not None]
    judged = holm([change for _, change in there], NEGLIGIBLE)
    return [(factor, own) for (factor, _), own in zip(there, judged, strict=True)]


def _words(judged: Judged) -> tuple[str, str]:
    """A difference's verdict and interval, as text."""
    n = judged.difference.n
    found = f"not decided by {n} seed{'s' if n > 1 else ''}" if judged.verdict == "not decided" else judged.verdict
    if judged.difference.error is None:
        return found, f"{judged.difference.mean:+.2f} points"
    return found, f"{judged.difference.mean:+.2f} points, corrected interval {judged.low:+.2f} to {judged.high:+.2f}"


def _ratios(results: Results, latencies: dict[str, Latency], factor: Factor) -> str:
    """The costs of a factor's row, divided by those of the row that it is compared with."""
    ratios = []
    for key, noun in (
        ("deployed", "deployed parameters"),
        ("MACs an image", "multiply-accumulates"),
        ("training, s", "training time"),
    ):
        own, base = (results.over_seeds(row, COSTS[key][0]).mean for row in (factor.row, factor.against))
        if key == "training, s" and not results.together(factor.row, factor.against):
            ratios.append("training times not compared")
        elif base:
            ratios.append(f"{own / base:.2f} of the {noun}")
    if factor.row in latencies and factor.against in latencies:
        ratios.append(f"{latencies[factor.row].median / latencies[factor.against].median:.2f} of the latency")
    return ", ".join(ratios)


def _headlines(results: Results, latencies: dict[str, Latency]) -> dict[tuple[str, str], str]:
    """One line for each claim that was named before the runs (verdict, interval and cost), by claim and data."""
    lines = {}
    for factor, judged in _compared(results):
        if factor.headline:
            verdict, interval = _words(judged)
            where = f"{TABLES[results.table].title} on {results.data}, {results.scale}"
            cost = _ratios(results, latencies, factor)
            lines[factor.name, results.data] = f"- **{factor.name}** ({where}): {verdict}; {interval}; {cost}."
    return lines


def _verdicts(results: Results, latencies: dict[str, Latency]) -> str:
    """One sentence for each factor. The two rows differ only in the factor, or have equal compute."""
    compared = _compared(results)
    if not compared:
        return ""
    rule = (
        "Paired differences in test accuracy, judged together by Holm's method: does nothing where the corrected "
        f"interval lies within {NEGLIGIBLE} points of zero, whatever the p; else helps or harms where the corrected p "
        "is below 0.05; else not decided."
    )
    limits = smallest_decidable([judged.difference for _, judged in compared])
    if limits:
        deviation, effect, n = limits
        rule += (
            f" At the median paired standard deviation, {deviation:.2f} points, {n} seeds decide {effect:.2f} points "
            f"and more, with {len(compared)} comparisons."
        )
    lines = []
    for factor, judged in compared:
        verdict, interval = _words(judged)
        p = "" if judged.difference.error is None else f", corrected p {judged.p:.3f}"
        lines.append(
            f"- **{factor.name}**: {verdict}. ({factor.row}) - ({factor.against}): {interval}{p}, "
            f"n = {judged.difference.n}, with {_ratios(results, latencies, factor)}."
        )
    return rule + "\n\n" + "\n".join(lines)


def _trained_exits(run: Run) -> list[bool]:
    """Which exits were trained. Shallow heads with weight 0 in the loss still have their random initial values."""
    count = len(run.metrics["test"])
    return [run.config["loss"]["heads"] > 0] * (count - 1) + [True]


def _exits(results: Results) -> str:
    count = max(len(run.metrics["test"]) for runs in results.rows.values() for run in runs)
    rows = []
    for row, runs in results.rows.items():
        exits = len(runs[0].metrics["test"])
        cells = [
            percent(results.over_seeds(row, _exit_accuracy(i))) if trained else "-"
            for i, trained in zip(range(exits), _trained_exits(runs[0]), strict=True)
        ]
        rows.append([row, *["-"] * (count - exits), *cells])
    return markdown_table(["test accuracy %", *exit_names(count)], rows)


def _gradient_shares(results: Results) -> str:
    terms = list(
        dict.fromkeys(term for runs in results.rows.values() for run in runs for term in run.gradients["shares"])
    )
    rows = []
    for row in results.rows:
        shares = [results.over_seeds(row, _gradient_share(term)).mean for term in terms]
        rows.append([row, *(f"{100 * share:.1f}" if share else "-" for share in shares)])
    return markdown_table(["%", *terms], rows)


def _impossible(printed: dict[str, float]) -> set[str]:
    return impossible(printed["accuracy"], printed["recall"], 100 * printed["f1"])


def _paper_check(others: dict[str, Any]) -> str:
    """What is impossible in the paper's tables, and where its text contradicts them."""
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
