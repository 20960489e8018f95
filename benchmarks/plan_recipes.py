"""Plans the recipes on the machines that they were written for, and prints the tables of docs/plan.md.

    python benchmarks/plan_recipes.py --out benchmarks/results       # about 15 minutes on two cores, no GPU

Each plan is what scripts/plan.py gives, with a search of what fits, and is written to plan-NAME.json.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
GIB = 2**30
# Name: recipe, GPU, how many.
TARGETS = {
    "7b": ("prosparse_7b", "a100-80", 8),
    "7b-a100-40": ("prosparse_7b_a100_40gb", "a100-40", 8),
    "13b": ("prosparse_13b", "a100-80", 32),
    "1b": ("prosparse_1b", "a100-80", 8),
}


def _commit() -> str:
    """The commit that was planned with, marked when files differ from it."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _times(plan: dict[str, Any]) -> list[str]:
    """Cells: step in seconds, causal and full MFU in percent; hard bound / expected."""
    step, causal, full = plan["step_seconds"], plan["mfu_causal"], plan["mfu_full"]
    shares = [f"{100 * mfu['hard']:.0f} / {100 * mfu['expected']:.0f} %" for mfu in (causal, full)]
    return [f"{step['hard']:.1f} / {step['expected']:.1f}", *shares]


def _tables(records: dict[str, dict[str, Any]]) -> list[str]:
    heads = "recipe|on|seq. a GPU, remat|state|gradients|activations|temporaries|peak GiB|of usable|step s|MFU|MFU full"
    lines = [_row(*heads.split("|")), _row(*["---"] * 12)]
    for plan in records.values():
        parts = {name: size / GIB for name, size in plan["parts"].items()}
        state = parts["parameters"] + parts["optimizer"]
        setting = f"{plan['micro_batch_per_gpu']}, {plan['training']['remat']}"
        sizes = [f"{x:.1f}" for x in (state, parts["gradients"], parts["activations"], parts["temporaries"])]
        memory = [f"**{plan['peak_bytes'] / GIB:.1f}**", f"{plan['usable_bytes'] / GIB:.1f}"]
        lines.append(_row(plan["config"], f"{plan['gpus']} {plan['gpu']}", setting, *sizes, *memory, *_times(plan)))
    for name, plan in records.items():
        lines += [
            "",
            f"Communication, {name}:",
            "",
            _row("collective", "type", "where", "each", "arrays", "runs", "GiB"),
        ]
        lines.append(_row(*["---"] * 7))
        for c in plan["collectives"]:
            counts = (c["per_iteration"], c["tensors"], c["count"])
            lines.append(_row(c["kind"], c["dtype"], c["where"], *counts, f"{c['bytes'] / GIB:.2f}"))
    for name, plan in records.items():
        lines += [
            "",
            f"Tried, {name}:",
            "",
            _row("remat", "seq. a GPU", "peak GiB", "fits", "step s", "MFU", "MFU full"),
        ]
        lines.append(_row(*["---"] * 7))
        for trial in plan["search"]["trials"]:
            tried = trial["plan"]
            cells = (
                [f"{tried['peak_bytes'] / GIB:.1f}", "yes" if tried["fits"] else "no", *_times(tried)] if tried else []
            )
            lines.append(_row(trial["remat"], trial["micro_batch_per_gpu"], *cells))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="directory for plan-NAME.json (default: nothing is written)")
    parser.add_argument("--only", choices=TARGETS, nargs="+", default=list(TARGETS), help="some of the targets")
    arguments = parser.parse_args()
    sys.path.insert(0, str(REPOSITORY))
    from rich.console import Console

    from prosparse_jax.config_io import load_config
    from prosparse_jax.observe.files import write_json_atomic
    from prosparse_jax.plan.commands import plan_run

    records = {}
    console = Console(stderr=True)
    for name in arguments.only:
        recipe, gpu, gpus = TARGETS[name]
        config = load_config(REPOSITORY / "configs" / f"{recipe}.py")
        record = plan_run(config, gpu, gpus, network_gbits=None, searching=True, console=console)
        command = f"python benchmarks/plan_recipes.py --only {name}"
        records[name] = {"what": "plan, compiled without a GPU", "commit": _commit(), "command": command} | record
        if arguments.out:
            write_json_atomic(arguments.out / f"plan-{name}.json", records[name])
    print("\n".join(_tables(records)))


if __name__ == "__main__":
    main()
