"""Checkpoints without pickle: tensors in safetensors, the rest in the JSON file beside it; and run folders."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config import Config, read_yaml
from ..network.build import build_model
from ..slimming import pruning


class RunError(ValueError):
    """A run folder or checkpoint that cannot be used; the message is one line that names the file and the rule."""


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def save(folder: Path, name: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Save a checkpoint as ``name``; the JSON file names its tensors' file and is written last, so that whatever
    interrupts this, ``name`` is either the old checkpoint or the new one."""
    folder.mkdir(parents=True, exist_ok=True)
    file = f"{name}-{facts['epoch']:04d}.safetensors"
    partial = folder / f".{file}.partial"
    save_file({key: value.detach().contiguous().cpu() for key, value in tensors.items()}, partial)
    os.replace(partial, folder / file)
    write_text(folder / f"{name}.json", json.dumps(facts | {"tensors": file}, indent=1))
    for stale in folder.glob(f"{name}-*.safetensors"):
        if stale.name != file:
            stale.unlink()


def load(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of the checkpoint ``name``."""
    record = folder / f"{name}.json"
    try:
        facts = json.loads(record.read_text())
        return load_file(folder / facts["tensors"]), facts
    except FileNotFoundError as error:
        raise RunError(f"{error.filename or record}: a checkpoint must be there, got no such file") from error
    except (json.JSONDecodeError, KeyError) as error:
        raise RunError(f"{record}: must be a checkpoint's JSON record, got a damaged one ({error})") from error
    except SafetensorError as error:
        raise RunError(f"{folder / facts['tensors']}: must be a whole safetensors file, got: {error}") from error


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def restore_model(model: nn.Module, tensors: dict[str, Tensor], plan: pruning.Plan, source: Path) -> None:
    """Give the model the checkpoint's channels and values."""
    try:
        pruning.apply_plan(model, plan)
        model.load_state_dict(tensors)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"{source}: must be a checkpoint of this run's model, got another: {reason}") from error


@dataclass
class Run:
    """A finished or interrupted run: its configuration, the model (in eval mode), and what it was trained on.

    Attributes:
        facts: epoch, classes, channels, image_size, mean, std and the plan of channels.
    """

    folder: Path
    config: Config
    model: nn.Module
    facts: dict[str, Any]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device


def open_run(folder: Path, checkpoint: str = "last", device: torch.device | str = "cpu") -> Run:
    """Load a run's model from its folder onto a device.

    Raises:
        RunError: no run there, or its checkpoint is missing, damaged or of another model.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        raise RunError(f"{folder}: must be the folder of a run, got one without config.yaml")
    config = read_yaml(file)
    tensors, facts = load(folder / "checkpoints", checkpoint)
    model = build_model(config, len(facts["classes"]), facts["channels"], facts["image_size"])
    prefix = "ema." if any(key.startswith("ema.") for key in tensors) else "model."
    restore_model(model, part(tensors, prefix), facts["plan"], folder / "checkpoints" / f"{checkpoint}.json")
    return Run(folder, config, model.eval().to(device), facts)


def example_image(run: Run) -> Tensor:
    """One blank image of the run's shape, where its model is."""
    return torch.zeros(1, run.facts["channels"], *2 * [run.facts["image_size"]], device=run.device)


def check_classes(run: Run, classes: list[str]) -> None:
    """Raise RunError unless data have the run's own classes, in its order, which is what its outputs mean."""
    for number, (ours, theirs) in enumerate(zip_longest(run.facts["classes"], classes)):
        if ours != theirs:
            raise RunError(
                f"{run.folder}: data must have the classes the run was trained on, got {theirs!r} for {ours!r}, "
                f"number {number + 1}"
            )


def start_from(model: nn.Module, folder: Path) -> nn.Module:
    """``model`` with the last weights of another run of the same network, pruned as that is; layers that give other
    numbers of classes keep their own.

    Raises:
        RunError: no such run, or one of another network.
    """
    tensors, facts = load(folder / "checkpoints", "last")
    source = folder / "checkpoints" / "last.json"
    plan, classes = pruning.channel_plan(model), len(facts["classes"])
    own = {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    heads = {name for name in own if facts["plan"].get(name, [0, 0])[1] == classes != plan[name][1]}
    wanted = facts["plan"] | {name: [facts["plan"][name][0], plan[name][1]] for name in heads}
    given = part(tensors, "ema." if any(key.startswith("ema.") for key in tensors) else "model.")
    kept = {key: value for key, value in given.items() if key.rpartition(".")[0] not in heads}
    try:
        pruning.apply_plan(model, wanted)
    except ValueError as error:
        raise RunError(f"{source}: weights must be of this configuration's model, got another: {error}") from error
    restore_model(model, model.state_dict() | kept, pruning.channel_plan(model), source)
    return model
