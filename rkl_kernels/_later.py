"""What is to be done when another module is imported, if ever: imports that this package must not cause itself."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def when_imported(name: str, then: Callable[[], None]) -> None:
    """Call ``then()`` once module ``name`` is imported: now, where it is so already."""
    if name in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _Watch(name, then))


class _Watch(MetaPathFinder):
    """Finds the one module where all others look for it, and goes when it is loaded."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self.name, self.then, self.asks = name, then, False

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname != self.name or self.asks:
            return None
        self.asks = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.asks = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec

    def loaded(self) -> None:
        if self in sys.meta_path:  # looked for is not loaded: a program may only ask whether there is one
            sys.meta_path.remove(self)
            self.then()


class _Loader(Loader):
    def __init__(self, loader: Any, watch: _Watch) -> None:
        self.loader, self.watch = loader, watch

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Others ask a module's loader for its source and its data (pkgutil.get_data, say), which this one has not.
        module.__loader__ = self.loader
        if module.__spec__:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.watch.loaded()
