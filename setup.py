"""The two extension modules: CPU kernels always, CUDA kernels where torch and a compiler are of one CUDA major version.

Both use LibTorch's Stable ABI and Python's limited API, so one wheel serves every torch from 2.11 and every Python
from 3.10. ``FORCE_CUDA=1`` makes a missing or unfit CUDA compiler an error instead of a CPU-only build,
``FORCE_CUDA=0`` leaves the CUDA extension out. Whether a GPU is present is never asked: wheels are built on machines
without one.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from setuptools import setup
from setuptools.command.build import build

ROOT = Path(__file__).parent
CUDA_MODULE = "rkl_kernels._C_cuda"
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11; for the C++ and the CUDA compiler both
CXX_FLAGS = ["-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall", TORCH_TARGET]
# sm_80 and sm_90 as machine code, sm_90 also as PTX for every later GPU. Spills are reported; that the pinned compiler
# makes none is a test (a few bytes of another compiler's should not fail a user's build).
NVCC_FLAGS = [
    "-O3",
    "-Xptxas=-warn-spills",
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=[sm_90,compute_90]",
    "-DUSE_CUDA",
    TORCH_TARGET,
]


def index_toolkits() -> Iterator[Path]:
    """The CUDA compilers from the package index (extra ``cuda``), wherever Python looks for packages."""
    for folder in sys.path:
        for home in sorted(Path(folder or ".").glob("nvidia/cu1[0-9]")):
            if (home / "nvvm/bin/cicc").exists():
                yield home


def path_toolkit() -> Path | None:
    """The toolkit of the nvcc on PATH. nvcc is asked, since what stands on PATH may be a script in another folder."""
    if not shutil.which("nvcc"):
        return None
    plan = subprocess.run(
        ["nvcc", "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    ).stderr
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    return Path(top[1]).resolve() if top else None


def toolkits() -> list[Path]:
    """Where a CUDA compiler may be: in $CUDA_HOME if that is set, else the package index's, then the one on PATH."""
    if os.environ.get("CUDA_HOME"):
        return [Path(os.environ["CUDA_HOME"])]
    on_path = path_toolkit()
    return [*index_toolkits(), *([on_path] if on_path else [])]


def cuda_version(home: Path) -> str | None:
    """The version of a toolkit's compiler, such as 13.0; None where there is no compiler."""
    nvcc = home / "bin/nvcc"
    if not nvcc.exists():
        return None
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"release (\d+\.\d+)", told)
    return version[1] if version else None


def find_toolkit(torch_cuda: str | None) -> tuple[Path | None, str]:
    """The first toolkit of torch's CUDA major version or, where there is none, a sentence on why and what to do."""
    if not torch_cuda:
        return None, "this torch is built without CUDA; install a CUDA build of torch"
    found = {home: version for home in toolkits() if (version := cuda_version(home))}
    major = torch_cuda.split(".")[0]
    for home, version in found.items():
        if version.split(".")[0] == major:
            return home, ""
    nvcc = " and ".join(f"{version} ({home})" for home, version in found.items()) or "nowhere to be found"
    return None, (
        f"torch is built for CUDA {torch_cuda} and nvcc is {nvcc}; point CUDA_HOME to a CUDA {major} toolkit, or "
        f"pip install 'cuda-toolkit[nvcc,cccl]=={major}.*' 'setuptools>=77' ninja and build with --no-build-isolation"
    )


def cuda_home(torch_cuda: str | None, force: str | None) -> Path | None:
    """The toolkit to compile the CUDA extension with; None leaves that out, and says so unless asked to."""
    if force == "0":
        return None
    home, reason = find_toolkit(torch_cuda)
    if not home and force == "1":
        raise SystemExit(f"FORCE_CUDA=1, but the CUDA kernels cannot be built: {reason}")
    if not home:
        print(f"The CUDA kernels are left out: {reason}. FORCE_CUDA=1 makes this an error.", file=sys.stderr)
    return home


def runtime_folders(home: Path) -> list[str]:
    """Library folders to add: the index's runtime comes without the link that the linker looks for."""
    runtime = next((home / "lib").glob("libcudart.so.*"), None)
    if not runtime or (home / "lib/libcudart.so").exists():
        return []
    folder = ROOT / "build/cuda_lib"
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "libcudart.so"
    link.unlink(missing_ok=True)
    link.symlink_to(runtime)
    return [str(folder)]


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def description() -> str:
    """The README as a package index can show it: without its picture, links into the tree as their text."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    without = re.sub(r"^!\[.*?(?=^## )", "", readme, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"\[([^]]*)\]\((?!https?:)[^)]*\)", r"\1", without)


class Build(build):
    """Begins with an empty folder: whatever an earlier build left there would go into the wheel."""

    def run(self) -> None:
        if Path(self.build_lib).parent == Path(self.build_base):  # nobody chose another
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


def build_ext_command() -> type:
    from torch.utils.cpp_extension import BuildExtension

    class BuildExt(BuildExtension):
        def initialize_options(self) -> None:
            super().initialize_options()
            # A fixed folder keeps a rebuild to the files that changed. An option of setup() would not do: an editable
            # install initialises the command anew, and would compile everything in a folder that it then deletes.
            self.build_temp = str(ROOT / "build/objects")

        def run(self) -> None:
            left_out = all(extension.name != CUDA_MODULE for extension in self.extensions)
            if (self.inplace or self.editable_mode) and left_out:
                for binary in ROOT.glob("rkl_kernels/_C_cuda*.so"):
                    binary.unlink()  # it would be loaded all the same
            super().run()

    return BuildExt


def extensions() -> list:
    import torch

    home = cuda_home(torch.version.cuda, os.environ.get("FORCE_CUDA"))
    if home:
        os.environ["CUDA_HOME"] = str(home)  # the next import reads it
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    shared = {
        "include_dirs": [str(ROOT / "csrc")],
        "depends": sources("csrc/**/*.h", "csrc/**/*.cuh", "csrc/**/*.inc"),
        "py_limited_api": True,
    }
    cpu = CppExtension(
        "rkl_kernels._C",
        sources("csrc/ops.cpp", "csrc/cpu/**/*.cpp"),
        extra_compile_args={"cxx": CXX_FLAGS},
        **shared,
    )
    if not home:
        return [cpu]
    cuda = CUDAExtension(
        CUDA_MODULE,
        sources("csrc/cuda/**/*.cpp", "csrc/cuda/**/*.cu"),
        library_dirs=runtime_folders(home),
        extra_compile_args={"cxx": [*CXX_FLAGS, "-DUSE_CUDA"], "nvcc": NVCC_FLAGS},
        **shared,
    )
    return [cpu, cuda]


if __name__ == "__main__":
    setup(
        long_description=description(),
        long_description_content_type="text/markdown",
        ext_modules=extensions(),
        cmdclass={"build": Build, "build_ext": build_ext_command()},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
