"""Estimates held against published training runs on a real card.

    python -m benchmarks.published_runs [--nchw] [--every N] [--json FILE]

The runs are those of timm's benchmark script on an RTX 3090 (huggingface/pytorch-image-models, results/benchmark-train-amp-nhwc-pt112-
cu113-rtx3090.csv, and its twin for nchw): automatic mixed precision in fp16, channels_last or not, SGD with momentum 0.9, cross-entropy,
torch 1.12 with CUDA 11.3. The script begins at 512 rows and goes down until a size runs (…, 192, 256, 384, 512), so each row says of one
size that it ran and of the next that it did not. An estimate is right when it is in between. The models are samples across families, taken
before anything was estimated; the nchw ones are others, first looked at when the simulation was done.

CUDA before 11.7 loads every kernel with the context: 1,486 MiB on an RTX 3090 (pytorch issue 49877: 1,644 MiB less a tensor's 158 MiB).
Needs timm; ``estimate`` itself does not.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import autobatch
from autobatch.core.plan import BatchPlan
from autobatch.simulate.loading import without_memory

os.environ["TIMM_FUSED_ATTN"] = "0"  # torch 1.12 had no fused attention
PUBLISHED = Path(__file__).parent / "published"
SIZES = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
CONTEXT = "1486MiB"


def runs(layout: str) -> Iterator[tuple[str, int, int, int | None]]:
    """Yield model, image size, the size that ran and the size that did not; the largest that was tried has none above it."""
    with (PUBLISHED / f"timm-rtx3090-amp-{layout}-pt112.csv").open() as file:
        for row in csv.DictReader(file):
            ran = int(row["train_batch_size"])
            yield row["model"], int(row["train_img_size"]), ran, next((size for size in SIZES if size > ran), None)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Return the script's optimizer; torch 1.12 stepped over one parameter at a time."""
    return torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, nesterov=True, foreach=False)


def estimate(name: str, image: int, layout: str, **options: Any) -> BatchPlan:
    """Return the plan for one of timm's models."""
    import timm

    with without_memory():
        model = timm.create_model(name)
        if hasattr(model, "patch_embed") and model.default_cfg["input_size"][-1] != image:
            model = timm.create_model(name, img_size=image)
        lies = torch.channels_last if layout == "nhwc" else torch.contiguous_format
        model = model.to(memory_format=lies)
        sample = torch.randn(2, 3, image, image).to(memory_format=lies), torch.randint(1000, (2,))
    plan: BatchPlan = autobatch.estimate(
        model, sample, gpu="rtx3090", loss_fn=nn.functional.cross_entropy, optimizer=sgd, precision="fp16", **options
    )
    return plan


def judge(layout: str, every: int) -> Iterator[dict[str, Any]]:
    """Yield for every ``every``-th run what was estimated and whether it lies between what ran and what did not."""
    for name, image, ran, failed in list(runs(layout))[::every]:
        under = {"margin": 0.0, "context": CONTEXT, "max_batch_size": 4096}
        stated, default = (estimate(name, image, layout, **how).batch_size for how in (under, {"max_batch_size": 4096}))
        right = [ran <= size and (failed is None or size < failed) for size in (stated, default)]
        yield {"model": name, "ran": ran, "failed": failed, "stated": stated, "default": default, "right": right}


def main() -> None:
    every = int(sys.argv[sys.argv.index("--every") + 1]) if "--every" in sys.argv else 1
    layout, rows = "nchw" if "--nchw" in sys.argv else "nhwc", []
    print(f"{'model':<36}{'ran':>6}{'did not':>9}{'estimate':>10}{'by default':>12}")
    for row in judge(layout, every):
        rows.append(row)
        marks = ["" if right else " !" for right in row["right"]]
        print(
            f"{row['model']:<36}{row['ran']:>6}{row['failed'] or '–':>9}{row['stated']:>8}{marks[0]:<2}{row['default']:>10}{marks[1]}",
            flush=True,
        )
    shares = [sum(row["right"][way] for row in rows) / len(rows) for way in (0, 1)]
    print(
        f"{len(rows)} runs: {shares[0]:.1%} right under their conditions (context {CONTEXT}, no margin); {shares[1]:.1%} with the defaults"
    )
    if "--json" in sys.argv:
        about = {"torch": torch.__version__, "python": platform.python_version(), "right": shares, "runs": rows}
        Path(sys.argv[sys.argv.index("--json") + 1]).write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
