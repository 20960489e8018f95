"""Times the gated FFN of a LLaMA-shaped model, dense and with the rows of inactive neurons left out.

  python scripts/profile_ffn.py --model 7b --sparsity 0.89 --out runs/ffn-7b.json
  python scripts/profile_ffn.py --model 1b --trace runs/trace      # then: xprof --logdir runs/trace

Step 1 is the gate products, always dense; step 2 the up rows and step 3 the down rows of active neurons. Weights are
random: a time depends only on which neurons are active. Every figure stands beside its limit, the bytes that must be
read at the copy bandwidth measured in the same run, and beside the paper's. Copying also writes, which costs a CPU more
than reading, so that a CPU can pass that limit. GPU times come from a compiled loop of calls, CPU times from single calls.
"""

import argparse
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prosparse_jax.errors import ConfigError, run_script

# Microseconds on an A100: dense and sparse (ProSparse with the shifted threshold) of steps 2 and 3; paper, table 2.
PAPER_US = {
    "7b": {"step2": (90.55, 45.38), "step3": (82.92, 55.05)},
    "13b": {"step2": (131.36, 53.78), "step3": (113.68, 66.73)},
}
PAPER_SPARSITY = {"7b": 0.8932, "13b": 0.888}
DEFAULT_SPARSITY = 0.89


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="shape: 7b, 13b, 1b or toy (default: 7b on a GPU, 1b on a CPU)")
    parser.add_argument("--batch", type=int, default=1, help="tokens per call (default 1; 8 at most for mosaic_gpu)")
    parser.add_argument("--sparsity", type=float, help="share of inactive neurons (default 0.89)")
    parser.add_argument(
        "--pattern", type=Path, help=".npy of real activations, (tokens, neurons), that says which neurons are active"
    )
    parser.add_argument(
        "--implementation",
        help="of the sparse steps: mosaic_gpu (GPU only), xla_gather, or xla_dense (default: mosaic_gpu on a GPU, "
        "xla_gather on a CPU)",
    )
    parser.add_argument("--trace", type=Path, help="also write a profiler trace to this folder, for XProf or Perfetto")
    parser.add_argument("--out", type=Path, help="JSON file for the figures; a chart goes beside it as .png")
    return parser


def _problems(arguments: argparse.Namespace, platform_name: str) -> list[str]:
    from typing import get_args

    from pallas_kernels.api import Implementation
    from pallas_kernels.bench import CALLS, SHAPES
    from pallas_kernels.shapes import LARGEST_BATCH

    found = []
    if arguments.model not in SHAPES:
        found.append(f"--model is {arguments.model!r}; choose one of {', '.join(SHAPES)}")
    else:
        # The first columns tell the tokens of all calls apart, half of them at most.
        most = SHAPES[arguments.model][0] // (2 * CALLS)
        if not 1 <= arguments.batch <= most:
            found.append(f"--batch is {arguments.batch}; it must be 1 to {most} for this model")
    if arguments.implementation not in get_args(Implementation):
        found.append(
            f"--implementation is {arguments.implementation!r}; choose one of {', '.join(get_args(Implementation))}"
        )
    if arguments.implementation == "mosaic_gpu":
        if platform_name != "gpu":
            found.append(f"--implementation mosaic_gpu needs a GPU, this is a {platform_name}; choose xla_gather")
        if arguments.batch > LARGEST_BATCH:
            found.append(f"--batch is {arguments.batch}; mosaic_gpu takes at most {LARGEST_BATCH}")
    if arguments.pattern and arguments.sparsity is not None:
        found.append("--pattern already says how many neurons are active; leave out --sparsity")
    if arguments.sparsity is not None and not 0 <= arguments.sparsity < 1:
        found.append(f"--sparsity is {arguments.sparsity}; it must be at least 0 and below 1, such as 0.89")
    if arguments.out and arguments.out.suffix != ".json":
        found.append(f"--out is {arguments.out}; it must end in .json, a .png goes beside it")
    return found


