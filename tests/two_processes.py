"""A program that trains as one process of two. With "stopped" it stops in the third epoch and then resumes.

Set LOCAL_RANK and MASTER_PORT. Arguments: the run's folder, and "whole" or "stopped".
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from rkl.config import Config
from rkl.distill import LossWeights
from rkl.training import train as trainer

SETTINGS = {
    "width": 4,
    "image_size": 8,
    "train_size": 160,
    "test_size": 40,
    "epochs": 3,
    "lr": 0.05,
    "prune_at": (0.3,),
    "prune_ratio": 0.3,
    "batch_size": 16,
    "loss": LossWeights(beta=0.2),
}


def interrupted(config: Config) -> None:
    """Train until Ctrl-C in the last epoch."""
    train_epoch = trainer.train_epoch

    def stopping(*arguments: object) -> dict:
        row = train_epoch(*arguments)
        if row["epoch"] == 3:
            raise KeyboardInterrupt
        return row

    trainer.train_epoch = stopping
    try:
        trainer.train(config)
    except KeyboardInterrupt:
        trainer.train_epoch = train_epoch
        return
    raise AssertionError("the run was not interrupted")


if __name__ == "__main__":
    torch.set_num_threads(1)
    config = Config(Path(sys.argv[1]), devices=2, **SETTINGS)
    if sys.argv[2] == "stopped":
        interrupted(config)
    trainer.train(config, resume=sys.argv[2] == "stopped")
