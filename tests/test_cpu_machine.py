"""The CPU kernels as other machines would choose and split them: lower instruction sets, other caches."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import forks
import pytest
import torch

import rkl_kernels as rk

OTHER_MACHINE = """
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
#ifdef L2_BYTES
long sysconf(int name) {
  if (name == _SC_LEVEL2_CACHE_SIZE) return L2_BYTES;
  return ((long (*)(int))dlsym(RTLD_NEXT, "sysconf"))(name);
}
#endif
#ifdef L3_SIZE
FILE *fopen(const char *name, const char *mode) {
  if (strstr(name, "/cache/index3/size")) return fmemopen(L3_SIZE, strlen(L3_SIZE), "r");
  return ((FILE * (*)(const char *, const char *))dlsym(RTLD_NEXT, "fopen"))(name, mode);
}
int mincore(void *address, size_t length, unsigned char *is) {
  close(creat(getenv("ASKED"), 0600));
  *is = 1;
  return 0;
}
#endif
#ifdef AMX
long syscall(long number, ...) {
  long a[6];
  va_list list;
  va_start(list, number);
  for (int i = 0; i < 6; ++i) a[i] = va_arg(list, long);
  va_end(list);
  if (number == SYS_arch_prctl && a[0] == 0x1021) {
    *(uint64_t *)a[1] = 1 << 18;
    return 0;
  }
  return ((long (*)(long, ...))dlsym(RTLD_NEXT, "syscall"))(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
#endif
"""
"""Preloaded, it replaces functions of the C library."""

ASK = "import sys; sys.path.insert(0, 'tests'); import test_cpu_machine; {}"
"""A program for a process that sees another machine."""


def run_again(which: str, files: list[str], first: str = "", **environment: str) -> None:
    """Run tests in a separate process, after the statement ``first``. Some must run, and none may fail or be
    skipped."""
    code = f"{first}\nimport sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    arguments, told = ["-x", "-k", which, *(f"tests/{file}" for file in files)], {**os.environ, **environment}
    if "LD_PRELOAD" in environment:
        command = [sys.executable, "-c", code, *arguments]
        run = subprocess.run(command, env=told, capture_output=True, text=True, check=False)
    else:
        run = forks.run(code, *arguments, env=told)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    count = re.search(r"^(=+ )?\d+ passed(, \d+ deselected)?(, \d+ warnings?)? in ", run.stdout, re.MULTILINE)
    assert count, run.stdout[-300:]


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_lower_instruction_sets(capability: str) -> None:
    """Of the separable tests all but that of a step left to PyTorch, which happens with AVX-512 alone."""
    told = {"ATEN_CPU_CAPABILITY": capability}
    dense = "trelu or depthwise and (float32 or forward_and_gradients) or cpu_kernels_are_named"
    separable = "cpu_separable and not left_to_pytorch and (test_forward or not bands)"
    files = ["trelu", "depthwise", "separable", "separable_bands"]
    run_again(f"{dense} or {separable}", [*(f"test_cpu_{name}.py" for name in files), "test_planner.py"], **told)
    if platform.machine() == "x86_64":
        ask = ASK.format("print(test_cpu_machine.rounds_products())")
        said = forks.run(ask, env={**os.environ, **told})
        assert said.stdout == f"{capability == 'default'}\n", said.stderr


def rounds_products() -> bool:
    """Whether a product is rounded before it is added. On x86, only the kernels below AVX2 do that."""
    x, bias = torch.full((1, 16, 8, 8), 1 + 2.0**-12), torch.full((16,), -1 - 2.0**-11)
    with rk.use_backend("cpu"):
        y = rk.depthwise_conv2d(x, x.new_full((16, 1, 1, 1), 1 + 2.0**-12), bias)
    return not y.any().item()


def test_a_limit_that_pytorch_does_not_know_is_none() -> None:
    """An unknown limit changes nothing. On a machine with AVX-512, ``explain`` shows which kernels were chosen: those
    alone leave this call to PyTorch. The limit is read at the first call, hence a fork for each."""
    code = """
import os, torch, rkl_kernels
x = torch.zeros(1, 12, 256, 256).contiguous(memory_format=torch.channels_last)
for limit in (None, "avx512_vnni", "AVX2", ""):
    if not os.fork():
        if limit is not None:
            os.environ["ATEN_CPU_CAPABILITY"] = limit
        print(rkl_kernels.explain("depthwise_conv2d", x, torch.zeros(12, 1, 3, 3)).kernels, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""
    told = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    said = forks.run(code, env=told).stdout.splitlines()
    assert said[0]
    assert said == said[:1] * 4


needs_gcc = pytest.mark.skipif(
    not shutil.which("gcc"), reason="another machine is a library compiled here, by gcc; none on PATH"
)


def preload(folder: Path, definition: str) -> str:
    """The LD_PRELOAD of a process that shall see another machine."""
    source, library = folder / "machine.c", folder / "machine.so"
    source.write_text(OTHER_MACHINE)
    flags = ["-D_GNU_SOURCE", f"-D{definition}", "-shared", "-fPIC"]
    subprocess.run(["gcc", *flags, source, "-o", library], check=True)
    return ":".join(filter(None, (os.environ.get("LD_PRELOAD"), str(library))))  # a sanitizer must come first


@needs_gcc
@pytest.mark.parametrize(("kib", "which"), [(256, "float32 or through_activations"), (2048, "bfloat16")])
def test_other_second_level_caches(kib: int, which: str, tmp_path: Path) -> None:
    """Bands and groups of channels become narrower or wider. Most tuning was done on 1 MiB, which lies between. One
    type of each size is tested: by its bytes alone a type moves the bounds."""
    preloaded = preload(tmp_path, f"L2_BYTES={kib * 1024}L")
    told = {**os.environ, "LD_PRELOAD": preloaded}
    said = subprocess.run(["getconf", "LEVEL2_CACHE_SIZE"], env=told, capture_output=True, text=True, check=True)
    assert int(said.stdout) == kib * 1024
    files = ["test_cpu_depthwise.py", "test_cpu_separable_bands.py"]
    run_again(f"(forward_and_gradients or bands) and ({which})", files, LD_PRELOAD=preloaded)


@needs_gcc
@pytest.mark.parametrize("capability", ["", "avx2"])
def test_a_small_third_level_cache(capability: str, tmp_path: Path) -> None:
    """Every output of whole lines then exceeds the caches and is written past them. Its pages are said to be old."""
    preloaded = preload(tmp_path, 'L3_SIZE="1K"')
    asked, files = tmp_path / "asked", ["test_cpu_depthwise.py", "test_cpu_separable.py"]
    told = {"ASKED": str(asked), "LD_PRELOAD": preloaded, "ATEN_CPU_CAPABILITY": capability}
    run_again("forward_and_gradients and nhwc", files, **told)
    assert asked.exists()


@needs_gcc
def test_planes_past_a_small_third_level_cache(tmp_path: Path) -> None:
    """With AVX-512, the product of large NCHW outputs writes planes past the caches."""
    preloaded = preload(tmp_path, 'L3_SIZE="1K"')
    asked = tmp_path / "asked"
    run_again("whole_lines", ["test_cpu_separable_bands.py"], ASKED=str(asked), LD_PRELOAD=preloaded)
    assert asked.exists() == (torch.backends.cpu.get_cpu_capability() == "AVX512")


@needs_gcc
@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="AMX is x86's; Linux is asked")
def test_a_machine_with_matrix_instructions(tmp_path: Path) -> None:
    """On such a machine the library computes bf16, step by step. Here it does so without the instructions."""
    files = ["test_cpu_separable.py", "test_cpu_separable_bands.py"]
    ask = ASK.format("test_cpu_machine.says_library()")
    run_again("bfloat16", files, first=ask, LD_PRELOAD=preload(tmp_path, "AMX"))


def says_library() -> None:
    """Called in a process that sees those instructions."""
    x = torch.randn(8, 64, 32, 32, dtype=torch.bfloat16)
    call = x, torch.randn(64, 1, 3, 3).bfloat16(), torch.randn(64, 64, 1, 1).bfloat16()
    with rk.use_backend("cpu"):
        told = rk.explain("separable_conv2d", *call, padding=1)
    assert "the library makes the pointwise filter's gradient" in told.reason, told
