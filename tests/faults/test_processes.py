"""Two processes on this machine, connected as those of two machines are: they train what one trains, save one checkpoint
together, stop together, and go on in another number."""

import signal
import socket
import subprocess

import numpy as np
import pytest

from tests.processes import Scripts, finish, lines, steps, wait_until

pytestmark = [pytest.mark.faults, pytest.mark.sharding]

# Sums over two devices are added in another order; over 30 steps of Adam that grows to 3e-5 of the loss. A batch of which
# one process trains the wrong half shows as 1e-2 in the first steps.
TOLERANCE = 3e-4
RESEED = "--data.on-topology-change=reseed"


def start(
    scripts: Scripts,
    count: int,
    *arguments: object,
    environments: dict[int, dict[str, str]] | None = None,
    recipes=None,
):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    started = []
    for index in range(count):
        env = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index)}
        env |= (environments or {}).get(index, {})
        recipe = (recipes or {}).get(index, scripts.recipe)
        started.append(scripts.start("train", "--config", recipe, f"--mesh.data={count}", *arguments, env=env))
    return started


def ended(processes: list[subprocess.Popen], code: int = 0) -> list[subprocess.CompletedProcess]:
    return [finish(process, code) for process in processes]


def losses(run):
    return np.array([line["loss"] for line in lines(run / "metrics.jsonl")])


def test_two_processes_train_save_stop_and_go_on_alone(scripts, reference):
    run = scripts.directory / "runs" / "tiny"
    processes = start(scripts, 2, "--checkpoint.every", 1000)
    wait_until(processes[0], lambda: len(steps(run / "metrics.jsonl")) >= 5)
    # The second process is asked, both stop at the same step and save together.
    processes[1].send_signal(signal.SIGTERM)
    first, second = ended(processes)
    stopped = steps(run / "metrics.jsonl")[-1]
    assert [path.name for path in (run / "checkpoints").iterdir()] == [str(stopped)]
    assert f"stopped at step {stopped}, saved" in first.stdout
    # Gloo itself says one line; the run says nothing there.
    assert not [line for line in second.stdout.splitlines() if line and "Gloo" not in line]
    np.testing.assert_allclose(losses(run), losses(reference)[:stopped], rtol=TOLERANCE)
    data = run / "checkpoints" / str(stopped) / "data"
    assert sorted(path.name for path in data.iterdir()) == ["process_0-of-2.json", "process_1-of-2.json"]

    refused = scripts.run("train", "--resume", code=2)
    assert "on_topology_change" in refused.stderr
    alone = scripts.run("train", "--resume", RESEED)
    assert f"resuming from the checkpoint of step {stopped}" in alone.stdout
    assert "mesh.data: 2 -> 1" in alone.stdout
    assert steps(run / "metrics.jsonl") == list(range(1, 31))
    # From here on the text comes in another order; a lost state would start again at 5.7.
    assert losses(run)[-1] == pytest.approx(losses(reference)[-1], abs=0.2)


def test_a_run_of_one_process_goes_on_in_two(scripts, finished):
    """The checkpoint of another run's middle, so that the state is one that was trained."""
    run = scripts.directory / "runs" / "tiny"
    scripts.run("train", "--training.steps=20")
    one = losses(run)
    processes = start(scripts, 2, "--resume", RESEED, "--training.steps=26", "--logging.evaluate-every=1000")
    first, _ = ended(processes)
    assert "resuming from the checkpoint of step 20" in first.stdout
    assert steps(run / "metrics.jsonl") == list(range(1, 27))
    np.testing.assert_array_equal(losses(run)[:20], one)
    positions = {path.name for path in (run / "checkpoints" / "26" / "data").iterdir()}
    assert positions == {"process_0-of-2.json", "process_1-of-2.json"}


def test_processes_with_different_configurations_stop_before_they_compile(scripts):
    other = scripts.directory / "other.py"
    other.write_text(scripts.recipe.read_text().replace("steps=30", "steps=31"))
    alike = start(scripts, 2, recipes={1: other})
    for process in ended(alike, code=2):
        assert "process 1 has another configuration than process 0" in process.stderr
        assert "compiled" not in process.stdout


def test_settings_that_do_not_fit_several_processes(scripts):
    # Eight devices of two processes, of which the mesh uses two.
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    processes = start(scripts, 2, "--mesh.fsdp=1", "--training.sequences-per-step=3", environments={0: flags, 1: flags})
    for process in ended(processes, code=2):
        assert "uses 2 of the 8 devices of 2 processes" in process.stderr
        assert "a micro-batch of 3 sequences does not split over 2 processes" in process.stderr
        assert "compiled" not in process.stdout
