"""Deployment formats: torch.export with this package's operators, ONNX with standard ones. Each file is checked."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

import rkl_kernels as rk

from ..network.deployed import deployed
from ..training.checkpoint import Run, example_image
from ..training.files import check_writable, replacing

FORMATS = {"torch": "model.pt2", "onnx": "model.onnx"}


def export(run: Run, format: str, out: Path | None = None) -> tuple[Path, float]:
    """Write a run's deployed model in one format, for any batch size.

    Args:
        format: "torch" (torch.export; to load it, import ``rkl_kernels``, which has its operators) or "onnx".
        out: folder to write to; by default the run's folder.

    Returns:
        The file, and the largest difference between its outputs and the model's, relative to the largest output.

    Raises:
        ValueError: an unknown format, a file that cannot be written, or outputs that differ by more than 1e-4.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    file = (out or run.folder) / FORMATS[format]
    check_writable(file)
    model = deployed(run.model)
    image = torch.randn(3, *example_image(run).shape[1:], generator=torch.Generator().manual_seed(0)).to(run.device)
    with replacing(file) as partial:
        # Full float32 on a GPU too: with TF32's three digits the check could not see small errors.
        with torch.backends.cudnn.flags(allow_tf32=False), torch.no_grad():
            got = {"torch": _torch, "onnx": _onnx}[format](model, image, partial).to(run.device)
            wanted = run.model(image)
        difference = float((got - wanted).abs().max() / wanted.abs().max())
        if not difference <= 1e-4:
            raise ValueError(f"{file}: outputs must equal the model's to 1e-4, got a difference of {difference:.1e}")
    return file, difference


def _torch(model: nn.Module, image: Tensor, file: Path) -> Tensor:
    """Write the file, read it back and return its outputs, for one image more than in the export: any batch must do."""
    program = torch.export.export(model, (image[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with file.open("wb") as written:  # given a path, torch.export.save would demand its own suffix
        torch.export.save(program, written)
    with file.open("rb") as read:
        return torch.export.load(read).module()(image)


def _onnx(model: nn.Module, image: Tensor, file: Path) -> Tensor:
    """As :func:`_torch`, with ONNX Runtime. The reference path is exported: it has only PyTorch's own operators."""
    import onnxruntime

    with rk.use_backend("reference"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated", FutureWarning)  # of PyTorch's own code
        program = torch.onnx.export(
            model,
            (image[:2],),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    assert program is not None  # with dynamo=True there is a program
    program.save(str(file), external_data=False)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: image.cpu().numpy()})
    return torch.from_numpy(logits)
