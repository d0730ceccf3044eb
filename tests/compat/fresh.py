"""A new Python process, for facts about what an import loads or a flag changes for good."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.tiny import ROOT


def python(code: str, *arguments: str, cwd: Path = ROOT, unset: Sequence[str] = ()) -> str:
    """What the code prints, without these variables in its environment."""
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(
        command, cwd=cwd, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
