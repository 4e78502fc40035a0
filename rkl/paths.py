"""Paths as users write them: with ``~`` for their home, and ``folder:`` before a folder of images."""

from __future__ import annotations

import os
import re
from pathlib import Path

FOLDER = "folder:"
"""The prefix of a data set's name that is a folder of the user's images."""


def at_home(text: str) -> str:
    """``text`` with the home directory in place of a ``~`` at the start of its path. A shell does that only if
    the path is a word by itself, so not in ``--out=~/run``, ``folder:~/photos`` or a file of settings.

    Examples:
        >>> from rkl.paths import at_home
        >>> at_home("--out=runs/~"), at_home("folder:~/photos") == f"folder:{Path.home()}/photos"
        ('--out=runs/~', True)
    """
    begin, path = re.fullmatch(rf"((?:--[\w.-]+=)?(?:{FOLDER})?)(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    return begin + os.path.expanduser(path)


def check_apart(out: Path, data: str) -> None:
    """Raise ValueError if a run's folder lies in the folder of its images. It would be one more class there, with its
    plots as images, and neither `evaluate` nor `--resume` would find the images that it was trained on."""
    images = Path(data.removeprefix(FOLDER)).resolve()
    if data.startswith(FOLDER) and data != FOLDER and out.resolve().is_relative_to(images):
        below = out.resolve().relative_to(images).parts
        if not any(part.startswith(".") for part in below):  # hidden folders are not read
            raise ValueError(
                f"out must be outside the folder of the images, where it would be a class, got {out} in {images}; "
                "give another folder"
            )
