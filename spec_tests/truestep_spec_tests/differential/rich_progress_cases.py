"""Programs that train with a progress display, for terminals that tests look at."""

import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import Trainer, TrainerCallback
from truestep_fixtures import models, topologies
from truestep_fixtures.data import language_dataset
from truestep_fixtures.training import train

from truestep_spec_tests.implementation import Implementation

Act = Callable[[], object]
"""Something that a program does in the middle of a training."""


class Acting(TrainerCallback):
    """Does something at the end of some steps."""

    def __init__(self, acts: dict[int, Act]) -> None:
        self._acts = acts

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._acts.get(state.global_step, lambda: None)()


def trained(
    implementation: str,
    directory: Path,
    acts: dict[int, Act] | None = None,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    first: Sequence[TrainerCallback] = (),
    **training: Any,
) -> Trainer:
    """A trainer that has trained with the display.

    Args:
        implementation: What is tested.
        directory: Where the training writes.
        acts: What happens at the end of steps.
        callbacks: More callbacks.
        first: More that come before the display.
        training: What `truestep_fixtures.training.train` takes besides; 6 steps with a log of each, by default.
    """
    display = Implementation(implementation).RichProgressCallback()
    usual = {"steps": 6, "logging_strategy": "steps", "logging_steps": 1, "disable_tqdm": False}
    all_callbacks = [*first, display, Acting(acts or {}), *callbacks]
    result = train("single", "qwen2", output_dir=directory, callbacks=all_callbacks, **usual | training)
    assert isinstance(result.trainer, Trainer)
    return result.trainer


def until(file: Path) -> None:
    """Wait until a test has made a file."""
    while not file.exists():
        time.sleep(0.01)


def drawn() -> None:
    """Wait until what there is has been drawn."""
    time.sleep(0.5)


# Times that do not depend on the machine


class Clock(TrainerCallback):
    """All clocks of the process: a step takes half a second, a batch of an evaluation a quarter."""

    def __init__(self) -> None:
        self.now = 1000.0
        for name in ("time", "monotonic", "perf_counter"):
            setattr(time, name, lambda: self.now)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.now += 0.5

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.now += 0.25


class Pause(TrainerCallback):
    """Waits for a file in the middle of an evaluation, at the beginning of which everything is drawn."""

    def __init__(self, step: int, batches: int, file: Path) -> None:
        self._when = step, batches
        self._file = file
        self._batches = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._when[0]:
            drawn()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._batches += 1
        if (state.global_step, self._batches) == self._when:
            until(self._file)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._batches = 0


class Rewards(TrainerCallback):
    """Logs metrics in groups, and values that are no numbers."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs:
            t = state.global_step
            logs |= {
                "rewards/chosen": 0.25 * t,
                "rewards/rejected": -0.125 * t * (1 + t % 3),
                "rewards/accuracies": 1 - 1 / (t + 1),
                "completions/mean_length": 55.5 + t % 4,
                "completions/clipped": t % 2 == 0,
                "[red]": "[/bold] größer",
            }


def train_for_a_picture(implementation: str, directory: Path, go_on: Path) -> None:
    """A training with evaluations, held up in the second one after 5 of its 8 batches."""
    display = Implementation(implementation).RichProgressCallback()
    train(
        "single",
        "qwen2",
        output_dir=directory,
        callbacks=[Rewards(), Clock(), display, Pause(20, 5, go_on)],
        steps=30,
        dtype=torch.float64,
        logging_strategy="steps",
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=10,
        per_device_eval_batch_size=3,
        eval_dataset=language_dataset(24, seed=1),
        disable_tqdm=False,
    )


class Hard(TrainerCallback):
    """Logs a small number, and what could be taken for markup."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is not None:
            logs |= {"small": 1.25e-5, "[red]": "[bold]"}


def log_what_is_hard_to_read(implementation: str, directory: Path, go_on: Path) -> None:
    """A training that is held up after its first logs, which nothing but the display shows."""
    trained(implementation, directory, {2: lambda: until(go_on)}, first=[Hard()], steps=2, disable_tqdm=True)


# What a training does not show


def train_in_every_way(implementation: str, directory: Path) -> None:
    """Trains with evaluations, with the callback given to the trainer, and added to one later."""
    for trainer in _trainers(implementation, directory):
        trainer.train()
    print("no more training")


def evaluate_before_and_after_training(implementation: str, directory: Path) -> None:
    """The same, with evaluations and a prediction outside of the trainings."""
    for trainer in _trainers(implementation, directory):
        trainer.evaluate()
        trainer.train()
        trainer.evaluate()
        trainer.predict(trainer.eval_dataset)


def _trainers(implementation: str, directory: Path) -> Iterator[Trainer]:
    display = Implementation(implementation).RichProgressCallback
    dataset = language_dataset(12)
    for disable_tqdm in (False, True):
        logged = {"logging_strategy": "steps", "logging_steps": 1, "disable_tqdm": disable_tqdm}
        args = topologies.training_arguments("single", directory, max_steps=3, eval_strategy="epoch", **logged)
        model, datasets = models.build("qwen2"), {"train_dataset": dataset, "eval_dataset": dataset}
        given, added_to = Trainer(model, args, callbacks=[display()], **datasets), Trainer(model, args, **datasets)
        added_to.add_callback(display())
        yield from (given, added_to)


