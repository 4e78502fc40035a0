"""Checkpoints without pickle, and run folders. Tensors are in safetensors, the rest in a JSON file beside it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, FiniteFloat, PositiveInt, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typing_extensions import Required, TypedDict

from rkl_kernels.errors import first_line

from ..config import Config, is_other_run, read_yaml, to_plain
from ..network.build import build_model
from ..slimming.channels import Plan, apply_plan, channel_plan
from .files import RunError, read_json, replacing, understood, write_text

__all__ = ["Run", "RunError", "example_image", "load", "open_run", "save", "start_from"]


class Size(TypedDict):
    """What the cuts to come need of a model's size."""

    macs: int


class Cut(TypedDict):
    """A cut of the run."""

    epoch: int
    before: Size
    after: Size


class Best(TypedDict):
    """The best epoch by validation since the last cut."""

    epoch: int
    accuracy: float


class Facts(TypedDict, total=False):
    """The types of a checkpoint's JSON entries, of which not all are required. ``tensors`` names the file beside it."""

    config: dict[str, Any]
    classes: Annotated[list[str], Field(min_length=1)]
    channels: Literal[1, 3]
    image_size: Annotated[int, Field(ge=8, le=2**14)]
    mean: list[FiniteFloat]
    std: list[FiniteFloat]
    fingerprint: dict[str, str]
    epoch: Required[Annotated[int, Field(ge=0)]]
    cuts: list[Cut]
    best: Best | None
    scaler: dict[str, float]
    plan: dict[str, Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]]
    tensors: Required[Annotated[str, Field(pattern=r"^[\w-]+\.safetensors$")]]
    sha256: Required[str]


@cache
def _facts_checker() -> TypeAdapter[Facts]:
    return TypeAdapter(Facts)


def save(folder: Path, name: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Save a checkpoint as ``name``. The JSON file names the tensors' file and is written last. So ``name`` is either
    the old checkpoint or the new one, whatever interrupts the call."""
    file = f"{name}-{facts['epoch']:04d}.safetensors"
    with replacing(folder / file) as partial:
        try:
            save_file({key: value.detach().contiguous().cpu() for key, value in tensors.items()}, partial)
        except SafetensorError as error:  # raised where the disk is full
            raise OSError(str(error)) from error
    facts = facts | {"tensors": file}
    write_text(folder / f"{name}.json", json.dumps(facts | {"sha256": digest(facts, folder / file)}, indent=1))
    for stale in folder.glob(f"{name}-*.safetensors"):
        if stale.name != file:
            stale.unlink()


def digest(facts: dict[str, Any], file: Path) -> str:
    """SHA-256 of a checkpoint's facts and its file of tensors. It detects a change of any bit in either."""
    sha = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    with file.open("rb") as content:
        while part := content.read(2**20):
            sha.update(part)
    return sha.hexdigest()


def load(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of the checkpoint ``name``. If a run saves it anew meanwhile, the newest one is loaded.

    Raises:
        RunError: no such checkpoint, or one that differs in any bit from what was saved.
    """
    record = folder / f"{name}.json"
    while True:
        before = _version(record)
        try:
            return _load(folder, record)
        except RunError:
            if _version(record) == before:
                raise


def _version(file: Path) -> tuple[int, int] | None:
    """A key that changes whenever a file is replaced as a whole; None where the file has no status."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _load(folder: Path, record: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """:func:`load` of the files as they are."""
    try:
        facts = read_json(record, "a checkpoint's JSON record")
        with understood(record, "a checkpoint's JSON record"):
            _facts_checker().validate_python(facts, strict=True)
        file, saved = folder / facts["tensors"], facts.pop("sha256")
        tensors = load_file(file)
        now = digest(facts, file)
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise RunError(f"{error.filename or record}: a checkpoint must be there, got {reason}") from error
    except SafetensorError as error:
        raise RunError(f"{file}: must be a whole safetensors file, got: {error}") from error
    if now != saved:
        raise RunError(f"{file}: must be the tensors saved with {record.name}, got a change in one of the two files")
    return tensors, facts


def with_newer_best(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The last checkpoint's facts, with the best epoch of the best checkpoint if that is newer: the run was killed
    between the two saves. The best model is then that one, even if the epoch, trained again, comes out worse."""
    record = folder / "best.json"
    if not record.exists():
        return facts
    with understood(record, "a checkpoint's JSON record"):
        best = read_json(record, "a checkpoint's JSON record")
        return facts | {"best": best["best"]} if best["epoch"] > facts["epoch"] else facts


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix``, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def restore_model(model: nn.Module, tensors: dict[str, Tensor], plan: Plan, source: Path, assign: bool = False) -> None:
    """Give the model the checkpoint's channels and values. With ``assign`` the tensors are not copied."""
    try:
        apply_plan(model, plan)
        for name, value in model.state_dict().items():
            if name in tensors and tensors[name].dtype != value.dtype:
                raise ValueError(f"{name} is {tensors[name].dtype} in place of {value.dtype}")
        model.load_state_dict(tensors, assign=assign)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"{source}: must be a checkpoint of this run's model, got another: {reason}") from error


@dataclass
class Run:
    """A finished or interrupted run: its configuration, its model (in eval mode), and facts on the training data.

    Attributes:
        facts: epoch, classes, channels, image_size, mean, std and the plan of channels.
    """

    folder: Path
    config: Config
    model: nn.Module
    facts: dict[str, Any]

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.model.parameters()).device


