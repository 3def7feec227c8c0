"""The faults that completions and their table can have."""

import inspect
import json
from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import TrainerCallback
from truestep_fixtures import data, trackers

from truestep_spec_tests.differential.cases import logged_warnings
from truestep_spec_tests.differential.log_completions_cases import disturbed, everything, modes
from truestep_spec_tests.meta.faults import unless_it_raises
from truestep_spec_tests.meta.specification import constructor
from truestep_spec_tests.runs import Setup, Walk, train_in_lockstep


def at_a_step_that_ends_twice(setup: Setup, directory: Path) -> str | None:
    """The rows of a step are there twice."""
    walk = _walk(setup, directory)
    walk.begin()
    walk.go_to(2)
    walk.events.fire("on_step_end")
    steps = [row["step"] for row in _rows(directory)]
    return None if len(steps) == len(_prompts(setup)) else f"the rows are of the steps {steps}"


def without_an_interval(setup: Setup, directory: Path) -> str | None:
    """It is accepted that neither `freq` nor `eval_steps` is there."""
    return unless_it_raises(lambda: _walk(setup.on(hyperparameters={}), directory))


def without_enough_prompts(setup: Setup, directory: Path) -> str | None:
    """There is no warning."""
    with logged_warnings() as warned:
        _walk(setup.on(hyperparameters=setup.hyperparameters | {"num_prompts": 100}), directory)
    return None if any("100" in message for message in warned) else f"the warnings are {warned}"


def with_a_second_beginning(setup: Setup, directory: Path) -> str | None:
    """A text that begins with the beginning-of-sequence token gets another one."""
    tokenizer = data.tokenizer()
    tokenizer.bos_token = "<|system|>"
    first = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", first)]
    )
    read: list[list[int]] = []
    walk = _walk(setup, directory)
    walk.events.processing_class = tokenizer
    walk.events.eval_dataset = [{"prompt": "<|system|>hello"}]
    walk.events.add_callback(setup.subject(walk.events, setup.build_generation_config()))
    walk.begin()
    walk.placed.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    walk.go_to(2)
    doubled = [tokens for tokens in read if tokens[:2] == [first, first]]
    return f"the model reads {doubled[0]}" if doubled else None


def with_letters_as_special_tokens(setup: Setup, directory: Path) -> str | None:
    """One of them is shown."""
    tokenizer = data.tokenizer()
    special = ["o", "C", "U", "a"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    walk = _walk(setup, directory)
    walk.events.processing_class = tokenizer
    walk.events.add_callback(setup.subject(walk.events, setup.build_generation_config()))
    walk.begin()
    walk.go_to(2)
    shown = [row["completion"] for row in _read(directory / "completions_2.jsonl")]
    return f"there are special tokens in {shown}" if any(one in text for one in special for text in shown) else None


def in_what_it_leaves(setup: Setup, directory: Path) -> str | None:
    """Something is not as it was."""
    walk = disturbed(setup, directory, failing_at=None)
    before = everything(walk)
    walk.begin()
    walk.go_to(2)
    after = everything(walk)
    return next((f"{what} is not as it was" for what, value in before.items() if after[what] != value), None)


def in_the_modes_of_modules(setup: Setup, directory: Path) -> str | None:
    """A module is in train mode while the model generates."""
    return "a module is in train mode" if any(modes(setup, directory)) else None


def in_a_trackers_rows(setup: Setup, directory: Path) -> str | None:
    """Trackio does not get each row once."""
    with trackers.storage(directory / "trackers"):
        train_in_lockstep(setup.on(training={"report_to": ["trackio"]}), directory)
    found = trackers.rows("trackio", directory / "trackers")
    return None if found == _rows(directory) else f"{len(found)} rows, {len(_rows(directory))} in the local file"


def in_the_steps_of_a_run(setup: Setup, directory: Path) -> str | None:
    """A step of a Weights & Biases run is taken by rows."""
    training = {"report_to": ["wandb"], "logging_strategy": "steps", "logging_steps": 1}
    with trackers.storage(directory / "trackers"):
        train_in_lockstep(setup.on(training=training), directory)
    steps = [line["_step"] for line in trackers.history(directory / "trackers") if "train/loss" in line]
    return None if steps == list(range(setup.steps)) else f"the losses are at the run's steps {steps}"


def with_a_tracker_that_is_not_there(setup: Setup, directory: Path) -> str | None:
    """The training ends, or nothing is said, or a row is missing in the local file."""
    walk = _walk(setup, directory)
    walk.events.args.report_to = ["trackio"]
    walk.begin()
    with logged_warnings() as warned:
        try:
            walk.go_to(4)
        except Exception as error:
            return f"the training ends: {error!r}"
    if len(warned) != 1:
        return f"the warnings are {warned}"
    return None if len(_rows(directory)) == 2 * len(_prompts(setup)) else "rows are missing in the local file"


def after_a_kill(setup: Setup, directory: Path) -> str | None:
    """The table that is resumed is not that of a training that was not interrupted."""
    whole = _table(setup, directory / "whole", 0, 6)
    _table(setup, directory / "killed", 0, 3, save=True)
    _table(setup, directory / "killed", 3, 5)
    resumed = _table(setup, directory / "killed", 3, 6)
    return None if resumed == whole else f"the steps are {[row['step'] for row in resumed]}"


def after_a_torn_line(setup: Setup, directory: Path) -> str | None:
    """What was written of a row is still there."""
    rows = _table(setup, directory, 0, 3, save=True)
    with (directory / "completions.jsonl").open("a", encoding="utf-8") as table:
        table.write('{"step": 4, "pro')
    return None if _table(setup, directory, 3, 3) == rows else "the file has other rows than before"


def in_an_output_directory_that_was_used(setup: Setup, directory: Path) -> str | None:
    """The table of the training before is gone, or goes on."""
    before = _table(setup, directory, 0, 2)
    after = _table(setup.on(seed=setup.seed + 1), directory, 0, 2)
    if len(after) != len(_prompts(setup)):
        return f"there are {len(after)} rows"
    kept = [file for file in directory.glob("*.jsonl") if _read(file) == before]
    return None if kept else f"of the earlier table nothing is left: {sorted(directory.iterdir())}"


def in_the_constructor(setup: Setup, directory: Path) -> str | None:
    """Its arguments are not the documented ones, or more can be given by position."""
    made: list[TrainerCallback] = []

    def attach(trainer: Any) -> list[TrainerCallback]:
        made.append(setup.subject(trainer, setup.build_generation_config()))
        return made

    Walk(setup, directory, attach=attach)
    shown = inspect.signature(type(made[0])).parameters.values()
    by_position = [(one.name, one.default) for one in shown if one.kind != inspect.Parameter.KEYWORD_ONLY]
    documented = [(one.name, one.default) for one in constructor(setup.callback)]
    return None if by_position == documented else f"{by_position} stands where {documented} is documented"


# Parts


def _walk(setup: Setup, directory: Path) -> Walk:
    config = setup.build_generation_config()
    return Walk(setup, directory, attach=lambda trainer: [setup.subject(trainer, config)])


def _table(setup: Setup, directory: Path, first: int, last: int, save: bool = False) -> list[dict[str, Any]]:
    walk = _walk(setup, directory)
    walk.begin(first)
    walk.go_to(last)
    if save:
        walk.events.save()
    return _rows(directory)


def _rows(directory: Path) -> list[dict[str, Any]]:
    return _read(directory / "completions.jsonl")


def _read(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) if line.endswith("}") else line for line in lines if line]


def _prompts(setup: Setup) -> Any:
    return data.prompts(setup.prompts, setup.seed)
