"""The training loop, the same for every kind of model and every way to spread it over processes."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast, broadcast_object_list, set_seed
from torch import nn

from d_emo import kernels
from d_emo.claims import claimed
from d_emo.config import RunSettings, check_values, type_hints, write_yaml
from d_emo.device import best_device
from d_emo.ema import EMA
from d_emo.errors import InputError, OtherRunError, RunError
from d_emo.files import read_json
from d_emo.io.training_state import find_state, load_state, save_state, states_until
from d_emo.kernels.autotune import tuner
from d_emo.models.layers import norm_buffers, synchronise_batch_norms
from d_emo.threads import use_threads
from d_emo.training.feed import Feed
from d_emo.training.finetuning import adapted, merged
from d_emo.training.guard import NonFiniteGuard, variance_of_one_refused
from d_emo.training.optimizer import learning_rate, make_optimizer
from d_emo.training.parallel import Updates, check_processes, micro_batch_of, open_accelerator, precision_of
from d_emo.training.progress import Progress
from d_emo.training.same_data import check_same_data, trace_of
from d_emo.training.same_settings import changes
from d_emo.training.stop import Stop, StopSignal
from d_emo.training.task import Task


def fit(task: Task, settings: RunSettings, *, preview: Callable[[Path, nn.Module], None] | None = None) -> Path | None:
    """Train until ``settings.max_steps``, a signal or the time limit; a resumed run goes on from there.

    Args:
        task: Model, data and loss.
        settings: The task's; resolved, they are written to ``config.yaml`` in the run folder.
        preview: Called with (png path, averaged model) at every snapshot.

    Returns:
        The last snapshot's folder on the main process, None on the others.

    Raises:
        InputError: Settings that cannot work together, an unwritable run folder, an unusable state.
        RunError: A loss or gradient is not finite, or something cannot be saved; the last good state stays.
        SystemExit: After a signal or the time limit: code 143 for SIGTERM, else 0; the state is saved.
    """
    run = _Run(task, settings, preview)
    with claimed(run.folder, folder=True) if run.accelerator.is_main_process else nullcontext():
        return run.go()


class _Run:
    """One run on one process."""

    def __init__(self, task: Task, settings: RunSettings, preview: Callable[[Path, nn.Module], None] | None):
        self.task, self.settings, self.preview = task, settings.resolve(**task.facts), preview
        settings = self.settings
        self.folder = Path(settings.output_dir)
        device = best_device()
        self.precision = precision_of(settings, device)
        world = int(os.environ.get("WORLD_SIZE", 1))
        self.per_rank, rest = divmod(settings.batch_size, world)
        if rest:
            raise InputError(f"`batch_size` {settings.batch_size} (global) cannot be divided by {world} processes")
        self.micro = micro_batch_of(settings, self.per_rank, device)
        if self.per_rank % self.micro:
            raise InputError(
                f"`micro_batch_size` {self.micro} does not divide the {self.per_rank} images per process and step"
            )
        self.accelerator = open_accelerator(
            settings, accumulation=self.per_rank // self.micro, precision=self.precision
        )
        check_processes(self.accelerator.num_processes)
        use_threads(self.accelerator.device, world)
        if self.accelerator.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        self.step, self.minutes, self.saved = 0, 0.0, None  # saved: step of the last state in the run folder
        self.states: list[Path] = []  # that this run has written
        self.trace = trace_of(task.dataset)

    def go(self) -> Path | None:
        state, task, accelerator, settings = self._open_run_folder(), self.task, self.accelerator, self.settings
        if state is not None:
            task.keep_classes(state.get("class_names"))
        set_seed(settings.seed)
        self.progress = Progress(accelerator, settings)
        for line in task.introduction():
            self.progress.say(line)
        if accelerator.num_processes > 1:
            self.progress.say(f"{accelerator.num_processes} processes share the work")
        with accelerator.main_process_first():
            task.prepare(accelerator.device, self.folder)
        model = task.model.to(accelerator.device)
        if settings.sync_batchnorm:
            synchronise_batch_norms(model)
        self.ema = EMA(model, settings.ema_decay, warmup=settings.ema_warmup)
        task.averaged = self.ema.model
        optimizer = make_optimizer(model, settings, task.lr_scales, accelerator.device)
        if settings.compile:
            model.compile()
        self.updates = Updates(accelerator, model, optimizer, settings, self.precision)
        self.guard = NonFiniteGuard(self.updates.bare_model, settings.nan)
        if state is not None:
            self._restore(state)
            done = "nothing to do" if self.step >= settings.max_steps else "resuming"
            self.progress.say(f"{done} at step {self.step} of {settings.max_steps}")
        if accelerator.num_processes > 1:
            tuner.agree(broadcast_object_list)
        if accelerator.is_main_process:
            write_yaml(settings, self.folder / "config.yaml")
        accelerator.wait_for_everyone()
        stopping, shown = StopSignal(settings.max_minutes, self.progress.say), self.progress.following
        with stopping as stop_signal, shown(self.step, task.smaller):
            stop = self._loop(stop_signal)
        for line in task.remarks(lambda seen: accelerator.reduce(seen.int().to(accelerator.device)).count_nonzero()):
            self.progress.say(line)
        accelerator.end_training()
        if stop and self.step < settings.max_steps:
            self.progress.say(
                f"stopped by {stop.reason} at step {self.step}; the state is saved; re-run the same command to resume"
            )
            sys.exit(stop.exit_code)
        return self._snapshot_folder() if accelerator.is_main_process else None

    def _open_run_folder(self) -> dict[str, Any] | None:
        """Make or check the run folder; return the state to go on from."""
        settings, states, config = self.settings, self.folder / "states", self.folder / "config.yaml"
        hints = type_hints(type(settings))
        try:
            old = read_json(config, lambda content: check_values(content, hints)) if config.exists() else {}
            strange = old and not {"model", "max_steps", "state_every"} <= set(old)
            if strange or (self.folder / "snapshot.json").exists():
                raise InputError(f"{self.folder} is no run folder and is not overwritten; choose another `output_dir`")
            states.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK):
                raise PermissionError(13, "permission denied")
        except OSError as error:
            raise InputError(f"cannot write to the run folder {self.folder}: {error.strerror}") from None
        if settings.resume == "never":
            if any(states.iterdir()):
                raise InputError(f"{self.folder} already holds a run; use `resume` auto or another `output_dir`")
            return None
        trained = any(states.iterdir()) or any(self.folder.glob("snapshots/step-*"))
        if old and trained and (changed := changes(settings, old, self.task.facts)):
            raise OtherRunError(
                f"the run in {self.folder} had other settings ({'; '.join(changed)}); "
                "give what it had to resume, or choose another `output_dir`"
            )
        say = print if self.accelerator.is_main_process else lambda line: None
        self.resumed_from = find_state(states, say=say) if settings.resume == "auto" else Path(settings.resume)
        state = None if self.resumed_from is None else load_state(self.resumed_from)
        names = list(self.task.dataset.class_names)
        if state is not None and (moved := check_same_data(settings, old, state, self.trace, names)):
            say(moved)
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        try:
            self.updates.restore(state)
            self.ema.load_state_dict(state["ema"])
            self.guard.load_state_dict(state["guard"])
            self.step, self.minutes = state["step"], state["minutes"]
            self.saved = self.step if self.resumed_from.parent == self.folder / "states" else None
            self.states = states_until(self.folder / "states", self.step)
            tuner.keep(state.get("kernels"))
        except Exception as error:  # whatever a state that another program wrote makes of PyTorch
            reason = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
            raise OtherRunError(f"the training state {self.resumed_from} does not fit this model: {reason}") from None

    def _loop(self, stop_signal: StopSignal) -> Stop:
        """Train until the last step or a wish to stop; returns that wish."""
        settings, stop, self.started = self.settings, Stop.NO, time.monotonic()
        self.feed = Feed(
            self.task.dataset, self.task.draw, seed=settings.seed, batch_size=settings.batch_size,
            micro_batch_size=self.micro, device=self.accelerator.device, step=self.step,
            rank=self.accelerator.process_index, world_size=self.accelerator.num_processes,
            num_workers=settings.num_workers,
        )  # fmt: skip
        self.updates.model.train()
        first = self.step
        while self.step < settings.max_steps and not stop:
            try:
                with kernels.record() if self.step == first else nullcontext() as calls:
                    figures, stop = self._train_step(stop_signal)
                if figures is None:
                    break
            except Exception as error:
                wish = stop_signal.received  # a signal, which reaches the compiler's processes too
                if isinstance(error, RunError) or not wish:
                    raise
                raise RunError(f"stopped by {wish.reason} within step {self.step + 1}, which is lost") from error
            for slow in () if calls is None or adapted(self.updates.bare_model) else kernels.avoidable(calls):
                self.progress.say(f"slower than this machine could: {slow}")
            self.step += 1
            last = self.step == settings.max_steps
            with self._saving("curves"):
                self.progress.step_done(self.step, figures)
            if settings.validate_every and (last or self.step % settings.validate_every == 0):
                self._validate()
            if last or self.step % settings.snapshot_every == 0:
                self._save_snapshot()
            if last or self.step % settings.state_every == 0:
                self._save_state()
        if stop:
            self._save_state()  # of the last whole step
        if self.step == settings.max_steps and not self._snapshot_folder().exists():
            self._save_snapshot()  # a run resumed after its last step, its snapshot removed
        return stop

    def _train_step(self, stop_signal: StopSignal) -> tuple[dict[str, float] | None, Stop]:
        """One optimizer step over the global batch; its means over all processes, and whether any wants to stop.

        There are no means where one wanted to between two micro-batches: then it is as if the step had not begun.
        """
        settings, model, waited, parts = self.settings, self.updates.model, self.feed.waited, []
        micro_batches = self.per_rank // self.micro
        began = asked = time.perf_counter()
        self.guard.remember()
        self.task.step = self.step
        rate = learning_rate(settings, self.step)
        self.updates.set_learning_rate(rate)
        for batch, draws in self.feed.step(self.step):
            with variance_of_one_refused(), self.accelerator.accumulate(model):
                losses = self.task.loss(model, batch, draws)  # autocast inside the model
                self.updates.backward(losses["loss"])
            parts.append({name: value.detach().float() for name, value in losses.items()})
            self.progress.micro_batch_took(time.perf_counter() - asked, len(parts), micro_batches)
            if len(parts) < micro_batches and (stop := self._wish(stop_signal)):
                self.guard.undo()
                self.updates.clear()
                return None, stop
            asked = time.perf_counter()
        norm = self.updates.gradient_norm()
        if self.step + 1 < settings.max_steps:
            self.feed.prepare(self.step + 1)
        means, stop = self._agree(parts, norm, stop_signal.wish)
        self._update(means, rate)
        took, waited = time.perf_counter() - began, self.feed.waited - waited
        return {
            **means, "learning_rate": rate, "images_per_second": settings.batch_size / took,
            "data_wait_share": waited / took, "ema_decay": self.ema.current_decay, "skipped_steps": self.guard.skipped,
        }, stop

    def _wish(self, stop_signal: StopSignal) -> Stop:
        """The strongest wish to stop between two micro-batches. Several GPUs do not wait for one another then."""
        if self.accelerator.num_processes == 1:
            return stop_signal.wish
        return Stop.NO if self.feed.ahead else Stop(int(self.accelerator.gather(torch.tensor(stop_signal.wish)).max()))

    def _agree(
        self, parts: list[dict[str, torch.Tensor]], norm: torch.Tensor, wish: Stop
    ) -> tuple[dict[str, float], Stop]:
        """Means over micro-batches and processes, and the strongest wish to stop: one exchange, one wait a step."""
        means = torch.stack([torch.stack(list(part.values())) for part in parts]).mean(dim=0)
        wishes = torch.zeros(len(Stop), device=means.device)
        wishes[wish] = 1
        everything = torch.cat([means, norm.detach().float().reshape(1), wishes])
        *values, = self.accelerator.reduce(everything, "mean").tolist()
        means = dict(zip([*parts[0], "gradient_norm"], values, strict=False))
        return means, max(each for each, share in zip(Stop, values[-len(Stop):], strict=True) if share > 0)

    def _update(self, means: dict[str, float], rate: float) -> None:
        """The optimizer's step, unless the loss or the gradient is not finite."""
        accelerator = self.accelerator
        try:
            if self.guard.allows(means, fp16=accelerator.scaler is not None):
                if self.updates.step():
                    self.ema.update(self.updates.bare_model)
            else:
                self.progress.say(self.guard.record(
                    self.folder, self.step, rate, means, self.feed.sampler.indices(self.step),
                    write=accelerator.is_main_process,
                ))
                self.guard.insist()
        except RunError:
            self._save_state()  # the update was not made, so this state is good
            raise
        finally:
            self.updates.clear()

    @torch.no_grad()
    def _validate(self) -> None:
        accelerator = self.accelerator
        for buffer in norm_buffers(self.ema.model):  # each process averages its own; the main one's are saved
            broadcast(buffer)
        with self.progress.doing("validating"):
            sums = self.task.validate(
                self.ema.model, rank=accelerator.process_index, world_size=accelerator.num_processes
            )
        totals = accelerator.reduce(torch.stack(list(sums.values())), "sum").tolist()
        figures = self.task.figures(dict(zip(sums, totals, strict=True)))
        self.progress.validated(self.step, {f"validation_{name}": value for name, value in figures.items()})

    def _snapshot_folder(self) -> Path:
        return self.folder / "snapshots" / f"step-{self.step}"

    def _save_snapshot(self) -> None:
        if self.accelerator.is_main_process:
            with self._saving("snapshot"):
                model = merged(self.ema.model)
                self.task.save_snapshot(self._snapshot_folder(), model, step=self.step, minutes=self._minutes())
                if advice := self.ema.advice():
                    self.progress.say(f"step {self.step}: {advice}")
                if self.preview is not None:
                    picture = self.folder / "samples" / f"step-{self.step}.png"
                    picture.parent.mkdir(exist_ok=True)
                    with self.progress.doing("drawing samples"):
                        self.preview(picture, model)
                    if picture.exists():
                        self.progress.picture(self.step, picture)
        self.accelerator.wait_for_everyone()

    def _save_state(self) -> None:
        """Keep the state of this step, unless that was done."""
        if self.saved == self.step:
            return
        self.saved = self.step
        state = self.updates.gather()  # on all processes
        if self.accelerator.is_main_process:
            with self._saving("training state"):
                save_state(self.folder / "states", self.step, {
                    **state, "step": self.step, "minutes": self._minutes(), "ema": self.ema.state_dict(),
                    "guard": self.guard.state_dict(), "kernels": dict(tuner.used),
                    "class_names": list(self.task.dataset.class_names), "data": self.trace,
                }, own=self.states)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _saving(self, what: str) -> Iterator[None]:
        """Say plainly what could not be saved and what there is to go on from."""
        try:
            yield
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            good = find_state(self.folder / "states", say=lambda line: None)
            left = f"the last good state is {good}" if good else "no state was saved before"
            raise RunError(f"cannot save the {what} of step {self.step} in {self.folder}: {reason}; {left}") from error

    def _minutes(self) -> float:
        return self.minutes + (time.monotonic() - self.started) / 60
