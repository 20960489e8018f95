"""The training loop and what it leaves in the run directory.

Order inside the loop is an invariant: evaluate, save, next batch, step, log. The data iterator only moves after a save,
so a checkpoint holds the state and the iterator of the same step, and a resumed run repeats nothing and skips nothing.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from prosparse_jax import checkpoint, config_checks
from prosparse_jax.config import Config
from prosparse_jax.config_io import config_to_dict
from prosparse_jax.data.loader import training_iterator, validation_batches
from prosparse_jax.data.sources import source_names
from prosparse_jax.data.token_cache import prepare_tokens
from prosparse_jax.errors import ConfigError
from prosparse_jax.evaluation.report import source_table
from prosparse_jax.evaluation.validation import run_validation
from prosparse_jax.interop.huggingface import tokenizer_notes
from prosparse_jax.interop.weights import WeightSource
from prosparse_jax.model.transformer import activation_parameters
from prosparse_jax.observe.files import TRAINING_FILE, VALIDATION_FILE, read_jsonl, write_json_atomic
from prosparse_jax.observe.flops import Peak, model_flops_per_token, peak_flops
from prosparse_jax.observe.metrics import MetricsWriter
from prosparse_jax.observe.plots import plot_run
from prosparse_jax.observe.progress import Progress, standard_console
from prosparse_jax.training.initialise import assets_to_keep, choose_tokenizer, find_source, starting_parameters
from prosparse_jax.training.interrupt import StopRequest
from prosparse_jax.training.records import source_rows, training_record, validation_record
from prosparse_jax.training.run_directory import CHECKPOINTS, claimed, run_directory, step_to_resume
from prosparse_jax.training.setup import Program, build_program
from prosparse_jax.training.state import TrainState, initial_state
from prosparse_jax.training.step import StepMetrics
from prosparse_jax.training.telemetry import WAIT_LINES, Telemetry


class RunResult(NamedTuple):
    """How a run ended."""

    directory: Path
    step: int
    interrupted: bool
    """A signal stopped it before its last step; its state is saved and it can be resumed."""
    summary: dict[str, Any]
    """What summary.json holds."""


@dataclasses.dataclass
class _Loop:
    """One run in progress: what moves, and what it writes to."""

    program: Program
    state: TrainState
    iterator: Any
    validation_arrays: list[dict[str, np.ndarray]]
    assets: Mapping[str, bytes]
    store: checkpoint.CheckpointStore
    writer: MetricsWriter
    progress: Progress
    peak: Peak
    start: int
    """Steps done before this process."""
    telemetry: Telemetry
    skipped_updates: int = 0

    def run(self) -> tuple[int, bool]:
        """Steps from `start` to the end, or to a stop request; returns the step reached and whether it was stopped."""
        config, step = self.program.config, self.start
        compiled = self._compile()
        # Those of a resumed run were reported before.
        self.skipped_updates = int(self.state.skipped_updates)
        with StopRequest() as stop, jax.transfer_guard("disallow"):
            self.telemetry.start()
            while True:
                done, stopping = step == config.training.steps, stop.requested
                # A run that is asked to stop saves at once, since it may be killed soon; what validation is due at this
                # step, the resumed run does first.
                validates = done or (step % config.logging.evaluate_every == 0 and not stopping)
                # A resumed step is saved already; step 0 is quicker to make anew than to read.
                saves = step > self.start and (done or stopping or step % config.checkpoint.every == 0)
                if validates or saves:
                    # Steps that still run count as training.
                    jax.block_until_ready(self.state.step)
                self.telemetry.stop()
                if validates:
                    self._validate(step)
                if saves:
                    self._save(step)
                self.telemetry.start()
                if done or stopping:
                    return step, not done
                arrays = self.telemetry.next_batch(self.iterator, self.state.step)
                self.state, metrics = compiled(self.state, self.program.place_step_batch(arrays))
                step += 1
                self.telemetry.add(metrics)
                if step % config.logging.every == 0 or step == config.training.steps:
                    self._log(step, jax.device_get(metrics))

    def _compile(self) -> jax.stages.Compiled:
        began = time.perf_counter()
        compiled = self.program.lower_train_step().compile()
        self.progress.message(f"compiled the training step in {time.perf_counter() - began:.1f} s")
        return compiled

    def _validate(self, step: int) -> None:
        model = self.program.config.model
        batches = map(self.program.place_validation_batch, self.validation_arrays)
        with jax.transfer_guard("allow"):
            settings_SL = activation_parameters(model)[None, :]
            validation = run_validation(
                self.program.validate, self.state.parameters, batches, settings_SL, model.ffn_width
            )[0]
        record = validation_record(step, validation, source_names(self.program.config.data))
        self.writer.write_validation(record)
        sparsity = f"  sparsity {100 * record['sparsity']:.1f} %" if model.ffn_width else ""
        self.progress.message(
            f"step {step}: validation loss {record['loss']:.4f}  perplexity {record['perplexity']:.2f}{sparsity}"
        )

    def _save(self, step: int) -> None:
        state = self.state
        self.store.save(
            step,
            parameters=state.parameters,
            optimizer=state._replace(parameters={}),
            data_iterator=self.iterator,
            config=config_to_dict(self.program.config),
            assets=self.assets,
        )

    def _log(self, step: int, metrics: StepMetrics) -> None:
        config, interval = self.program.config, self.telemetry.take()
        record = training_record(
            step,
            metrics,
            interval,
            source_names=source_names(config.data),
            neurons=config.model.num_layers * config.model.ffn_width,
            iterator=self.iterator,
        )
        flops = model_flops_per_token(config.model, config.training.sequence_length)
        record[self.peak.metric] = self.peak.share(interval.tokens_per_second * flops, self.program.mesh.size)
        self.writer.write_training(record)
        # A model without FFNs has no sparsity to show; sequences without padding need no word.
        hidden = set() if config.model.ffn_width else {"sparsity", "l1"}
        hidden |= set() if interval.packing_efficiency < 1 else {"packing_efficiency"}
        self.progress.update({name: value for name, value in record.items() if name not in hidden})
        if (share := self.telemetry.slow_loader()) is not None:
            self.progress.message(
                f"warning: step {step}: over the last {WAIT_LINES} lines training waited {100 * share:.1f} % of the time "
                "for data; prepare the tokens beforehand, keep them on a faster disk, or leave more CPU cores free"
            )
        if record["skipped_updates"] > self.skipped_updates:
            self.progress.message(
                f"step {step}: {record['skipped_updates'] - self.skipped_updates} updates skipped since the last line, "
                "because their loss or gradient was not finite; if it goes on, lower optimizer.peak_lr"
            )
        self.skipped_updates = record["skipped_updates"]


def _starting_state(
    program: Program,
    store: checkpoint.CheckpointStore,
    step: int | None,
    source: WeightSource | None,
    iterator: Any,
) -> TrainState:
    """The state of a saved step, or that of step 0. A restored run never makes initial weights first."""
    if step is None:
        parameters = starting_parameters(program, source)
        make = jax.jit(lambda weights: initial_state(weights, program.transformation, program.config.seed))
        return make(parameters)
    abstract = program.abstract_state()
    parameters, rest = store.restore(
        step, parameters=abstract.parameters, optimizer=abstract._replace(parameters={}), data_iterator=iterator
    )
    return rest._replace(parameters=parameters)


def train(config: Config, *, resume: bool = False, console: Console | None = None) -> RunResult:
    """Runs `config` to its last step, or until SIGINT or SIGTERM, and writes everything into its run directory.

    `resume` continues from the newest checkpoint there, bit-exactly on the same devices. Raises ConfigError,
    DataError, CheckpointError or FileNotFoundError for what a user can mend.
    """
    console = console or standard_console()
    # Rich would break a path in two at the width of the terminal.
    say = functools.partial(console.print, soft_wrap=True)
    began = time.perf_counter()
    # A run that continues has its weights: it no longer needs what it started from.
    files = config_checks.missing_files(dataclasses.replace(config, init_from="") if resume else config)
    if found := [*files, *config_checks.problems(config, jax.device_count())]:
        raise ConfigError(found)
    program = build_program(config)
    for warning in config_checks.warnings(config):
        say(f"warning: {warning}")
    directory, training = run_directory(config), config.training
    # Before anything is made or read: init_from may not fit. A run that continues does not need it.
    source = None if resume else find_source(config)
    with (
        claimed(directory),
        jax.set_mesh(program.mesh),
        checkpoint.CheckpointStore(directory / CHECKPOINTS, keep=config.checkpoint.keep) as store,
    ):
        saved = step_to_resume(config, store, resume=resume, say=say)
        if saved is None and resume:
            source = find_source(config)
        for note in tokenizer_notes(source) if source and not config.data.tokenizer else ():
            say(note)
        assets = source.assets if source else None
        if saved is not None:
            assets = checkpoint.read_assets(store.directory / str(saved))
        tokenizer = choose_tokenizer(config, assets, config.init_from or str(directory), say)
        tokens = prepare_tokens(config.data, tokenizer)
        iterator = training_iterator(
            tokens.train,
            sequence_length=training.sequence_length,
            batch_size=training.sequences_per_step,
            seed=config.seed,
        )
        validation_arrays = validation_batches(
            tokens.validation,
            sequence_length=training.sequence_length,
            batch_size=program.micro_batch,
            sequences=config.logging.evaluation_sequences,
        )
        state = _starting_state(program, store, saved, source, iterator)
        start = saved or 0
        write_json_atomic(directory / "config.json", config_to_dict(config))
        with (
            MetricsWriter(directory, tensorboard=config.logging.tensorboard, resume_step=start) as writer,
            Progress(training.steps, start_step=start, console=console) as progress,
        ):
            loop = _Loop(
                program, state, iterator, list(validation_arrays), assets_to_keep(tokenizer, assets), store, writer,
                progress, peak_flops(jax.devices()[0]), start,
                Telemetry(training.sequences_per_step * training.sequence_length),
            )  # fmt: skip
            step, interrupted = loop.run()
    result = _finish(config, loop, step, interrupted, time.perf_counter() - began)
    if rows := result.summary.get("sources"):
        console.print(source_table(result.summary["validation"], rows))
    return result


def _finish(config: Config, loop: _Loop, step: int, interrupted: bool, wall_seconds: float) -> RunResult:
    """Writes summary.json and the plots. What an earlier life of a resumed run took is added to what this one took."""
    directory = run_directory(config)
    earlier = _summary_of(directory) if loop.start else {}
    validations = read_jsonl(directory / VALIDATION_FILE)
    summary = {
        "name": config.name,
        "step": step,
        "steps": config.training.steps,
        "wall_seconds": wall_seconds + earlier.get("wall_seconds", 0.0),
        "tokens_per_second": loop.telemetry.mean_tokens_per_second() or earlier.get("tokens_per_second", 0.0),
        "skipped_updates": int(loop.state.skipped_updates),
        "validation": validations[-1] if validations else None,
    }
    if rows := source_rows(summary["validation"]):
        summary["sources"] = rows
    write_json_atomic(directory / "summary.json", summary)
    # A run that was stopped before its first log line has nothing to plot.
    if (directory / TRAINING_FILE).stat().st_size:
        plot_run(directory)
    return RunResult(directory, step, interrupted, summary)


def _summary_of(directory: Path) -> dict[str, Any]:
    """summary.json of a run that has ended or was stopped; empty after a kill, which leaves none."""
    path = directory / "summary.json"
    return json.loads(path.read_text()) if path.exists() else {}
