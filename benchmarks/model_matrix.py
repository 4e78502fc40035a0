"""Which layers of published models are swapped and fused, what is left and why, and how exact the results are.

    python -m benchmarks.model_matrix [--out docs/models.md]
    python -m benchmarks.model_matrix --only NAME --out FILE

The models are all of torchvision's classifiers and one of each timm family, where they have depthwise layers, and 40
others of timm, drawn by seed. A model that fails counts among the 40. The models have random weights and run on small
images. Results are compared with float64: the output in inference, and all gradients of the mean of its squares. A
value within rounding of an activation's kink may get the derivative of the other side, in PyTorch's layers as in ours,
and that changes every gradient before it. So each figure is the median of three batches.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

import rkl_kernels as rk
from rkl.training.files import check_writable, write_text
from rkl_kernels.errors import told

from .arguments import check_only, positive, writing

PAGE = Path(__file__).parents[1] / "docs/models.md"
BATCH, SIZE, BATCHES = 2, 64, 3
DRAWN, LARGEST_DRAWN = 40, 30.0  # models; millions of parameters of the largest
TIMM = [
    "mobilenetv1_100",
    "mobilenetv2_100",
    "mobilenetv3_small_050",
    "tf_mobilenetv3_small_minimal_100",
    "mobilenetv4_conv_small",
    "efficientnet_b0",
    "tf_efficientnet_lite0",
    "mnasnet_small",
    "fbnetc_100",
    "hardcorenas_a",
    "tinynet_e",
    "lcnet_050",
    "mixnet_s",
    "rexnet_100",
    "ghostnet_050",
    "repghostnet_050",
    "mobileone_s0",
    "repvit_m0_9",
    "fastvit_t8",
    "legacy_xception",
    "xception41",
    "convnext_atto",
    "convmixer_768_32",
    "edgenext_xx_small",
    "mobilevit_xxs",
    "mobilevitv2_050",
    "efficientvit_b0",
    "starnet_s050",
    "coat_tiny",
    "pvt_v2_b0",
]


@dataclass
class Row:
    """One model.

    Attributes:
        depthwise, swapped: the number of depthwise convolutions, and of those that ``convert`` swapped.
        chains, layers: the number of chains that ``fuse_for_inference`` fused, and of layers in them.
        left: why depthwise convolutions are in no chain, with the number of them for each reason.
        errors: by "PyTorch", "converted" and "fused", the errors of the output and, where there are any, of the
            gradients. An error is the largest difference from float64, as a share of the largest value.
    """

    name: str
    size: int
    depthwise: int = 0
    swapped: int = 0
    chains: int = 0
    layers: int = 0
    left: Counter[str] = field(default_factory=Counter)
    errors: dict[str, tuple[float, float | None]] = field(default_factory=dict)


def candidates() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Names and builders of models, from the libraries that are installed."""
    try:
        import torchvision

        for name in torchvision.models.list_models(module=torchvision.models):
            yield f"torchvision {name}", lambda name=name: torchvision.models.get_model(name, weights=None)
    except ImportError:
        pass
    try:
        import timm

        for name in TIMM:
            yield f"timm {name}", lambda name=name: timm.create_model(name)
    except ImportError:
        pass


def others() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """All of timm's other models, in an order drawn by seed."""
    try:
        import timm
    except ImportError:
        return
    names = sorted(set(timm.list_models()) - set(TIMM))
    random.Random(0).shuffle(names)
    for name in names:
        yield f"timm {name}", lambda name=name: timm.create_model(name)


def outline(build: Callable[[], nn.Module]) -> tuple[int, float]:
    """The number of depthwise layers, and millions of parameters. No parameter is made where that can be avoided."""
    try:
        with torch.device("meta"):
            model = build()
    except NotImplementedError:  # the model reads values while it is built
        model = build()
    return _depthwise(model), sum(p.numel() for p in model.parameters()) / 1e6


def _depthwise(model: nn.Module) -> int:
    return sum(isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1 for m in model.modules())


def examine(name: str, build: Callable[[], nn.Module]) -> Row:
    """Build the model, let its batch statistics settle on some images, and compare."""
    torch.manual_seed(0)
    model = build()
    size = _size(model)
    row = Row(name, size, _depthwise(model))
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(8, 3, size, size))
    model.eval()
    batches = torch.randn(BATCHES, BATCH, 3, size, size)
    exact_model = copy.deepcopy(model).double()
    exact = [_results(exact_model, x.double()) for x in batches]
    row.errors["PyTorch"] = _errors([_results(model, x) for x in batches], exact)
    fused = rk.fuse_for_inference(model)
    report = fused.fusion_report
    row.chains, row.layers = len(report.fused), sum(map(len, report.fused))
    row.left = Counter(why.rpartition(": ")[2] if why.startswith("in ") else why for why in report.left.values())
    with torch.no_grad():
        row.errors["fused"] = _middle_error([fused(x) for x in batches], [output for output, _ in exact]), None
    row.swapped = len(rk.convert(model).depthwise)
    row.errors["converted"] = _errors([_results(model, x) for x in batches], exact)
    return row


