"""The kernels compiled for A100 and H100 on a machine that has neither: what the compilers made of them."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs JAX's CUDA plugin"),
]

# Kernel, shape, tokens; blocks that must be resident on a multiprocessor at a time, by the registers.
KERNELS = {
    "fused-7b-1": 3,
    "fused-13b-1": 3,
    "gate_up-7b-1": 4,
    "gate_up-7b-8": 4,
    "gate_up-13b-8": 4,
    "down-7b-8": 4,
    "down-13b-8": 4,
}
ODD = ("fused-1b-1", "gate_up-1b-4", "down-1b-4")
PROGRAMS = ("scan-7b-1", "tensor-7b-1")
REGISTERS, THREADS, GRANULE = 65536, 128, 8
MATRIX_BYTES = 4096 * 11008 * 2


@pytest.fixture(scope="module", params=["a100-80", "h100"])
def compiled(request):
    """What tests.kernels.compile_kernel reports for one card."""
    # Programs last: a kernel that was compiled before is not compiled, and so not reported, again.
    command = [sys.executable, "-m", "tests.kernels.compile_kernel", request.param, *KERNELS, *ODD, *PROGRAMS]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def resident_blocks(registers: int) -> int:
    return REGISTERS // (-(-registers // GRANULE) * GRANULE * THREADS)


def test_nothing_is_spilled_and_rows_are_skipped_by_a_branch(compiled):
    for name in (*KERNELS, *ODD):
        (kernel,) = compiled[name]["kernels"]
        assert (kernel["spill stores"], kernel["stack"]) == (0, 0), name
        # One for every row of a block: 4 in the fused kernel and in step 3, 2 in step 2.
        assert kernel["branches"] >= (2 if name.startswith("gate_up") else 4), name


def test_weights_are_loaded_16_bytes_at_a_time(compiled):
    for name in KERNELS:
        (kernel,) = compiled[name]["kernels"]
        assert kernel["16-byte loads"] >= 4, name
        # The threshold, or the gates of a neuron.
        assert kernel["other loads"] <= 2, name


def test_registers_leave_room_for_the_blocks_that_the_grids_count_on(compiled):
    for name, blocks in KERNELS.items():
        (kernel,) = compiled[name]["kernels"]
        assert resident_blocks(kernel["registers"]) >= blocks, (name, kernel["registers"])


def test_a_scan_over_stacked_weights_copies_none(compiled):
    assert compiled["scan-7b-1"]["temporary"] < MATRIX_BYTES / 10


def test_neurons_split_over_eight_gpus_need_one_sum(compiled):
    assert compiled["tensor-7b-1"]["all_reduces"] == 1
    assert compiled["tensor-7b-1"]["temporary"] < MATRIX_BYTES / 10
