"""Paths as people write them: below their home, and images in a folder of their own."""

from __future__ import annotations

import os
import re
from pathlib import Path

FOLDER = "folder:"
"""What the name of a data set begins with that is a folder of the user's images."""


def at_home(text: str) -> str:
    """``text`` with the home directory for a ``~`` that begins its path. A shell does that for a word of its own alone:
    not in ``--out=~/run`` or ``folder:~/photos``, and not in a file of settings.

    Examples:
        >>> from rkl.paths import at_home
        >>> at_home("--out=runs/~"), at_home("folder:~/photos") == f"folder:{Path.home()}/photos"
        ('--out=runs/~', True)
    """
    begin, path = re.fullmatch(rf"((?:--[\w.-]+=)?(?:{FOLDER})?)(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    return begin + os.path.expanduser(path)


def check_apart(out: Path, data: str) -> None:
    """Raise ValueError where a run's folder would lie in that of its images: it would be one more class there, with its
    plots for images, and neither `evaluate` nor `--resume` would find the images that it was trained on."""
    images = Path(data.removeprefix(FOLDER)).resolve()
    if data.startswith(FOLDER) and data != FOLDER and out.resolve().is_relative_to(images):
        below = out.resolve().relative_to(images).parts
        if not any(part.startswith(".") for part in below):  # hidden folders are no images'
            raise ValueError(
                f"out must be outside the folder of the images, where it would be a class, got {out} in {images}; "
                "give another folder"
            )