def _size(model: nn.Module) -> int:
    """The small size where the model takes it, else 224."""
    model.eval()
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, SIZE, SIZE))
    except Exception:  # models raise various errors for a size that they do not take
        return 224
    return SIZE


def _results(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and all gradients in one vector."""
    model.zero_grad()
    y = model(x)
    y.square().mean().backward()
    return y.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _errors(got: list[tuple[Tensor, Tensor]], want: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    outputs, gradients = (_middle_error([g[i] for g in got], [w[i] for w in want]) for i in (0, 1))
    return outputs, gradients


def _middle_error(got: list[Tensor], want: list[Tensor]) -> float:
    return median(float((g.double() - w).abs().max() / w.abs().max()) for g, w in zip(got, want, strict=True))


def introduction(names: Collection[str], failed: Collection[str]) -> list[str]:
    """What the page says before its table.

    Args:
        names: the models in the table.
        failed: the models below it.
    """
    ran, not_run = (sum(_is_drawn(name) for name in some) for some in (names, failed))
    return [
        "# Models",
        "",
        "This page lists models with depthwise layers. It shows how many of these layers `rk.convert` swaps, and how",
        "many chains of layers `rk.fuse_for_inference` fuses. `python -m benchmarks.model_matrix` writes it.",
        "",
        "The models are torchvision's classifiers, one model of each timm family, and others of timm that are drawn by",
        f"seed, of up to {LARGEST_DRAWN:.0f} million parameters. {ran + not_run} were drawn, and {ran} of them ran.",
        "Models that did not run are named at the end.",
        "",
        f"Weights are random. A model gets {BATCH} images of the size given, on a CPU, in float32. An error is the",
        "largest difference from float64, as a share of the largest value. There is one for the output and one for all",
        "gradients. A value within rounding of an activation's kink may get the derivative of the other side, and that",
        f"changes all gradients before it. So each error is the middle one of {BATCHES} batches.",
        "",
    ]


def _is_drawn(name: str) -> bool:
    library, _, model = name.partition(" ")
    return library == "timm" and model not in TIMM


def table(rows: list[Row], failed: dict[str, str]) -> str:
    lines = [
        *introduction([row.name for row in rows], failed),
        "| model | size | depthwise | swapped | chains (layers) | output: PyTorch, converted, fused "
        "| gradients: PyTorch, converted |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        outputs = ", ".join(f"{row.errors[key][0]:.1e}" for key in ("PyTorch", "converted", "fused"))
        gradients = ", ".join(f"{row.errors[key][1]:.1e}" for key in ("PyTorch", "converted"))
        counts = f"{row.depthwise} | {row.swapped} | {row.chains} ({row.layers})"
        lines.append(f"| {row.name} | {row.size} | {counts} | {outputs} | {gradients} |")
    lines += ["", "Depthwise layers in no fused chain, and why:", ""]
    lines += [
        f"- {row.name}: " + "; ".join(f"{n} x {why}" for why, n in row.left.most_common()) for row in rows if row.left
    ]
    if failed:
        lines += ["", "Not run:", "", *(f"- {name}: {why}" for name, why in failed.items())]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model_matrix", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only models whose name contains this")
    parser.add_argument("--largest", type=positive, default=60, help="largest model to run, in millions of parameters")
    parser.add_argument("--out", type=Path, help="the page to write; docs/models.md by default")
    options = parser.parse_args(arguments)
    if options.only and not options.out:
        parser.error(
            f"--only must have --out: {PAGE} is of all models, got --only {options.only!r} alone; add --out FILE"
        )
    page: Path = options.out or PAGE
    with writing(parser):
        check_writable(page)
    if options.only:
        check_only(parser, options.only, (name for name, _ in chain(candidates(), others())))
    warnings.filterwarnings("ignore")
    rows: list[Row] = []
    failed: dict[str, str] = {}

    def run(name: str, build: Callable[[], nn.Module], largest: float) -> bool:
        """Examine the model if it has depthwise layers and at most ``largest`` million parameters.

        Returns:
            Whether it was examined, or failed.
        """
        try:
            depthwise, millions = outline(build)
            if depthwise and millions > largest:
                if largest == options.largest:
                    failed[name] = f"{millions:.0f} million parameters, more than {largest:.0f}"
                return False
            if depthwise:
                rows.append(examine(name, build))
                print(name, rows[-1].errors, flush=True)
        except Exception as problem:  # a model that fails must not cost the others their rows
            depthwise = 1
            failed[name] = told(problem)
            print(name, failed[name], flush=True)
        with writing(parser):
            write_text(page, table(rows, failed))
        return depthwise > 0

    for name, build in candidates():
        if options.only in name:
            run(name, build, options.largest)
    drawn = 0
    for name, build in others():
        if options.only in name and drawn < DRAWN:
            drawn += run(name, build, LARGEST_DRAWN)
    return 0


if __name__ == "__main__":
    sys.exit(main())
