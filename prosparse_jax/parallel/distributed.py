"""Several processes that train one model: how they find each other, and what they have to agree on.

A launcher (SLURM's srun, Open MPI's mpirun, Kubernetes, a shell) starts the same command several times and tells each
process its place in environment variables. Every process runs the whole program; process 0 alone prints and writes what
is not sharded.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from prosparse_jax.errors import ConfigError

PLAIN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""What a launcher that is neither SLURM nor Open MPI sets: host:port of process 0, how many, and which this is."""
CONNECT_SECONDS = "PROSPARSE_CONNECT_SECONDS"
"""How long processes wait for each other at the start; 300 where it is not set."""
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "prosparse-jax")
_PROBE_SECONDS = 0.5


class Cluster(NamedTuple):
    """The place of this process among several."""

    launcher: str
    coordinator: str
    """host:port that process 0 listens on."""
    process_count: int
    process_index: int
    local_device: int | None
    """The only GPU of its machine that this process uses; None where it has the machine for itself."""


def find_cluster(environment: Mapping[str, str]) -> Cluster | None:
    """What the launcher's variables say, or None for a single process.

    Raises ConfigError with every variable that is missing, contradicts another or is no number.
    """
    for find in (_plain, _slurm, _open_mpi):
        if (cluster := find(environment)) is not None:
            return cluster if cluster.process_count > 1 else None
    return None


def _numbers(environment: Mapping[str, str], launcher: str, *names: str) -> list[int]:
    problems = [
        f"{name}={environment[name]!r} is not a whole number >= 0"
        if name in environment
        else f"{name} is not set, although {launcher} started this process"
        for name in names
        if not environment.get(name, "").isdecimal()
    ]
    if problems:
        raise ConfigError(problems)
    return [int(environment[name]) for name in names]


def _checked(cluster: Cluster, count_name: str, index_name: str) -> Cluster:
    problems = []
    if not 0 <= cluster.process_index < cluster.process_count:
        problems.append(
            f"{index_name}={cluster.process_index} must be below {count_name}={cluster.process_count}; they count from 0"
        )
    if not re.fullmatch(r".+:\d{1,5}", cluster.coordinator):
        problems.append(f"{PLAIN[0]}={cluster.coordinator!r} must be host:port of process 0, such as node1:8476")
    if problems:
        raise ConfigError(problems)
    return cluster


def _plain(environment: Mapping[str, str]) -> Cluster | None:
    address, count, index = PLAIN
    given = [name for name in PLAIN if name in environment]
    # The address alone goes with the counts of SLURM or Open MPI.
    if not given or given == [address]:
        return None
    if missing := [name for name in PLAIN if name not in environment]:
        raise ConfigError(
            [f"{' and '.join(given)} set, but not {' and '.join(missing)}; set all of {', '.join(PLAIN)}, or none"]
        )
    processes, this = _numbers(environment, "a launcher", count, index)
    return _checked(Cluster("environment variables", environment[address], processes, this, None), count, index)


def _slurm(environment: Mapping[str, str]) -> Cluster | None:
    # The batch script itself, and a shell of salloc, have SLURM's variables too, but no step: one process.
    if "SLURM_JOB_ID" not in environment or "SLURM_STEP_NODELIST" not in environment:
        return None
    names = ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_NODES", "SLURM_JOB_ID")
    count, index, local, nodes, job = _numbers(environment, "SLURM", *names)
    # node[003-007,12],other or node3,node4: the first host runs process 0.
    first = re.match(r"([^\[,]+)(?:\[(\d+))?", environment["SLURM_STEP_NODELIST"])
    if first is None:
        raise ConfigError([f"SLURM_STEP_NODELIST={environment['SLURM_STEP_NODELIST']!r} names no host"])
    # A port of the job's own among those that nobody reserves, so that two jobs on a machine do not meet.
    coordinator = environment.get(PLAIN[0]) or f"{first[1]}{first[2] or ''}:{61440 + job % 4096}"
    return _checked(Cluster("SLURM", coordinator, count, index, local if count > nodes else None), *names[:2])