def open_run(folder: Path, checkpoint: str = "last", device: torch.device | str = "cpu") -> Run:
    """Load a run's model from its folder onto a device.

    Raises:
        RunError: no run in the folder, or its checkpoint is missing, damaged or of another model.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        raise RunError(f"{folder}: must be the folder of a run, got one without config.yaml")
    config = read_yaml(file)
    source = folder / "checkpoints" / f"{checkpoint}.json"
    tensors, facts = load(folder / "checkpoints", checkpoint)
    with understood(source, "a whole run's checkpoint"):
        plan, shape = facts["plan"], (len(facts["classes"]), facts["channels"], facts["image_size"])
        if not len(facts["mean"]) == len(facts["std"]) == facts["channels"]:
            raise ValueError(f"mean and std of {len(facts['mean'])} and {len(facts['std'])} channels")
    check_settings(config, facts, source)
    # The model takes no memory before its shapes are known to match the tensors.
    try:
        with torch.device("meta"):
            model = build_model(config, *shape)
    except (RuntimeError, ValueError) as error:
        raise RunError(f"{file}: must be of a model that can be built, got: {first_line(error)}") from error
    prefix = "ema." if any(key.startswith("ema.") for key in tensors) else "model."
    restore_model(model, part(tensors, prefix), plan, source, assign=True)
    return Run(folder, config, model.eval().to(device), facts)


def check_settings(config: Config, facts: dict[str, Any], source: Path) -> None:
    """Raise RunError unless the checkpoint at ``source`` is of a run with the settings of ``config``. The file that
    ``config`` was read from may have been changed since."""
    with understood(source, "a whole run's checkpoint"):
        then = facts["config"]
    for key, value in to_plain(config).items():
        if is_other_run(key, then.get(key, value), value):
            got = f"got {key} {then[key]!r} for {value!r} in config.yaml; put {then[key]!r} back there"
            raise RunError(f"{source}: must be a checkpoint of this run's model, {got}")


def example_image(run: Run) -> Tensor:
    """One blank image (1, C, H, W) of the run's shape, on its model's device."""
    return torch.zeros(1, run.facts["channels"], *2 * [run.facts["image_size"]], device=run.device)


def start_from(model: nn.Module, folder: Path, width: int, channels: int, classes: list[str]) -> nn.Module:
    """``model`` with the last weights of another run of the same network, ``width`` and ``channels`` of images, and
    pruned like that run. If its classes are not ``classes``, the layers that output classes keep their own weights.

    Raises:
        RunError: no such run, or a run of another network.
    """
    tensors, facts = load(folder / "checkpoints", "last")
    source = folder / "checkpoints" / "last.json"
    with understood(source, "a whole run's checkpoint"):
        then, of_images = facts["config"]["width"], facts["channels"]
        others, its_plan = facts["classes"], facts["plan"]
    if then != width:  # another width would pass for a pruned model
        raise RunError(f"{source}: weights must be of a network of the same width, got {then} for width {width}")
    if of_images != channels:  # so would these
        raise RunError(f"{source}: weights must be of images of {channels} channels, as the data has, got {of_images}")
    plan = channel_plan(model)
    own = {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and others != classes}
    counts = [len(others), len(classes)]
    heads = {name for name in own if [its_plan.get(name, [0, 0])[1], plan[name][1]] == counts}
    wanted = its_plan | {name: [its_plan[name][0], plan[name][1]] for name in heads}
    given = part(tensors, "ema." if any(key.startswith("ema.") for key in tensors) else "model.")
    kept = {key: value for key, value in given.items() if key.rpartition(".")[0] not in heads}
    try:
        apply_plan(model, wanted)
    except ValueError as error:
        raise RunError(f"{source}: weights must be of this configuration's model, got another: {error}") from error
    restore_model(model, model.state_dict() | kept, channel_plan(model), source)
    return model
