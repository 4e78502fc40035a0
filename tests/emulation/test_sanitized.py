"""Runs the tests marked `sanitized` again, in a separate process, under AddressSanitizer and UBSan."""

from __future__ import annotations

import subprocess
import sys

import pytest

from . import build


def test_under_address_and_undefined_behaviour_sanitizers(request: pytest.FixtureRequest) -> None:
    build.build("sanitized")  # here, so that the compiler does not run under the sanitizer
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--sanitized", "tests/emulation"]
    done = subprocess.run(command, capture_output=True, text=True, env=build.sanitizer_environment(), cwd=build.ROOT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