def _open_mpi(environment: Mapping[str, str]) -> Cluster | None:
    names = [f"OMPI_COMM_WORLD_{name}" for name in ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE")]
    if not any(name in environment for name in names):
        return None
    count, index, local, here = _numbers(environment, "Open MPI", *names)
    coordinator = environment.get(PLAIN[0])
    if coordinator is None and count > 1:
        # Open MPI 4 tells where its launcher is, such as 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911; 5 does not.
        uri = re.fullmatch(r"(\d+)\.\d+;tcp6?://\[?([^,\]:]+).*", environment.get("OMPI_MCA_orte_hnp_uri", ""))
        if uri is None:
            raise ConfigError(
                [f"this Open MPI does not tell where process 0 is: mpirun -x {PLAIN[0]}=HOST:PORT, with any free port"]
            )
        coordinator = f"{uri[2]}:{61440 + int(uri[1]) // 65536 % 4096}"
    return _checked(
        Cluster("Open MPI", coordinator or "localhost:0", count, index, local if here > 1 else None), *names[:2]
    )


def connect(environment: Mapping[str, str] = os.environ) -> Cluster | None:
    """Joins the other processes, if the launcher started several. Call once, before JAX touches a device.

    Raises ConfigError for variables that make no sense, a process 0 that cannot be reached, or processes that do not
    all come.
    """
    if (cluster := find_cluster(environment)) is None:
        return None
    seconds = environment.get(CONNECT_SECONDS, "300")
    if not seconds.isdecimal() or int(seconds) < 1:
        raise ConfigError([f"{CONNECT_SECONDS}={seconds!r} must be a whole number of seconds"])
    if cluster.process_index:
        _wait_for_coordinator(cluster, int(seconds))
    try:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.process_count,
            cluster.process_index,
            local_device_ids=cluster.local_device,
            cluster_detection_method="deactivate",
            initialization_timeout=int(seconds),
        )
    except RuntimeError as error:
        raise ConfigError(
            [
                f"the {cluster.process_count} processes that {cluster.launcher} announces did not meet at "
                f"{cluster.coordinator} within {seconds} s: {str(error).splitlines()[0]}; look at what the others print, "
                f"check that the port is free, or raise {CONNECT_SECONDS}"
            ]
        ) from error
    if cluster.process_index:
        logging.getLogger("prosparse_jax").setLevel(logging.ERROR)
    return cluster


def _wait_for_coordinator(cluster: Cluster, seconds: int) -> None:
    """JAX ends a process whose connection fails without a word that helps, so the port is tried first."""
    host, _, port = cluster.coordinator.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((host, int(port)), timeout=_PROBE_SECONDS):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    [
                        f"process {cluster.process_index} of {cluster.process_count} cannot reach process 0 at "
                        f"{cluster.coordinator} ({error}) after {seconds} s; check that it runs, that the address is one "
                        f"the other machines know, and that no firewall closes the port (or raise {CONNECT_SECONDS})"
                    ]
                ) from error
            time.sleep(_PROBE_SECONDS)


class OtherProcessError(ConfigError):
    """Only another process failed; its own message says why."""


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def _gathered(values: np.ndarray) -> np.ndarray:
    """The values of all processes, stacked by process."""
    # A training loop forbids implicit transfers; here they are the purpose.
    with jax.transfer_guard("allow"):
        return np.asarray(multihost_utils.process_allgather(values))


@contextlib.contextmanager
def together(task: str) -> Iterator[None]:
    """A block that every process runs: an exception on one becomes one on all, so that none waits for it for ever.

    The block itself must not wait for other processes. Raises the exception of this process, or
    OtherProcessError where only others failed.
    """
    if jax.process_count() == 1:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    failed = np.flatnonzero(_gathered(np.array(failure is not None)))
    if failure is not None:
        raise failure
    if failed.size:
        names = ", ".join(map(str, failed))
        raise OtherProcessError([f"process {names} could not {task}; what it prints says why"])


def any_process(condition: bool) -> bool:
    """Whether `condition` holds on at least one process. All must call it."""
    if jax.process_count() == 1:
        return condition
    return bool(np.any(_gathered(np.array(condition))))


def from_first(task: str, compute: Callable[[], int | None]) -> int | None:
    """What `compute` gives on process 0 (a number from -1 up, or None), on every process. Its exception is one on all."""
    value = None
    with together(task):
        if is_first():
            value = compute()
    if jax.process_count() == 1:
        return value
    shared = int(_gathered(np.array(-2 if value is None else value, np.int32))[0])
    return None if shared == -2 else shared


def versions() -> dict[str, str]:
    """Versions that all processes must share: another one may compute or write something else."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def check_same_everywhere(config: Mapping[str, Any]) -> None:
    """Raises ConfigError, on every process, unless all run the same package versions and the same configuration."""
    if jax.process_count() == 1:
        return
    mine = versions() | {"configuration": json.dumps(config, sort_keys=True, default=str)}
    digests = np.stack([np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8) for text in mine.values()])
    everyone = _gathered(digests)
    problems = []
    for row, (name, text) in enumerate(mine.items()):
        other = [
            process for process in range(len(everyone)) if not np.array_equal(everyone[process, row], digests[row])
        ]
        if other:
            value = "" if name == "configuration" else f" {text}"
            processes = ", ".join(map(str, other))
            problems.append(
                f"process {jax.process_index()} has {name}{value}, process {processes} another; start all alike"
            )
    # Where two processes agree with each other, a third may still differ from both.
    if any_process(bool(problems)):
        raise ConfigError(problems or ["other processes differ from each other in versions or configuration"])
