"""Shared fixtures."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import rkl_kernels as rk

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # make gpu uses the machine's own packages, which may lack hypothesis
    settings = None

# How many random calls of the operators are drawn, over all backends (cases.py). "test" draws the same calls each time,
# "fuzz" draws others for each seed.
for name, count in {"test": 500, "fuzz": 10_000}.items() if settings else ():
    settings.register_profile(
        name,
        max_examples=count,
        derandomize=name == "test",
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )
if settings:
    settings.load_profile("test")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # One test of it takes a minute. Begun last, it would keep a worker while the others have nothing left to do.
    items.sort(key=lambda item: item.path.name != "test_static_report.py")
    if config.getoption("--hypothesis-profile", None) != "fuzz":
        for item in items:
            if item.get_closest_marker("fuzz"):
                item.add_marker(pytest.mark.skip(reason="a minute and gigabytes: make fuzz runs it"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Every backend that serves CPU tensors, in turn."""
    assert rk.backends()[request.param].available, rk.backends()[request.param].reason
    with rk.use_backend(request.param):
        yield request.param


@pytest.fixture
def one_thread():
    """One thread: layers this small take longer to split among threads than to run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_plots() -> Iterator[pytest.MonkeyPatch]:
    """Runs without their plots, which take longer to draw than a small run to train. A test that looks at plots undoes
    it."""
    from rkl.training import report  # here, as a machine of make gpu may lack what the trainer needs

    with pytest.MonkeyPatch.context() as patch:  # not the test's own, which it may undo
        for name in ("_plot_curves", "plot_confusion"):
            patch.setattr(report, name, lambda *_, **__: None)
        yield patch
