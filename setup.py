"""The two extension modules: CPU kernels always, CUDA kernels where a CUDA compiler and a CUDA torch are found.

Both use LibTorch's Stable ABI and Python's limited API, so one wheel serves every torch from 2.11 and every Python
from 3.10. ``FORCE_CUDA=1`` makes a missing CUDA compiler an error instead of a CPU-only build, ``FORCE_CUDA=0``
leaves the CUDA extension out. Whether a GPU is present is never asked: wheels are built on machines without one.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
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


def index_toolkit() -> Path | None:
    """The CUDA compiler from the package index (extra ``cuda``), if it is installed."""
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or () if spec else ():
        for home in sorted(Path(root).glob("cu1[0-9]")):
            if (home / "bin/nvcc").exists() and (home / "nvvm/bin/cicc").exists():
                return home
    return None


def path_toolkit() -> Path | None:
    """The toolkit of the nvcc on PATH. nvcc is asked, since what stands on PATH may be a script in another folder."""
    if not shutil.which("nvcc"):
        return None
    plan = subprocess.run(
        ["nvcc", "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    ).stderr
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    return Path(top[1]).resolve() if top else None


def cuda_home() -> tuple[Path | None, list[str]]:
    """Where the CUDA compiler is, and library folders to add: $CUDA_HOME, then the index's, then the one on PATH."""
    if os.environ.get("CUDA_HOME"):
        return Path(os.environ["CUDA_HOME"]), []
    if home := index_toolkit():
        folder = ROOT / "build/cuda_lib"  # the index's runtime comes without the link that the linker looks for
        folder.mkdir(parents=True, exist_ok=True)
        link = folder / "libcudart.so"
        link.unlink(missing_ok=True)
        link.symlink_to(next((home / "lib").glob("libcudart.so.*")))
        os.environ["CUDA_HOME"] = str(home)
        return home, [str(folder)]
    home = path_toolkit()
    if home:
        os.environ["CUDA_HOME"] = str(home)
    return home, []


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def extensions() -> tuple[list, dict]:
    home, library_dirs = cuda_home()  # before torch looks for CUDA_HOME
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    headers = sources("csrc/**/*.h", "csrc/**/*.cuh", "csrc/**/*.inc")
    modules = [
        CppExtension(
            "rkl_kernels._C",
            sources("csrc/ops.cpp", "csrc/cpu/**/*.cpp"),
            include_dirs=[str(ROOT / "csrc")],
            depends=headers,
            extra_compile_args={"cxx": CXX_FLAGS},
            py_limited_api=True,
        )
    ]
    force = os.environ.get("FORCE_CUDA")
    if force == "1" and not (home and torch.version.cuda):
        raise SystemExit(
            f"FORCE_CUDA=1 needs nvcc and a CUDA build of torch, got nvcc: {home}, torch.version.cuda: "
            f"{torch.version.cuda}; install the extra [cuda] and a CUDA torch"
        )
    if home and torch.version.cuda and force != "0":
        modules.append(
            CUDAExtension(
                "rkl_kernels._C_cuda",
                sources("csrc/cuda/*.cpp", "csrc/cuda/*.cu"),
                include_dirs=[str(ROOT / "csrc")],
                library_dirs=library_dirs,
                depends=headers,
                extra_compile_args={"cxx": [*CXX_FLAGS, "-DUSE_CUDA"], "nvcc": NVCC_FLAGS},
                py_limited_api=True,
            )
        )
    return modules, {"build_ext": BuildExtension}


ext_modules, commands = extensions()
setup(
    ext_modules=ext_modules,
    cmdclass=commands,
    options={
        "bdist_wheel": {"py_limited_api": "cp310"},
        # A fixed folder keeps an editable install's rebuild to the files that changed.
        "build_ext": {"build_temp": str(ROOT / "build/objects")},
    },
)
