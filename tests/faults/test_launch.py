"""The launch files' own logic, with stand-ins for what they start: an unfinished run goes on, a broken one does not."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.faults

LAUNCH = Path(__file__).parents[2] / "scripts" / "launch"
FINISHES = """echo '{"finished": true}' > "$RUN/summary.json"\n"""
FAILS = "exit 2\n"
STOPS = """trap 'echo "{}" > "$RUN/summary.json"; exit 0' TERM\ntouch "$RUN/began"\nwhile :; do sleep 0.05; done\n"""


def stand_in(folder: Path, name: str, script: str) -> None:
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{script}")
    path.chmod(0o755)


def environment(folder: Path, **more: str) -> dict[str, str]:
    return os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "RUN": str(folder)} | more


@pytest.mark.parametrize(
    ("script", "code"), [(FINISHES, 0), (FAILS, 2), (STOPS, 75)], ids=["finished", "failed", "evicted"]
)
def test_a_pod_ends_with_what_the_jobset_needs_to_know(tmp_path, script, code):
    (job,) = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    stand_in(tmp_path, "python", script)
    command = [*container["command"], *container["args"]]
    process = subprocess.Popen(command, env=environment(tmp_path, JOB_COMPLETION_INDEX="3"))
    if script == STOPS:
        while not (tmp_path / "began").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == code


@pytest.mark.parametrize(
    ("script", "restarts", "requeued", "code"),
    [
        (FINISHES, {}, False, 0),
        (FAILS, {}, False, 2),
        ("""echo '{"finished": false}' > "$RUN/summary.json"\n""", {}, True, 0),
        ("exit 137\n", {}, True, 137),  # Killed before it wrote any summary.
        (f"{FINISHES}exit 1\n", {}, False, 1),
        ("exit 137\n", {"SLURM_RESTART_COUNT": "49"}, True, 137),
        ("exit 137\n", {"SLURM_RESTART_COUNT": "50"}, False, 137),
        ("exit 137\n", {"SLURM_RESTART_COUNT": "3", "MAX_RESTARTS": "3"}, False, 137),
    ],
    ids=["finished", "failed", "stopped", "crashed", "finished and then crashed", "last try", "too often", "own limit"],
)
def test_slurm_queues_an_unfinished_run_again(tmp_path, script, restarts, requeued, code):
    stand_in(tmp_path, "srun", 'echo "$@" > "$RUN/command"\n' + script)
    stand_in(tmp_path, "scontrol", 'echo "$@" > "$RUN/requeued"\n')
    command = ["bash", str(LAUNCH / "train.sbatch"), "--config", "configs/my recipe.py"]
    assert subprocess.run(command, env=environment(tmp_path, SLURM_JOB_ID="17", **restarts)).returncode == code
    assert f"--run-directory {tmp_path} --resume --config configs/my recipe.py" in (tmp_path / "command").read_text()
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 17\n"
