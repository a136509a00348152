"""A training run at the answer, long enough to meet what a trial does not: shuffled rows, validation passes, checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_a_thousand_steps_at_the_answer_run_under_the_same_limit() -> None:
    run = subprocess.run([sys.executable, "-m", "benchmarks.soak"], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    done = json.loads(run.stdout)
    assert (done["steps"], done["validations"], done["checkpoints"], done["error"]) == (1000, 10, 4, "")
    assert done["rows"] == 1000 * done["batch_size"]
    assert done["limited_by"] == "memory"
