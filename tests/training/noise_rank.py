"""One rank of two: measures the noise scale under DistributedDataParallel and writes what it found as JSON.

python noise_rank.py RANK STORE OUT
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import autobatch

ROWS, DIMENSIONS, RANKS = 512, 40, 2


def rows() -> torch.Tensor:
    """Return the rows of all ranks: the gradient of a row of the linear loss is the row itself."""
    return torch.randn(ROWS, DIMENSIONS, generator=torch.Generator().manual_seed(1)) + 0.3


def model() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(DIMENSIONS, 1, bias=False)


def mean(output: torch.Tensor) -> torch.Tensor:
    return output.mean()


def batches(rank: int) -> list[torch.Tensor]:
    """Return this rank's batches of 8 rows."""
    return list(rows().view(-1, RANKS, 8, DIMENSIONS)[:, rank])


def in_a_loop(wrapped: DistributedDataParallel, own: list[torch.Tensor]) -> autobatch.NoiseScale:
    with autobatch.NoiseMeter(wrapped) as meter:
        for window in zip(own[::2], own[1::2], strict=True):
            for batch in window:  # every backward pass is reduced: no_sync is for speed alone
                (mean(wrapped(batch)) / 2).backward()
                meter.micro_batch(len(batch))
            meter.window()
            wrapped.zero_grad()
        return meter.noise_scale()


def main(rank: int, store: str, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    wrapped = DistributedDataParallel(model(), gradient_as_bucket_view=True)
    mean(wrapped(torch.full((1, DIMENSIONS), 1.0 + rank))).backward()
    pending = wrapped.module.weight.grad
    assert pending is not None
    before = pending.clone()
    noise = autobatch.noise_scale(wrapped, batches(rank), mean, micro_batches=4, windows=8)
    same = wrapped.module.weight.grad is pending and torch.equal(pending, before)
    wrapped.zero_grad()
    loop = in_a_loop(wrapped, batches(rank))
    out.write_text(json.dumps({"noise": dataclasses.asdict(noise), "loop": dataclasses.asdict(loop), "same": same}))
    dist.barrier()  # a rank that tears gloo down while the other is still talking is aborted
    del wrapped
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
