"""How long a newcomer waits before anything happens."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("command", ["pass", "import autobatch", "import autobatch.cli"])
def test_import(benchmark: object, command: str) -> None:
    benchmark.pedantic(lambda: subprocess.run([sys.executable, "-c", command], check=True), rounds=10, warmup_rounds=1)  # type: ignore[attr-defined]
