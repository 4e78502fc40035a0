"""Brings pages and pictures that stand elsewhere in the tree into the site, so that each fact is written once.

The site is laid out as the tree is, with docs/ as its root and README.md as its first page. Links are written for the
tree, where people read the files too; here they become the site's.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]

BROUGHT = (
    "*.md",
    "CITATION.cff",
    "LICENSE",
    "benchmarks/*.md",
    "benchmarks/results/*.md",
    "benchmarks/results/*.png",
    "examples/*.py",
    "results/README.md",
    "results/*/report.md",
    "results/*/plots/*.png",
)

RECORDS = re.compile(r"benchmarks/results/|results/.*/report\.md")
"""Pages of figures in thousands of cells, which the search need not find, and takes most of the build's time over."""

LINK = re.compile(r"\[([^\[\]]*)\]\(([^)#:\s]+)(#[^)\s]*)?\)")
"""A link to a file: its text, the file, the anchor in it."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for pattern in BROUGHT:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn a page's links to files of the tree. Of a source file, which the site lacks, the text stays; what names no
    file at all is left for the build to warn of."""
    if RECORDS.match(page.file.src_uri):
        page.meta["search"] = {"exclude": True}
    folder = Path(page.file.abs_src_path or "").parent
    site_folder = Path(page.file.src_uri).parent

    def turned(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        if not (target.is_relative_to(ROOT) and target.is_file()):
            return link[0]
        place = target.relative_to(ROOT / "docs" if target.is_relative_to(ROOT / "docs") else ROOT)
        if files.get_file_from_path(place.as_posix()) is None:
            return link[1]
        return f"[{link[1]}]({Path(os.path.relpath(place, site_folder)).as_posix()}{link[3] or ''})"

    return LINK.sub(turned, markdown)
