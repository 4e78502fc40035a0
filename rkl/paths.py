"""Where a run's folder may be."""

from __future__ import annotations

from pathlib import Path

FOLDER = "folder:"
"""What the name of a data set begins with that is a folder of the user's images."""


def check_apart(out: Path, data: str) -> None:
    """Raise ValueError where a run's folder would lie in that of its images: it would be one more class there, with its
    plots for images, and neither `evaluate` nor `--resume` would find the images that it was trained on."""
    images = Path(data.removeprefix(FOLDER)).resolve()
    if data.startswith(FOLDER) and out.resolve().is_relative_to(images):
        below = out.resolve().relative_to(images).parts
        if not any(part.startswith(".") for part in below):  # hidden folders are no images'
            raise ValueError(
                f"out must be outside the folder of the images, where it would be a class, got {out} in {images}; "
                "give another folder"
            )
