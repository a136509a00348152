"""Checks marked ``cuda`` need a card; what they measured is written to ``benchmarks/results/``."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import autobatch

RESULTS = Path(os.environ.get("AUTOBATCH_RESULTS", Path(__file__).parent / "results"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA card: torch.cuda.is_available() is false"))


@pytest.fixture(scope="session")
def record() -> Iterator[list[dict[str, Any]]]:
    """Collect rows of measurements; they go to one file with card, date and versions."""
    rows: list[dict[str, Any]] = []
    yield rows
    if not rows:
        return
    card = torch.cuda.get_device_name()
    document = {
        "card": card,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "versions": {
            "autobatch": autobatch.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
        },
        "rows": rows,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    name = f"find-{card.lower().replace(' ', '-')}-{document['date']}.json"
    (RESULTS / name).write_text(json.dumps(document, indent=1) + "\n")
