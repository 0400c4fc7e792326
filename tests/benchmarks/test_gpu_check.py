"""The check of a GPU, tried without one: its parts on a CPU, waits on the stand-in for CUDA."""

import json
import subprocess
import warnings
from dataclasses import replace

import pytest
import torch

from benchmarks import child, gpu_check, gpu_exact, gpu_speed, harness
from benchmarks.child import Job
from benchmarks.gpu_check import PARTS, Config, main
from benchmarks.gpu_lines import SCALES, Line, rows
from benchmarks.harness import ChildError
from posttrain.errors import ConfigError
from posttrain.packed.cuda_kernels import KERNELS
from posttrain.packed.forward import packed_logps
from posttrain.packed.kernels import PLAIN, sdpa
from tests.fakes.device import FakeCuda


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job of the tiny size, whose models and data lie in a folder of this test."""
    monkeypatch.setattr("benchmarks.workload.ROOT", tmp_path)
    return Job("", {"size": "tiny"}, "", "", str(tmp_path / "job"), "bfloat16", 1, steps=1)


class WarningCuda(FakeCuda):
    """The stand-in, which warns of each wait as CUDA's debug mode does."""

    mode = "default"

    def note_sync(self, what):
        super().note_sync(what)
        if self.mode == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)


@pytest.fixture
def cuda(monkeypatch):
    with WarningCuda() as cuda:
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda m: setattr(cuda, "mode", m))
        yield cuda


def lines_of(part, job):
    return [Line(**line) for line in json.loads(json.dumps(part(job)))]


# Kernels.


@pytest.fixture
def few(monkeypatch):
    """Kernels are compared with few heads, on short sequences, in windows of 5 tokens."""
    monkeypatch.setattr(gpu_exact, "HEADS", ((16, 16), (24, 16)))
    monkeypatch.setattr(gpu_exact, "GROUPS", (4,))
    monkeypatch.setattr(gpu_exact, "WINDOW", 50)
    monkeypatch.setattr(gpu_exact, "PROMPTS", (30, 170))
    monkeypatch.setattr(gpu_exact, "COMPLETIONS", ((50,), (10, 90)))


@pytest.mark.usefixtures("few")
def test_sdpa_is_attention_by_its_definition_and_kernels_that_are_not_here_say_so(job):
    lines = lines_of(gpu_exact.kernels, job)
    assert [line.is_met for line in lines] == [True] * 4 + [None] * 3
    assert "heads of 24/16" in lines[1].what
    assert all("needs a CUDA device" in line.note for line in lines[4:])


@pytest.mark.usefixtures("few")
def test_the_comparisons_mix_no_devices(job, cuda, monkeypatch):
    monkeypatch.setattr(gpu_exact, "this_device", lambda: cuda.device)
    assert [line.is_met for line in lines_of(gpu_exact.kernels, job)][:4] == [True] * 4
    assert [line.is_met for line in lines_of(gpu_exact.packed, job)] == [True] * 4
    assert len(cuda.uploads) > 0


def without_windows(*inputs, rules=PLAIN, **settings):
    del rules
    return sdpa(*inputs, **settings)


def with_the_neighbour(*inputs, layout, **settings):
    """All segments as one long document."""
    one = replace(
        layout, starts=[0], lengths=[sum(layout.lengths)], parents=[-1], depths=[0], plans={}
    )
    return sdpa(*inputs, layout=one, **settings)


def with_slopes_doubled(query, key, value, **settings):
    return sdpa(query, key, 2 * value - value.detach(), **settings)


def of_even_heads(query, *states, **settings):
    if query.shape[-1] != states[-1].shape[-1]:
        raise RuntimeError("query and value must have one head size")
    return sdpa(query, *states, **settings)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("kernel", [without_windows, with_the_neighbour, with_slopes_doubled])
def test_a_kernel_that_computes_something_else_misses(job, monkeypatch, kernel):
    monkeypatch.setitem(KERNELS, "sdpa", kernel)
    assert not any(line.is_met for line in lines_of(gpu_exact.kernels, job))


@pytest.mark.usefixtures("few")
def test_a_kernel_that_refuses_the_heads_of_mla_is_no_error(job, monkeypatch):
    monkeypatch.setitem(KERNELS, "sdpa", of_even_heads)
    lines = lines_of(gpu_exact.kernels, job)[:4]
    assert [line.is_met for line in lines] == [True, None, True, None]
    assert lines[1].note == "refused: query and value must have one head size"


# Packed forwards.


def test_packing_that_leaks_adds_to_the_rounding_of_bfloat16(job, monkeypatch):
    def leaking(model, batch):
        depths = [0] * len(batch.layout.depths)
        layout = replace(batch.layout, parents=[-1] * len(depths), depths=depths, plans={})
        return packed_logps(model, replace(batch, layout=layout))

    monkeypatch.setattr(gpu_exact, "packed_logps", leaking)
    assert [line.is_met for line in lines_of(gpu_exact.packed, job)] == [False] * 4


# Waits.


def test_the_waits_of_a_step_are_few(job, cuda, monkeypatch):
    monkeypatch.setattr(gpu_exact, "this_device", lambda: cuda.device)
    monkeypatch.setattr("benchmarks.groups.NUM_GENERATIONS", 2)
    lines = lines_of(gpu_exact.waits, job)
    assert [line.what.partition(",")[0] for line in lines] == ["SFT", "DPO", "GRPO"]
    assert [line.is_met for line in lines] == [True] * 3
    assert cuda.mode == "default"


