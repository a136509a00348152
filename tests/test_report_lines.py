"""What a reader sees of settings, probes and plans, to the letter."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from autobatch.core.options import PlanRequest
from autobatch.core.plan import BatchPlan, make_plan
from autobatch.core.records import MemoryReading, Outcome, Peak, Probe, ProcessMemory, SearchSpace, Setting
from autobatch.core.units import GIB, MIB
from autobatch.report.lines import answer_line, args_line, env_lines, plain, plan_lines, probe_line, setting_lines

CAP = 2 * GIB - 102 * MIB
SETTING = Setting(
    device="cuda:0", device_description="NVIDIA H200", reading=MemoryReading(capacity=16 * GIB, free=8 * GIB), budget=2 * GIB,
    cap=CAP, margin=0.05, resident=350 * MIB, has_optimizer=True, group_lrs=(0.001, 0.0001), optimizer_name="SGD",
    dataset_size=1500,
)  # fmt: skip
PROBES = (
    Probe(batch_size=64, outcome=Outcome.FIT, forward_backward=Peak(allocated=1000 * MIB), seconds_per_step=0.2, seconds=0.61),
    Probe(batch_size=119, outcome=Outcome.OOM, seconds=0.3, message="CUDA out of memory"),
    Probe(
        batch_size=118,
        outcome=Outcome.FIT,
        forward_backward=Peak(allocated=1900 * MIB, reserved=1930 * MIB),
        seconds_per_step=0.412,
        seconds=2.5,
        confirmation=True,
    ),
)


def plan_of(batch_size: int = 118, at: Setting = SETTING, request: PlanRequest | None = None, **changes: Any) -> BatchPlan:
    defaults: dict[str, Any] = {
        "setting": at, "request": request or PlanRequest(), "space": SearchSpace(), "batch_size": batch_size, "best": 118,
        "probes": (*PROBES, Probe(batch_size=batch_size, outcome=Outcome.FIT)), "wall": 119, "wall_kind": "probed",
        "limited_by": "memory", "exact": True,
    }  # fmt: skip
    return make_plan(**{**defaults, **changes})


def row(plan: BatchPlan, key: str) -> str | None:
    """Return the value that ``plan_lines`` shows for ``key``."""
    return next((line[18:] for line in plan_lines(plan) if line[:18].strip() == key), None)


def test_a_whole_plan() -> None:
    assert plan_lines(plan_of(probes=PROBES)) == [
        "batch size        118",
        "learning rate     0.000461 (linear: 0.001 × 118 / 256)",
        "  after           Goyal et al. 2017, arXiv 1706.02677: ResNet-50, SGD with momentum, 5 epochs of warm-up",
        "  shown for       256 to 8,192 rows (32×)",
        "  by group        0.000461, 4.61e-05",
        "EMA decay         0.9999 → 0.999954 (0.9999^0.460938, as an example), yours to set",
        "iterations        13 per epoch of 1,500 rows, the last of 84 rows",
        "peak allocated    1.86 GiB of 1.90 GiB (97.6 %); reserved 1.88 GiB",
        "budget            2.00 GiB, margin 5 %, headroom 118.0 MiB",
        "limited by        memory: 119 ran out of memory",
        "speed             412 ms per step, 286.4 samples/s",
        "device            cuda:0 (NVIDIA H200)",
        "evidence          measured: 3 probes, 1 of which did not fit",
        "notes",
        "  - the optimizer's learning rate 0.001 is taken to suit a global batch of 256 rows; if it was tuned",
        "    at another, pass base_batch_size=",
    ]


def test_a_plan_over_accumulation_ranks_and_epochs() -> None:
    request = PlanRequest(base_lr=0.1, global_batch_size=1024, world_size=4, epochs=10, dataset_size=100_000)
    lines = plan_lines(plan_of(64, dataclasses.replace(SETTING, group_lrs=()), request, limited_by="global_batch_size", best=64))
    assert lines[:9] == [
        "batch size        64 per device",
        "accumulation      4 batches per optimizer step; divide each loss by that number",
        "global batch      1,024 (64 × 4 accumulation steps × 4 devices)",
        "learning rate     0.4 (linear: 0.1 × 1024 / 256)",
        "  after           Goyal et al. 2017, arXiv 1706.02677: ResNet-50, SGD with momentum, 5 epochs of warm-up",
        "  shown for       256 to 8,192 rows (32×)",
        "warm-up           linear, from 0.1 to 0.4 over the first 490 optimizer steps",
        "EMA decay         0.9999 → 0.9996 (0.9999^4, as an example), yours to set",
        "iterations        391 per epoch of 100,000 rows, the last of 40 rows",
    ]
    assert lines[9] == "optimizer steps   98 per epoch, 980 in 10 epochs"


def test_a_plan_that_knows_little_shows_little() -> None:
    plan = BatchPlan(batch_size=8, global_batch_size=8, limited_by="memory", best=8, exact=True, budget=0, cap=0, margin=0, device="cpu")
    assert plan_lines(plan) == [
        "batch size        8",
        "peak allocated    peak unknown, cap 0 B",
        "budget            0 B, margin 0 %",
        "limited by        memory: nothing above 8 fitted",
        "device            cpu",
        "evidence          measured: 0 probes, 0 of which did not fit",
    ]


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({}, "memory: 119 ran out of memory"),
        ({"wall": 120, "wall_kind": "predicted"}, "memory: 120 is predicted not to fit"),
        ({"wall": 121}, "memory: 121 did not fit"),
        ({"limited_by": "max_batch_size"}, "max_batch_size: 118 fits and nothing larger is permitted"),
        ({"limited_by": "dataset"}, "dataset: 118 fits, and a larger batch would be more than the data set has"),
        ({"limited_by": "global_batch_size"}, "global_batch_size: 118 fits and is all of a device's share"),
        ({"limited_by": "time_limit"}, "time_limit: the search was stopped when 118 was the largest size known to fit"),
        ({"batch_size": 64, "limited_by": "throughput"}, "throughput: 118 fits too, but is hardly faster (3 % or less)"),
        ({"batch_size": 64}, "memory: 119 ran out of memory; 118 fits, and 64 is the equal share of the global batch"),
        ({"limited_by": "the \x1bmoon"}, r"the \x1bmoon"),
    ],
)
def test_the_limit_is_told_in_a_sentence(changes: dict[str, Any], shown: str) -> None:
    assert row(plan_of(**changes), "limited by") == shown


@pytest.mark.parametrize(
    ("outcome", "shown"),
    [
        (Outcome.TIGHT, "memory: 119 fitted only after the allocator had run out and retried"),
        (Outcome.HOST_OOM, "memory: 119 ran out of host memory"),
        (Outcome.KERNEL_LIMIT, "memory: 119 is beyond what a kernel can index, whatever the memory"),
        (Outcome.TIMEOUT, "memory: 119 did not end in time"),
        (Outcome.CRASHED, "memory: 119 crashed the worker"),
    ],
)
def test_the_wall_says_how_it_stopped_the_search(outcome: Outcome, shown: str) -> None:
    probes = (*PROBES, Probe(batch_size=119, outcome=outcome))
    assert row(plan_of(probes=probes), "limited by") == shown


def test_a_warm_up_is_shown_only_when_the_rate_grew() -> None:
    grown = PlanRequest(base_batch_size=59)
    assert row(plan_of(request=grown), "warm-up") == "linear, from 0.001 to 0.002 over the first 65 optimizer steps"
    endless = dataclasses.replace(SETTING, dataset_size=None)
    assert row(plan_of(at=endless, request=grown), "warm-up") == "linear, from 0.001 to 0.002 over the first 5 epochs"
    assert row(plan_of(), "warm-up") is None


@pytest.mark.parametrize(
    ("plan", "shown"),
    [
        (plan_of(), "batch size 118 · learning rate 0.000461 · 13 iterations per epoch"),
        (plan_of(request=PlanRequest(dataset_size=118)), "batch size 118 · learning rate 0.000461 · 1 iteration per epoch"),
        (plan_of(64, request=PlanRequest(global_batch_size=128, dataset_size=640)),
         "batch size 64 · 2 accumulation steps · learning rate 0.0005 · 10 iterations per epoch"),
        (plan_of(at=dataclasses.replace(SETTING, group_lrs=(), dataset_size=None)), "batch size 118"),
    ],
)  # fmt: skip
def test_the_answer_in_one_line(plan: BatchPlan, shown: str) -> None:
    assert answer_line(plan) == shown


def test_options_and_variables_for_a_job_script() -> None:
    request = PlanRequest(base_lr=0.1)
    plain_plan = plan_of(384, request=request, best=384)
    assert args_line(plain_plan) == "--batch-size 384 --lr 0.15"
    assert env_lines(plain_plan) == [
        "AUTOBATCH_BATCH_SIZE=384",
        "AUTOBATCH_LR=0.15",
        "AUTOBATCH_ACCUMULATION_STEPS=1",
        "AUTOBATCH_GLOBAL_BATCH_SIZE=384",
    ]
    accumulated = plan_of(64, request=PlanRequest(base_lr=1e-5, global_batch_size=192))
    assert args_line(accumulated) == "--batch-size 64 --lr 7.5e-06 --gradient-accumulation-steps 3"
    assert env_lines(accumulated)[1:] == [
        "AUTOBATCH_LR=7.5e-06",
        "AUTOBATCH_ACCUMULATION_STEPS=3",
        "AUTOBATCH_GLOBAL_BATCH_SIZE=192",
    ]


def test_without_a_learning_rate_none_is_shown() -> None:
    plan = plan_of(at=dataclasses.replace(SETTING, group_lrs=()))
    assert args_line(plan) == "--batch-size 118"
    assert env_lines(plan) == ["AUTOBATCH_BATCH_SIZE=118", "AUTOBATCH_ACCUMULATION_STEPS=1", "AUTOBATCH_GLOBAL_BATCH_SIZE=118"]
    assert row(plan, "learning rate") is None


def test_one_line_a_probe_in_columns() -> None:
    assert [probe_line(probe, CAP) for probe in PROBES] == [
        "batch size      64  fits                1000.0 MiB of 1.90 GiB (51.4 %)     200 ms/step  610 ms in all",
        "batch size     119  out of memory       peak unknown, cap 1.90 GiB          300 ms in all",
        "batch size     118  fits, confirmed     1.86 GiB of 1.90 GiB (97.6 %)       412 ms/step  2.5 s in all",
    ]
    assert probe_line(PROBES[0], None).startswith("batch size      64  fits                1000.0 MiB  ")
    assert probe_line(Probe(batch_size=4, outcome=Outcome.FIT), None) == "batch size       4  fits                peak unknown"


@pytest.mark.parametrize(
    ("outcome", "verdict"),
    [
        (Outcome.TIGHT, "too tight"),
        (Outcome.HOST_OOM, "out of host memory"),
        (Outcome.KERNEL_LIMIT, "kernel limit"),
        (Outcome.TIMEOUT, "timed out"),
        (Outcome.CRASHED, "crashed"),
    ],
)
def test_a_probe_that_did_not_fit_says_why(outcome: Outcome, verdict: str) -> None:
    probe = Probe(batch_size=7, outcome=outcome, message="said\n\x1b[31mso", seconds=1234.5)
    peak = "peak unknown, cap 1.90 GiB        "
    assert probe_line(probe, CAP) == f"batch size       7  {verdict:<18}  {peak}  1234 s in all  said\\n\\x1b[31mso"
    assert f"{verdict} (confirming)" in probe_line(dataclasses.replace(probe, confirmation=True), CAP)


def test_a_long_message_is_cut() -> None:
    line = probe_line(Probe(batch_size=7, outcome=Outcome.CRASHED, message="x" * 500), CAP)
    assert line.endswith("  " + "x" * 119 + "…")


def test_a_setting() -> None:
    assert setting_lines(SETTING) == [
        "device    cuda:0 (NVIDIA H200), 16.00 GiB",
        "budget    2.00 GiB, trials capped at 1.90 GiB (margin 5 %)",
        "resident  350.0 MiB of parameters, buffers, gradients and optimizer state",
    ]
    reading = MemoryReading(capacity=8 * GIB, free=4 * GIB)
    bare = dataclasses.replace(SETTING, device="cpu", device_description="CPU", reading=reading, resident=0, margin=0.125)
    assert setting_lines(bare) == ["device    cpu, 8.00 GiB", "budget    2.00 GiB, trials capped at 1.90 GiB (margin 12.5 %)"]


def test_who_else_holds_memory() -> None:
    others = [ProcessMemory(pid=12, name="py\x1b[2Jthon", used=3 * GIB), ProcessMemory(pid=13)]
    shown = r"others    py\x1b[2Jthon (pid 12) 3.00 GiB, a process (pid 13) an unknown amount"
    reading = dataclasses.replace(SETTING.reading, others=tuple(others))
    assert setting_lines(dataclasses.replace(SETTING, reading=reading))[-1] == shown
    crowd = dataclasses.replace(reading, others=(*others, *(ProcessMemory(pid=pid, name="x", used=MIB) for pid in range(5))))
    assert setting_lines(dataclasses.replace(SETTING, reading=crowd))[-1].endswith(", x (pid 2) 1.0 MiB, 2 more")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain × text – fine", "plain × text – fine"),
        ("two\nlines\r\n", r"two\nlines\r\n"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("turned \u202e round", r"turned \u202e round"),
        ("half \ud800", r"half \ud800"),
        ("\x9b1m", r"\x9b1m"),
        ("line\u2028end", r"line\u2028end"),
    ],
)
def test_control_characters_are_shown_never_sent(text: str, shown: str) -> None:
    assert plain(text) == shown
    hostile = BatchPlan(
        batch_size=8, global_batch_size=8, limited_by=text, best=8, exact=True, budget=9, cap=9, margin=0, device=text, lr=0.1,
        device_description=text, lr_rule=text, lr_formula=text, notes=(text,), evidence=text,
    )  # fmt: skip
    setting = dataclasses.replace(SETTING, device=text, device_description=text)
    lines = [*plan_lines(hostile), answer_line(hostile), args_line(hostile), *env_lines(hostile), *setting_lines(setting)]
    assert all(line.isprintable() for line in lines)


def test_what_else_goes_with_the_batch_and_who_sets_it() -> None:
    options = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "decoupled_weight_decay": 0.01}
    adamw = dataclasses.replace(
        SETTING, optimizer_name="AdamW", group_options=(options, {**options, "decoupled_weight_decay": 0.0}), batch_norm_momentum=0.1
    )
    lines = plan_lines(plan_of(at=adamw, request=PlanRequest(base_batch_size=8, lr_rule="sqrt", epochs=10)))
    assert lines[1:15] == [
        "learning rate     0.00384 (sqrt: 0.001 × √(118 / 8))",
        "  after           Krizhevsky 2014, arXiv 1404.5997; for RMSprop and Adam, Malladi et al. 2022, arXiv 2205.10287",
        "  shown for       1,024 to 4,096 sequences (4×) in the training of a language model, Merrill et al. 2025, arXiv 2505.23971",
        "  by group        0.00384, 0.000384",
        "warm-up           linear, from 0.001 to 0.00384 over the first 65 optimizer steps",
        "beta1             0.9 → 0.211386 (0.9^14.75), set by apply(optimizer, everything=True)",
        "  but             growth × (1 − beta1) = 1.47 is not small, as the SDE rule takes it to be",
        "beta2             0.999 → 0.985351 (0.999^14.75), set by apply(optimizer, everything=True)",
        "eps               1e-08 → 2.60378e-09 (1e-08 / √14.75), set by apply(optimizer, everything=True)",
        "weight decay      0.01 → 0.0384057 (0.01 × 14.75 / 3.84057), set by apply(optimizer, everything=True)",
        "EMA decay         0.9999 → 0.998526 (0.9999^14.75, as an example), yours to set",
        "BatchNorm         momentum 0.1 → 0.788614 (1 − (1 − 0.1)^(118 / 8)), yours to set",
        "  but             only if one device ran the 8 rows of the base batch at once",
        "iterations        13 per epoch of 1,500 rows, the last of 84 rows",
    ]


def test_a_global_batch_in_one_piece_says_that_nothing_is_accumulated() -> None:
    request = PlanRequest(global_batch_size=118)
    shown = "none: one batch is all of a device's share of the global batch"
    assert row(plan_of(request=request, limited_by="global_batch_size"), "accumulation") == shown
    assert row(plan_of(), "accumulation") is None


def test_the_knee_is_shown_with_its_line_or_why_there_is_none() -> None:
    times = {64: 0.2, 100: 0.29, 118: 0.335}
    probes = [Probe(batch_size=size, outcome=Outcome.FIT, seconds_per_step=seconds) for size, seconds in times.items()]
    assert (
        row(plan_of(probes=probes), "knee")
        == "94 rows for 97 % of the best samples/s (40 ms per batch + 2.5 ms per row, 0 % off at the most)"
    )
    tiled = [*probes, Probe(batch_size=80, outcome=Outcome.FIT, seconds_per_step=0.3)]
    off = row(plan_of(probes=tiled), "knee")
    assert off is not None
    assert off.startswith("not predicted: times are on no line of a + b × rows (")
    assert row(plan_of(), "knee") is None
