"""A full disk: the run goes on, what was saved stays, messages say what to do, and with room again all is as if nothing
had been."""

import json
import resource
import signal
from pathlib import Path

import pytest

from tests.processes import Scripts, assert_same_run, finish, lines, parameters, printed_until, steps, stop_when

pytestmark = pytest.mark.faults


def run_out_of_room(scripts: Scripts, run: Path, *, every: int, spare: int) -> str:
    """Once the first checkpoint is there, lets files grow by no more than `spare` bytes beyond the size of the metrics.

    A limit on the size of files fails as a full disk does, in the same system calls, and needs no privileges. Returns
    what the run prints on stderr.
    """
    # Or else the limit would leave halves of modules' bytecode behind, for all later processes.
    process = scripts.start("train", "--checkpoint.every", every, env={"PYTHONDONTWRITEBYTECODE": "1"})
    stop_when(process, lambda: (run / "checkpoints" / str(every)).is_dir())
    room = (run / "metrics.jsonl").stat().st_size + spare
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (room, room))
    process.send_signal(signal.SIGCONT)
    return finish(process, 2).stderr


def assert_it_continues(scripts: Scripts, run: Path, reference: Path) -> None:
    scripts.run("train", "--resume")
    assert_same_run(run, reference)


def test_no_room_for_a_checkpoint(scripts, reference):
    run = scripts.directory / "runs" / "tiny"
    # Room for the metrics, and less than the array files of a checkpoint need.
    message = run_out_of_room(scripts, run, every=4, spare=50_000)
    assert lines(run / "metrics.jsonl")[-1]["step"] == 30  # The run has gone on.
    assert json.loads((run / "summary.json").read_text())["finished"] is False
    saved = sorted(int(path.name) for path in (run / "checkpoints").iterdir())
    assert f"that of step {saved[-1]} is complete" in message
    assert str(run / "checkpoints") in message
    assert "Free space" in message
    assert message.count("error:") == 1
    assert parameters(run)
    assert lines(run / "metrics.jsonl")[-1]["step"] >= saved[-1]
    assert_it_continues(scripts, run, reference)


def test_no_room_for_metrics(scripts, reference):
    run = scripts.directory / "runs" / "tiny"
    message = run_out_of_room(scripts, run, every=10, spare=100)
    assert message.count("error:") == 1
    assert "runs/tiny" in message
    assert "Make room and run it again (training: with --resume)" in message
    assert parameters(run)
    assert_it_continues(scripts, run, reference)


def test_room_that_comes_back(scripts, reference):
    """Saves and metrics fail for a while; at the end nothing is missing."""
    run = scripts.directory / "runs" / "tiny"
    process = scripts.start("train", "--checkpoint.every", 2, env={"PYTHONDONTWRITEBYTECODE": "1"})
    stop_when(process, lambda: (run / "checkpoints" / "2").is_dir())
    full = (run / "metrics.jsonl").stat().st_size + 100
    limit = resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (full, resource.RLIM_INFINITY))
    process.send_signal(signal.SIGCONT)
    printed = printed_until(process, "The run goes on")
    process.send_signal(signal.SIGSTOP)
    assert steps(run / "metrics.jsonl")[-1] < 30
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limit)
    process.send_signal(signal.SIGCONT)
    ended = finish(process, 0)
    assert any("warning: the checkpoint of step 4 could not be written" in line for line in printed), printed
    assert "metrics.jsonl cannot be written" in ended.stderr
    assert_same_run(run, reference)