def train_without_it_again(implementation: str, directory: Path) -> None:
    """A second training, without the callback, of a trainer that had it."""
    trainer = trained(implementation, directory, steps=2)
    print("now without")
    trainer.remove_callback(Implementation(implementation).RichProgressCallback)
    trainer.train()


# Other output


def print_in_every_way(implementation: str, directory: Path) -> None:
    """Prints, records, warnings and bars during a training, and text that goes past Python's streams."""
    early, late = logging.getLogger("early"), logging.getLogger("late")
    early.addHandler(logging.StreamHandler(sys.stderr))
    print("begun before", end="")
    acts: dict[int, Act] = {
        1: lambda: (print("one [red]"), print("two", end=" "), sys.stdout.flush()),
        2: lambda: (
            drawn(),
            print("halves"),
            print("three\nlines\nat once"),
            print("\t" * 20, end=""),
            drawn(),
            print(),
        ),
        3: lambda: (early.warning("a record"), warnings.warn("a warning", stacklevel=1)),
        4: lambda: Dataset.from_dict({"a": list(range(40))}).map(_slowly, desc="mapping"),
        5: lambda: (subprocess.run(["echo", "past the streams"], check=True), drawn()),
        6: lambda: (os.write(1, b"and past Python\n"), drawn(), late.addHandler(logging.StreamHandler())),
    }
    trained(implementation, directory, acts, steps=7)
    print("between two")
    trained(implementation, directory, {1: lambda: (drawn(), late.warning("late\nrecords"), drawn())}, steps=2)
    late.warning("after it")


def _slowly(row: dict[str, Any]) -> dict[str, Any]:
    time.sleep(0.01)
    return row


class Tee:
    """What some programs put in the place of standard output: its `write` returns nothing."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def print_in_forked_processes(implementation: str, directory: Path) -> None:
    """Children that are forked while the display is on print, and end."""
    sys.stdout = Tee(sys.stdout)

    def fork() -> None:
        for number in range(3):
            if os.fork() == 0:
                print(f"child {number}", flush=True)
                os._exit(0)
            os.wait()
            drawn()

    trained(implementation, directory, {2: fork})


def ask(implementation: str, directory: Path) -> None:
    """Asks for input in the middle of a training."""
    trained(implementation, directory, {2: lambda: (drawn(), print("Hello", input("your name? ")), drawn())})


# How a training can end


def end_in_the_middle(implementation: str, directory: Path, how: str) -> None:
    """A training that ends at its third step: by an error, a signal, or with the process."""
    acts: dict[int, Act] = {3: lambda: (print("now", flush=True), drawn(), _end(how))}
    try:
        trained(implementation, directory, acts)
    except (RuntimeError, KeyboardInterrupt) as error:
        if how == "uncaught":
            raise
        print(f"caught {type(error).__name__}")
        left = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
        print(f"threads: {left}")
        drawn()
        print(f"streams: {type(sys.stdout).__name__} {type(sys.stderr).__name__}")


def _end(how: str) -> None:
    if how in ("error", "uncaught"):
        raise RuntimeError("no more")
    if how == "abort":
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
        os.abort()
    time.sleep(60)  # until a signal comes


def lose_another_rank(implementation: str, directory: Path, meeting: Path) -> None:
    """A training on two ranks of which one dies; on the terminal of both."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)

    def die() -> None:
        print(f"rank {rank} is at step 3", flush=True)
        drawn()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    display = Implementation(implementation).RichProgressCallback()
    train("ddp", "qwen2", output_dir=directory, callbacks=[display, Acting({3: die})], steps=6)


def train_without_a_terminal(implementation: str, directory: Path, go_on: Path) -> None:
    """The terminal is closed in the middle; what came of the training is in a file then."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    trainer = trained(implementation, directory, {2: lambda: (print("at step 2", flush=True), until(go_on))})
    (directory / "steps").write_text(str(trainer.state.global_step))


# Times and sizes


def hold_still(implementation: str, directory: Path, go_on: Path, encoding: str = "utf-8") -> None:
    """A training in which time stands still at the third step, with output in some encoding."""
    sys.stdout = open(1, "w", encoding=encoding, buffering=1, closefd=False)  # noqa: SIM115
    acts: dict[int, Act] = {3: lambda: (drawn(), print("still", flush=True), until(go_on))}
    trained(implementation, directory, acts, callbacks=[Clock()])


def train_two_at_a_time(implementation: str, directory: Path, go_on: Path) -> None:
    """While one training waits in the middle, another trainer evaluates."""
    evaluator = trained(implementation, directory / "other", steps=1, eval_dataset=language_dataset(24))
    evaluator.add_callback(Pause(1, 2, go_on))
    trained(implementation, directory, {2: evaluator.evaluate})


# What is not to change


def draw_random_numbers(implementation: str, directory: Path) -> None:
    """Python's random numbers before a display is drawn for the first time in the process, and after."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        del sys.modules[name]  # which something else has imported
    states: list[Any] = []

    class Before(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            states.append(random.getstate())

    class After(Before):
        pass

    display = Implementation(implementation).RichProgressCallback()
    train("single", "qwen2", output_dir=directory, callbacks=[Before(), display, After()], steps=1)
    print(f"has drawn: {'rich' in sys.modules}, the same: {states[0] == states[1]}")
