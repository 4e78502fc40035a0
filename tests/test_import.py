"""Importing the package must not ask the GPU's driver anything, nor import Triton or the compiler."""

from __future__ import annotations

import forks

# torch.cuda as on a machine with a GPU. Every question to the driver is noted.
FAKE_GPU = """
import sys, torch
asked = []
def note(name, answer):
    def function(*args, **kwargs):
        asked.append(name)
        return answer
    return function
torch.cuda.is_available = note("is_available", True)
torch.cuda.device_count = note("device_count", 1)
torch.cuda.current_device = note("current_device", 0)
torch.cuda.get_device_name = note("get_device_name", "GPU X")
torch.cuda.get_device_capability = note("get_device_capability", (9, 0))
torch.cuda.get_device_properties = note("get_device_properties", None)
torch.cuda._lazy_init = note("_lazy_init", None)
torch._C._cuda_init = note("_cuda_init", None)
torch._C._cuda_getDeviceCount = note("_cuda_getDeviceCount", 1)
"""


def run(code: str) -> list[str]:
    done = forks.run(FAKE_GPU + code)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_import_asks_nothing():
    code = "import rkl_kernels; print(asked, torch.cuda.is_initialized(), 'triton' in sys.modules)"
    assert run(code) == ["[]", "False", "False"]


def test_import_brings_no_compiler():
    heavy = "[name for name in ('torch._dynamo', 'torch._inductor', 'torch.distributed.tensor') if name in sys.modules]"
    before = run(f"print({heavy})")
    assert run(f"import rkl_kernels; print({heavy})") == before


def test_help_and_a_prediction_wait_for_no_trainer():
    """What only training and evaluation need takes several times as long to import as torch."""
    late = "'lightning_fabric', 'torchmetrics', 'torchvision', 'torch_pruning', 'torch._dynamo', 'matplotlib'"
    code = f"import rkl.train_options, rkl.deploy.predict, sys; print([m for m in ({late}) if m in sys.modules])"
    assert run(code) == ["[]"]


def test_calls_on_a_cpu_ask_nothing():
    code = """
import rkl_kernels as rk
x = torch.randn(2, 3, 5, 5, requires_grad=True)
rk.trelu(rk.SeparableConv2d(3, 4, 3)(rk.DepthwiseConv2d(3, 3)(x))).sum().backward()
print(asked, 'triton' in sys.modules)
"""
    assert run(code) == ["[]", "False"]


def test_it_is_asked_when_somebody_asks_us():
    assert "is_available" in run("import rkl_kernels; rkl_kernels.backends(); print(*asked)")


def test_a_module_that_was_waited_for_keeps_its_own_loader():
    code = """
import rkl_kernels, pkgutil, importlib.util
import torch.distributed.tensor, torch.utils.flop_counter
for module in (torch.distributed.tensor, torch.utils.flop_counter):
    spec = module.__spec__
    same = importlib.util.find_spec(module.__name__).loader is spec.loader is module.__loader__
    print(same, spec.loader.get_data(module.__file__) == open(module.__file__, "rb").read())
print(pkgutil.get_data("torch.distributed.tensor", "__init__.py") is not None)
"""
    assert run(code) == ["True"] * 5


def test_flops_are_counted_whichever_is_imported_first():
    count = """
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    rkl_kernels.depthwise_conv2d(torch.randn(1, 2, 4, 4), torch.randn(2, 1, 3, 3))
print(counter.get_total_flops())
"""
    assert (
        run("import rkl_kernels\n" + count) == run("import torch.utils.flop_counter, rkl_kernels\n" + count) == ["144"]
    )
    asked = "import rkl_kernels, importlib.util; importlib.util.find_spec('torch.utils.flop_counter')\n"
    assert run(asked + count) == ["144"]  # after a mere search for the module
