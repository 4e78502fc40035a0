"""Compiles the CUDA kernels for the emulator into a Python module ``emulated`` for each variant, in build/emulation/.

An object is compiled again only when one of its inputs has changed. Variants:

- ``checked``: the emulator itself checks and counts every access of device memory (device/memory.h).
- ``sanitized``: AddressSanitizer and UBSan check them. The process needs libasan preloaded (test_sanitized.py).
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from .rewrite import rewrite

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OUT = ROOT / "build/emulation"
# No vectoriser: it would merge a thread's scalar accesses into wider ones that the kernel never makes.
COMMON = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-march=native", "-fno-tree-vectorize", "-w"]
# -Og compiles the sanitized kernels three times as fast as -O1, and they run as fast. Checked ones run half as fast.
KERNEL_FLAGS = {
    "checked": ["-fsanitize=thread"],
    "sanitized": ["-Og", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}
OTHER_FLAGS = {"checked": [], "sanitized": ["-fsanitize=address"]}
LINK_FLAGS = {"checked": [], "sanitized": ["-fsanitize=address,undefined"]}


def cuda_include() -> Path | None:
    """The folder of cuda_runtime.h: from $CUDA_HOME, from the toolkit of the package index, or beside nvcc on PATH."""
    spec = importlib.util.find_spec("nvidia")
    homes = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    homes += [
        home for root in (spec.submodule_search_locations or () if spec else ()) for home in Path(root).glob("cu1*")
    ]
    if nvcc := shutil.which("nvcc"):
        homes.append(Path(nvcc).resolve().parents[1])
    return next((home / "include" for home in homes if (home / "include/cuda_runtime.h").exists()), None)


def unavailable() -> str | None:
    """Why the emulator cannot run here, or None where it can."""
    if platform.machine() != "x86_64":
        return f"the emulator switches stacks by x86-64 instructions, this machine is {platform.machine()}"
    if not shutil.which("g++"):
        return "no g++ on PATH"
    if not cuda_include():
        return "no CUDA headers: neither $CUDA_HOME, the [cuda] extra nor an nvcc on PATH"
    return None


def _digest(*parts: bytes | str) -> str:
    h = hashlib.sha256()
    for part in parts:
        h.update(part.encode() if isinstance(part, str) else part)
        h.update(b"\0")
    return h.hexdigest()[:24]


def _run(command: list[str]) -> None:
    # This process may have a sanitizer preloaded. The compiler must run without it.
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def _compile(source: Path, flags: list[str], headers: str, folder: Path) -> Path:
    """Compile one source file and return its object. A .cu file is rewritten first."""
    text = source.read_text()
    if source.suffix == ".cu":
        text = rewrite(text, str(source))
    target = folder / f"{source.stem}-{_digest(text, headers, *flags)}.o"
    if not target.exists():
        scratch = target.with_suffix(f".{os.getpid()}")
        rewritten = scratch.with_suffix(f".{os.getpid()}.cpp")
        rewritten.write_text(text)
        _run(["g++", *flags, "-I", str(source.parent), "-c", str(rewritten), "-o", str(scratch)])
        rewritten.unlink()
        scratch.rename(target)
    return target


def _rewrite_headers(folder: Path) -> None:
    """Write rewritten copies of the headers that may hold kernels into include/, which is searched before csrc."""
    include = folder / "include"
    texts = {header.name: rewrite(header.read_text(), str(header)) for header in (ROOT / "csrc/cuda").glob("*.cuh")}
    (include / "cuda").mkdir(parents=True, exist_ok=True)
    for stale in set((include / "cuda").iterdir()) - {include / "cuda" / name for name in texts}:
        stale.unlink()
    for name, text in texts.items():
        (include / "cuda" / name).write_text(text)


def build(variant: str) -> Path:
    """Build a variant of the module and return the shared library."""
    import pybind11

    folder = OUT / variant
    folder.mkdir(parents=True, exist_ok=True)
    cuda = cuda_include()
    folders = [
        HERE / "device",
        folder / "include",
        ROOT / "csrc",
        cuda,
        pybind11.get_include(),
        sysconfig.get_path("include"),
    ]
    flags = [*COMMON, *(f"-I{folder}" for folder in folders)]
    kernels = [*sorted((ROOT / "csrc/cuda").glob("*.cu")), *sorted(HERE.glob("*.cu"))]
    others = [
        *sorted((ROOT / "csrc/cuda").glob("*plan.cpp")),
        *sorted((HERE / "device").glob("*.cpp")),
        *sorted(HERE.glob("*.cpp")),
    ]
    texts = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc/cuda").glob("*.*h"), *HERE.rglob("*.*h")]
    headers = _digest(sys.version, *(p.read_bytes() for p in sorted(texts)))
    with (folder / "lock").open("w") as lock:  # of several test processes, one builds and the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        _rewrite_headers(folder)
        return _build_in(folder, variant, flags, kernels, others, headers)


def _build_in(
    folder: Path, variant: str, flags: list[str], kernels: list[Path], others: list[Path], headers: str
) -> Path:
    jobs = [(k, [*flags, *KERNEL_FLAGS[variant]]) for k in kernels] + [
        (o, [*flags, *OTHER_FLAGS[variant]]) for o in others
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: _compile(*job, headers, folder), jobs))
    library = folder / _digest(*(o.name for o in objects)) / "emulated.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        scratch = library.with_suffix(f".{os.getpid()}")
        _run(["g++", "-shared", *LINK_FLAGS[variant], *map(str, objects), "-o", str(scratch)])
        scratch.rename(library)
        for stale in set(folder.glob("*.o")) - set(objects):
            stale.unlink(missing_ok=True)
        for stale in set(folder.glob("*/")) - {library.parent, folder / "include"}:
            shutil.rmtree(stale, ignore_errors=True)
    return library


def load(variant: str) -> ModuleType:
    """Build where needed and import the module. Of several test processes, one builds and the others wait."""
    OUT.mkdir(parents=True, exist_ok=True)
    with (OUT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = build(variant)
    spec = importlib.util.spec_from_file_location("emulated", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sanitizer_environment() -> dict[str, str]:
    """The environment of a process that loads the sanitized variant. It preloads libasan, since Python itself is not
    instrumented."""
    # libstdc++ is preloaded too: AddressSanitizer looks up the throwing of exceptions when the process starts.
    names = ("libasan.so", "libstdc++.so.6")
    found = (
        subprocess.run(["g++", f"-print-file-name={n}"], capture_output=True, text=True, check=True) for n in names
    )
    preload = " ".join(done.stdout.strip() for done in found)
    return {**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"}