def _read_pattern(path: Path, neurons: int, batch: int) -> Any:
    """Active neurons, bool (tokens, neurons); raises ConfigError with all that is wrong with the file."""
    import numpy as np

    try:
        activations = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError([f"--pattern {path} cannot be read as a .npy file: {error}"]) from error
    found = []
    if not isinstance(activations, np.ndarray) or activations.ndim != 2 or activations.dtype.kind not in "fiub":
        told = getattr(activations, "shape", "several arrays"), getattr(activations, "dtype", "")
        found.append(f"--pattern {path} holds {told[0]} {told[1]}; it must be one array of numbers, (tokens, neurons)")
        raise ConfigError(found)
    if activations.shape[1] != neurons:
        found.append(
            f"--pattern {path} has {activations.shape[1]} neurons, the model {neurons}; choose the --model it is of"
        )
    if len(activations) < batch:
        found.append(f"--pattern {path} has {len(activations)} tokens, fewer than --batch {batch}; lower --batch")
    if not np.isfinite(activations).all():
        found.append(f"--pattern {path} holds NaN or infinities; it must be finite activations, 0 where inactive")
    if found:
        raise ConfigError(found)
    return activations != 0


def _masks(arguments: argparse.Namespace, neurons: int) -> Any:
    """Active neurons of every call, bool (calls, batch, neurons)."""
    import numpy as np

    from pallas_kernels.bench import CALLS, random_masks

    tokens = CALLS * arguments.batch
    if arguments.pattern is None:
        sparsity = DEFAULT_SPARSITY if arguments.sparsity is None else arguments.sparsity
        return random_masks(tokens, neurons, sparsity).reshape(CALLS, arguments.batch, neurons)
    masks = _read_pattern(arguments.pattern, neurons, arguments.batch)
    # Spread over the file, a call's tokens next to each other; again from the start where the file is too short.
    starts = np.linspace(0, len(masks) - arguments.batch, CALLS).astype(int)
    return np.stack([masks[start : start + arguments.batch] for start in starts])


def _record(arguments: argparse.Namespace, masks: Any, times: Any) -> dict[str, Any]:
    """What the JSON file holds; times in microseconds."""
    import jax

    def in_us(seconds: dict[str, float]) -> dict[str, float]:
        return {step: 1e6 * value for step, value in seconds.items()}

    device = jax.devices()[0]
    record = {
        "device": device.device_kind if device.platform == "gpu" else f"{_processor()}, CPU",
        "model": arguments.model,
        "batch": arguments.batch,
        "sparsity": 1 - float(masks.mean()),
        "implementation": arguments.implementation,
        "dense_us": in_us(times.dense),
        "sparse_us": in_us(times.sparse),
        "limit_us": in_us(times.limit),
        "speedup": {step: times.dense[step] / seconds for step, seconds in times.sparse.items()},
        "copy_gb_per_s": times.copy_bandwidth / 1e9,
        "versions": {name: version(name) for name in ("jax", "jaxlib")} | {"python": platform.python_version()},
    }
    if times.dense_torch is not None:
        record["dense_torch_us"] = 1e6 * times.dense_torch
        record["versions"]["torch"] = version("torch")
        record["speedup"]["ffn"] = min(times.dense["ffn"], times.dense_torch) / times.sparse["ffn"]
    return record


