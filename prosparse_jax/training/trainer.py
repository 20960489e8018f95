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
from prosparse_jax.data.token_cache import prepare_tokens
from prosparse_jax.errors import ConfigError
from prosparse_jax.evaluation.validation import Validation, run_validation
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
from prosparse_jax.training.run_directory import CHECKPOINTS, claimed, run_directory, step_to_resume
from prosparse_jax.training.setup import Program, build_program
from prosparse_jax.training.state import TrainState, initial_state
from prosparse_jax.training.step import StepMetrics


class RunResult(NamedTuple):
    """How a run ended."""

    directory: Path
    step: int
    interrupted: bool
    """A signal stopped it before its last step; its state is saved and it can be resumed."""
    summary: dict[str, Any]
    """What summary.json holds."""


class _Rate:
    """Tokens per second of training alone: validation, saving and compiling do not count."""

    def __init__(self) -> None:
        self._tokens = self._total_tokens = 0
        self._seconds = self._total_seconds = 0.0
        self._mark = time.perf_counter()

    def start(self) -> None:
        """Time counts from now on."""
        self._mark = time.perf_counter()

    def stop(self) -> None:
        """Time does not count until `start`."""
        self._seconds += time.perf_counter() - self._mark

    def add(self, tokens: int) -> None:
        self._tokens += tokens

    def take(self) -> float:
        """Tokens per second since the last call."""
        self.stop()
        tokens, seconds = self._tokens, self._seconds
        self._total_tokens, self._total_seconds = self._total_tokens + tokens, self._total_seconds + seconds
        self._tokens, self._seconds = 0, 0.0
        self.start()
        return tokens / seconds

    def mean(self) -> float:
        """Tokens per second over all that was taken; 0 before anything was."""
        return self._total_tokens / self._total_seconds if self._total_seconds else 0.0


def training_record(step: int, metrics: StepMetrics, tokens_per_second: float) -> dict[str, Any]:
    """One line of metrics.jsonl from the metrics of step `step`, already on the host."""
    return {
        "step": step,
        "loss": float(metrics.loss),
        "l1": float(metrics.l1),
        "lambda": float(metrics.l1_factor),
        "sparsity": float(np.mean(metrics.sparsity_L)),
        "learning_rate": float(metrics.learning_rate),
        "tokens_per_second": tokens_per_second,
        "gradient_norm": float(metrics.gradient_norm),
        "mean_abs_intermediate": float(metrics.mean_abs_intermediate),
        "skipped_updates": int(metrics.skipped_updates),
        "sparsity_per_layer": [float(share) for share in metrics.sparsity_L],
    }


def validation_record(step: int, validation: Validation) -> dict[str, Any]:
    """One line of validation.jsonl."""
    return {
        "step": step,
        "loss": validation.loss,
        "perplexity": validation.perplexity,
        "sparsity": validation.sparsity,
        "never_fired_share": validation.never_fired_share,
        "tokens": validation.tokens,
        "sparsity_per_layer": validation.sparsity_per_layer,
    }


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
    rate: _Rate = dataclasses.field(default_factory=_Rate)
    skipped_updates: int = 0

    def run(self) -> tuple[int, bool]:
        """Steps from `start` to the end, or to a stop request; returns the step reached and whether it was stopped."""
        config, step = self.program.config, self.start
        compiled = self._compile()
        # Those of a resumed run were reported before.
        self.skipped_updates = int(self.state.skipped_updates)
        with StopRequest() as stop, jax.transfer_guard("disallow"):
            self.rate.start()
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
                self.rate.stop()
                if validates:
                    self._validate(step)
                if saves:
                    self._save(step)
                self.rate.start()
                if done or stopping:
                    return step, not done
                batch = self.program.place_step_batch(next(self.iterator))
                self.state, metrics = compiled(self.state, batch)
                step += 1
                self.rate.add(config.training.sequences_per_step * config.training.sequence_length)
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
        record = validation_record(step, validation)
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
        config, tokens_per_second = self.program.config, self.rate.take()
        record = training_record(step, metrics, tokens_per_second)
        flops = model_flops_per_token(config.model, config.training.sequence_length)
        record[self.peak.metric] = self.peak.share(tokens_per_second * flops, self.program.mesh.size)
        self.writer.write_training(record)
        # A model without FFNs has no sparsity to show.
        hidden = () if config.model.ffn_width else ("sparsity", "l1")
        self.progress.update({name: value for name, value in record.items() if name not in hidden})
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
            tokens,
            config.data,
            sequence_length=training.sequence_length,
            batch_size=training.sequences_per_step,
            seed=config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        by_source = validation_batches(
            tokens,
            config.data,
            sequence_length=training.sequence_length,
            batch_size=program.micro_batch,
            sequences=config.logging.evaluation_sequences,
        )
        validation_arrays = [batch for batches in by_source.values() for batch in batches]
        state = _starting_state(program, store, saved, source, iterator)
        start = saved or 0
        write_json_atomic(directory / "config.json", config_to_dict(config))
        with (
            MetricsWriter(directory, tensorboard=config.logging.tensorboard, resume_step=start) as writer,
            Progress(training.steps, start_step=start, console=console) as progress,
        ):
            loop = _Loop(
                program, state, iterator, validation_arrays, assets_to_keep(tokenizer, assets), store, writer,
                progress, peak_flops(jax.devices()[0]), start,
            )  # fmt: skip
            step, interrupted = loop.run()
    return _finish(config, loop, step, interrupted, time.perf_counter() - began)


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
        "tokens_per_second": loop.rate.mean() or earlier.get("tokens_per_second", 0.0),
        "skipped_updates": int(loop.state.skipped_updates),
        "validation": validations[-1] if validations else None,
    }
    write_json_atomic(directory / "summary.json", summary)
    # A run that was stopped before its first log line has nothing to plot.
    if (directory / TRAINING_FILE).stat().st_size:
        plot_run(directory)
    return RunResult(directory, step, interrupted, summary)


def _summary_of(directory: Path) -> dict[str, Any]:
    """summary.json of a run that has ended or was stopped; empty after a kill, which leaves none."""
    path = directory / "summary.json"
    return json.loads(path.read_text()) if path.exists() else {}
