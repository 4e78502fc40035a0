"""Programs in processes of their own that need not wait for torch: forks of one process that has imported it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from subprocess import CompletedProcess

SERVER = """
import json, os, sys
import torch

for line in sys.stdin:
    if not (child := os.fork()):
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
code, arguments, folder, environment, *files = json.loads(line)
for number, file in enumerate((os.devnull, *files)):
    os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
os.chdir(folder)
os.environ.clear()
os.environ.update(environment)
sys.argv = ["-c", *arguments]
exec(code, {"__name__": "__main__"})
"""


@cache
def _server() -> subprocess.Popen[str]:
    """It has imported torch alone, has called nothing of it, and ends when its input does."""
    return subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run(
    code: str, *arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None
) -> CompletedProcess[str]:
    """What ``subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)`` gives, if the
    code imports torch. Variables that torch reads when it is imported must be those of this process."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("out", "err")]
        asked = code, arguments, str(cwd or os.getcwd()), dict(os.environ if env is None else env), *map(str, files)
        print(json.dumps(asked), file=server.stdin, flush=True)
        returned = int(server.stdout.readline())
        return CompletedProcess(["-c", *arguments], returned, *(file.read_text() for file in files))