def _processor() -> str:
    """The name of the CPU, as far as the system tells."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _table(record: dict[str, Any], moved_bytes: dict[str, float]) -> Any:
    """Times, speed-ups, GB/s and shares of the limit, and the paper's times for steps 2 and 3."""
    from rich.table import Table

    shown = record["model"] if record["model"] in PAPER_US else "7b"
    table = Table(
        title=f"FFN {record['model']}, batch {record['batch']}, sparsity {100 * record['sparsity']:.1f} %, "
        f"{record['implementation']} on {record['device']}",
        caption=f"times in microseconds; limit at {record['copy_gb_per_s']:.1f} GB/s of copying; paper: {shown} at "
        f"{100 * PAPER_SPARSITY[shown]:.1f} %, A100, dense / sparse",
    )
    for name in ("", "dense", "sparse", "speed-up", "GB/s", "limit", "of limit", "paper", "speed-up"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for step, dense in record["dense_us"].items():
        # Step 1 is the same in both; its own figures are those of the dense form.
        taken, limit = record["sparse_us"].get(step, dense), record["limit_us"][step]
        paper = PAPER_US[shown].get(step)
        table.add_row(
            {"ffn": "whole FFN"}.get(step, step.replace("step", "step ")),
            f"{dense:,.1f}",
            f"{taken:,.1f}" if step in record["sparse_us"] else "-",
            f"{record['speedup'][step]:.2f}x" if step in record["speedup"] else "-",
            f"{moved_bytes[step] / taken / 1e3:,.1f}",
            f"{limit:,.1f}",
            f"{100 * limit / taken:.0f} %",
            f"{paper[0]} / {paper[1]}" if paper else "-",
            f"{paper[0] / paper[1]:.2f}x" if paper else "-",
        )
    if "dense_torch_us" in record:
        table.add_row("whole, torch", f"{record['dense_torch_us']:,.1f}")
    return table


def _draw(record: dict[str, Any], path: Path) -> None:
    """Bars of dense and sparse times by step, and a line across each at its limit."""
    from prosparse_jax.observe import figures

    title = f"FFN {record['model']}, batch {record['batch']}, {100 * record['sparsity']:.0f} % sparse"
    figure = figures.new_figure(4.6, title)
    axes = figure.add_subplot()
    figures.dress(axes, y_label="microseconds per call", x_label=f"{record['implementation']} on {record['device']}")
    steps = list(record["dense_us"])
    dense = axes.bar([i - 0.2 for i in range(len(steps))], record["dense_us"].values(), 0.38, color=figures.BLUE)
    places = [steps.index(step) + 0.2 for step in record["sparse_us"]]
    sparse = axes.bar(places, record["sparse_us"].values(), 0.38, color=figures.VERMILION)
    limit = axes.hlines(
        [record["limit_us"][step] for step in steps],
        [i - 0.42 for i in range(len(steps))],
        [i + 0.42 for i in range(len(steps))],
        color=figures.INK,
        linestyle="dashed",
    )
    for place, step in zip(places, record["sparse_us"], strict=True):
        text = f"{record['speedup'][step]:.2f}×"
        axes.annotate(text, (place, record["sparse_us"][step]), (0, 4), textcoords="offset points", ha="center")
    axes.set_xticks(range(len(steps)), ["gate (1)", "up (2)", "down (3)", "whole FFN"])
    figures.name_row(axes, [(dense, "dense"), (sparse, "sparse"), (limit, "byte limit of sparse")])
    figures.save(figure, path)


def main() -> None:
    arguments = _parser().parse_args()

    import jax
    import jax.numpy as jnp

    from pallas_kernels import bench
    from pallas_kernels.shapes import ffn_bytes
    from prosparse_jax.observe.files import write_json_atomic
    from prosparse_jax.observe.progress import standard_console
    from prosparse_jax.runtime import prepare_runtime

    prepare_runtime()
    on_gpu = jax.default_backend() == "gpu"
    arguments.model = arguments.model or ("7b" if on_gpu else "1b")
    arguments.implementation = arguments.implementation or ("mosaic_gpu" if on_gpu else "xla_gather")
    problems = _problems(arguments, jax.default_backend())
    if problems:
        raise ConfigError(problems)
    width, neurons = bench.SHAPES[arguments.model]
    masks = _masks(arguments, neurons)
    # XLA's CPU compiler is slow with half precision.
    dtype = jnp.dtype(jnp.bfloat16 if on_gpu else jnp.float32)
    calls = bench.make_calls(masks, width, dtype)
    union = float(masks.any(axis=1).mean())
    times = bench.measure(calls, arguments.implementation, union)
    record = _record(arguments, masks, times)
    standard_console().print(_table(record, ffn_bytes(width, neurons, dtype.itemsize, union)))
    if arguments.out:
        write_json_atomic(arguments.out, record)
        _draw(record, arguments.out.with_suffix(".png"))
        print(f"figures in {arguments.out}, chart in {arguments.out.with_suffix('.png')}")
    if arguments.trace:
        bench.trace(calls, arguments.implementation, str(arguments.trace))
        print(f"trace in {arguments.trace}: xprof --logdir {arguments.trace}")


if __name__ == "__main__":
    run_script(main)