def test_waits_inside_are_counted_and_no_others(cuda):
    places, numbers = [], torch.ones(2).to(cuda.device)
    numbers.sum().item()
    with gpu_exact.recorded_waits(places):
        numbers.sum().item()
        numbers.tolist()
    numbers.sum().item()
    assert len(places) == 2
    line = gpu_exact.wait_line("SFT", [*places, *places])
    assert (line.found, line.is_met) == (4, False)


# Speed and memory.


def test_our_sides_are_measured_on_the_smallest_model(job, monkeypatch):
    monkeypatch.setattr(gpu_speed, "call", call_ours)
    found = {}
    for part in (gpu_speed.model, gpu_speed.mfu, gpu_speed.growth):
        found |= {line.what: line for line in lines_of(part, job)}
    for part in (gpu_speed.dpo_learning, gpu_speed.grpo_learning, gpu_speed.decode):
        found |= {line.what: line for line in lines_of(part, job)}
    assert found.pop("SFT, MFU").note == "the peak of a CPU is not known here"
    for name, goal in (("DPO", 2), ("GRPO", 2), ("decoding", 3)):
        line = found[f"{name}, the peer's seconds over ours"]
        assert (line.found, line.goal) == (pytest.approx(2.5), goal)
        assert line.is_met == (goal == 2)
    rise = found.pop("growth of a token's cost from 512 tokens on")
    assert (rise.found >= 0, rise.goal, rise.at_most) == (True, 8, True)
    assert all(line.found > 0 for line in found.values())


OURS = {}


def call_ours(job):
    """Our side as it is; for the peer's what ours found, in two and a half times the seconds."""
    if "peer" not in job.function:
        OURS.update(child.call(job))
        return dict(OURS)
    assert job.setting.keys() & {"micro_batch", "rows"}
    return OURS | {"wall_seconds": 2.5 * OURS["wall_seconds"]}


def test_a_setting_without_memory_is_named_and_the_other_one_counts(job, monkeypatch):
    def call(job):
        if job.setting.get("micro_batch") == SCALES["tiny"].pairs:
            raise torch.OutOfMemoryError
        seconds = 6.0 if job.setting else 2.0
        return {"wall_seconds": seconds, "peak_gb": 1.0, "first": {"loss": 1.0}}

    monkeypatch.setattr(gpu_speed, "call", call)
    scale = replace(SCALES["tiny"], at_once=1)
    monkeypatch.setitem(SCALES, "tiny", scale)
    line = lines_of(gpu_speed.dpo_learning, job)[2]
    assert line.found == 3.0
    assert line.note == "reference precomputed, 1 pairs at once; no memory for one micro-batch"


def test_sides_that_do_different_work_are_not_compared(job, monkeypatch):
    def call(job):
        loss = 1.0 if job.setting else 1.1
        return {"wall_seconds": 1.0, "peak_gb": 1.0, "first": {"loss": loss}}

    monkeypatch.setattr(gpu_speed, "call", call)
    ours, _, compared = lines_of(gpu_speed.decode, job)
    assert ours.found > 0
    assert compared.found is None
    assert "The two sides do different work" in compared.note


# The whole.


def run_with(monkeypatch, tmp_path, found, **settings):
    """Run the check; `found` maps the name of a part to its lines or its error."""

    def run_child(job, _config, *, seconds):
        assert seconds > 0
        lines = found.get(job.function.partition(":")[2], [Line("a", 1.0, goal=1.0)])
        if isinstance(lines, Exception):
            raise lines
        return rows(*lines)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(gpu_check, "run_child", run_child)
    holds = main(Config(device="cpu", size="tiny", output=str(tmp_path), **settings))
    (path,) = tmp_path.glob("*.json")
    return holds, json.loads(path.read_text())


MISSED = [Line("b", 3.0, "x", goal=2.0, at_most=True)]


@pytest.mark.parametrize(
    ("found", "holds"),
    [
        ({}, True),
        ({"mfu": MISSED}, True),
        ({"decode": ChildError("the peer broke")}, True),
        ({"kernels": MISSED}, False),
        ({"packed": ChildError("out of memory")}, False),
        ({"packed": [Line("c", None, goal=1.0)]}, False),
    ],
)
def test_only_the_parts_that_judge_decide(found, holds, monkeypatch, tmp_path):
    result, report = run_with(monkeypatch, tmp_path, found)
    assert (result, report["holds"]) == (holds, holds)
    assert len(report["parts"]) == len(PARTS)


def test_a_part_that_fails_hides_no_other_and_the_table_has_all(monkeypatch, tmp_path, capsys):
    error = ChildError("mfu failed:\nTraceback\nRuntimeError: a | b")
    run_with(monkeypatch, tmp_path, {"mfu": error, "growth": MISSED}, only=["mfu", "growth"])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    assert cells[2] == ["mfu", "this part", "failed", "", "", "RuntimeError: a / b"]
    assert cells[3] == ["growth", "b", "3 x", "at most 2 x", "missed", ""]


def test_a_number_that_is_none_misses_its_goal():
    assert Line("a", float("nan"), goal=1.0, at_most=True).is_met is False


def test_the_parts_have_five_minutes_between_them():
    assert sum(part.seconds for part in PARTS) == 300


def test_without_a_gpu_there_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ConfigError, match=r"^--device cuda: expected a GPU .*, found none"
    ) as found:
        main(Config())
    assert "\n" not in str(found.value)


def test_a_process_that_takes_too_long_is_stopped(job, monkeypatch):
    def run(_command, *, timeout, **_):
        raise subprocess.TimeoutExpired("python", timeout)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ChildError, match="stopped after 5 s"):
        harness.run_child(job, Config(threads=1), seconds=5.0)
