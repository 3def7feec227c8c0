"""The callbacks under test in the place of TRL's, in programs of which nothing is changed."""

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from truestep_fixtures.data import tokenizer
from truestep_fixtures.ranks import RankPool

pytest.importorskip("trl")

from truestep_spec_tests.implementation import CALLBACKS, Implementation
from truestep_spec_tests.trainers.trl_training import STEPS, TRAINERS, Course, difference, train

Ranks = Callable[[int], RankPool]

LATE = """\
import sys
import {implementation} as subject
with subject.patch_trl():
    assert not any(name in sys.modules for name in ("trl", "torch", "transformers"))
    from trl import BEMACallback, LogCompletionsCallback, RichProgressCallback, SyncRefModelCallback, WeaveCallback
    import trl.trainer.callbacks
    from trl.trainer.dpo_trainer import SyncRefModelCallback as InTrainer
    from trl.experimental.bema_for_ref_model import BEMACallback as ForReference
    from trl.experimental.sdpo.teacher_sync import SyncTeacherModelCallback
    found = [BEMACallback, LogCompletionsCallback, RichProgressCallback, SyncRefModelCallback, WeaveCallback]
    for callback in found:
        name = callback.__name__
        assert issubclass(getattr(subject, name), callback), name
        assert all(getattr(module, name) is callback for module in (trl, trl.trainer, trl.trainer.callbacks)), name
    assert InTrainer is SyncRefModelCallback
    for derived, ours in ((ForReference, BEMACallback), (SyncTeacherModelCallback, SyncRefModelCallback)):
        assert issubclass(derived, ours)
        assert derived.__base__ is ours
        assert not issubclass(derived, getattr(subject, ours.__name__))
    callbacks = ForReference(update_ref_model=True), SyncTeacherModelCallback(None)
for callback in found:
    own = getattr(trl, callback.__name__)
    assert not issubclass(getattr(subject, callback.__name__), own)
    assert getattr(trl.trainer, callback.__name__) is getattr(trl.trainer.callbacks, callback.__name__) is own
assert trl.trainer.dpo_trainer.SyncRefModelCallback is trl.SyncRefModelCallback
"""

SCRIPT = """\
import sys
from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

model, output = sys.argv[1:]
rows = [{"prompt": f"{number} and", "chosen": " one.", "rejected": " two, or three."} for number in range(8)]
args = DPOConfig(
    output, max_steps=3, per_device_train_batch_size=1, sync_ref_model=True, ref_model_sync_steps=2,
    use_cpu=True, bf16=False, report_to="none", save_strategy="no",
)
trainer = DPOTrainer(
    model, args=args, train_dataset=Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(model)
)
trainer.train()
print(f"rank {args.process_index} of {args.world_size}: {trainer.state.global_step} steps\\n", end="")
"""


@pytest.fixture
def subject(subject: Implementation) -> Implementation:
    if not hasattr(importlib.import_module(subject.name), "patch_trl"):
        pytest.skip(f"{subject} does not patch TRL")
    return subject


def patched(subject: Implementation) -> AbstractContextManager[object]:
    patch: AbstractContextManager[object] = importlib.import_module(subject.name).patch_trl()
    return patch


def of_trl() -> dict[tuple[str, str], Any]:
    """What modules of TRL that are loaded have by the names of the callbacks."""
    modules = [(name, vars(module)) for name, module in sys.modules.items() if f"{name}.".startswith("trl.")]
    return {(name, callback): found[callback] for name, found in modules for callback in CALLBACKS if callback in found}


def test_all_import_forms_give_it_before_trl_is_loaded_and_trls_own_again_at_the_end(subject: Implementation) -> None:
    subprocess.run([sys.executable, "-c", LATE.format(implementation=subject.name)], check=True, timeout=170)


def test_modules_that_are_loaded_have_it_until_the_last_use_ends(subject: Implementation) -> None:
    importlib.import_module("trl.trainer.grpo_trainer")
    own = of_trl()
    assert ("trl.trainer.grpo_trainer", "SyncRefModelCallback") in own
    with patched(subject):
        found = of_trl()
        assert own.keys() == found.keys()
        assert all(issubclass(subject.callback(callback), value) for (_, callback), value in found.items())
        with patched(subject):
            pass
        assert of_trl() == found
    assert of_trl() == own


def train_in_place(trainer: str, subject: Implementation, model: Path, directory: Path) -> Course:
    with patched(subject):
        return train(trainer, None, "single", model, directory)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_trainer_that_syncs_by_itself_trains_as_with_the_callback_added(
    trainer: str, subject: Implementation, model: Path, ranks: Ranks, tmp_path: Path
) -> None:
    (expected,) = ranks(1).run(train, trainer, subject, "single", model, tmp_path)
    (found,) = ranks(1).run(train_in_place, trainer, subject, model, tmp_path)
    assert sorted(found.reference) == list(range(STEPS + 1))
    assert expected.figures == found.figures
    assert difference(expected.policy, found.policy) is None
    assert difference(expected.reference, found.reference) is None


def average(subject: Implementation, model: Path, directory: Path) -> bool:
    """Trains with the average that the documented import line gives; returns whether it is the subject's."""
    with patched(subject):
        from trl import BEMACallback, SFTConfig, SFTTrainer

        bema = BEMACallback(update_freq=1)
        args = SFTConfig(str(directory), max_steps=STEPS, use_cpu=True, bf16=False, report_to="none")
        rows = Dataset.from_dict({"text": ["One step.", "Two steps."]})
        SFTTrainer(str(model), args=args, train_dataset=rows, processing_class=tokenizer(), callbacks=[bema]).train()
    return isinstance(bema, subject.BEMACallback)


def test_supervised_training_averages_by_the_documented_import(
    subject: Implementation, model: Path, ranks: Ranks, tmp_path: Path
) -> None:
    assert ranks(1).run(average, subject, model, tmp_path) == [True]
    assert (tmp_path / "bema" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param("torch.distributed.run --standalone --nproc-per-node 2", id="torchrun"),
        # What Accelerate calls several GPUs is several processes by torchrun, whatever their devices are.
        pytest.param(
            "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
            "--dynamo_backend no --main_process_port 0",
            id="accelerate",
        ),
    ],
)
def test_a_launched_script_says_on_one_rank_what_is_in_the_place_of_trls(
    launcher: str, subject: Implementation, model: Path, tmp_path: Path
) -> None:
    tokenizer().save_pretrained(model)
    (tmp_path / "train.py").write_text(SCRIPT)
    process = subprocess.run(
        [sys.executable, "-m", *launcher.split(), "-m", "truestep", "run", "train.py", str(model), "out"],
        cwd=tmp_path,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    done = sorted(line for line in process.stdout.splitlines() if line.startswith("rank"))
    assert done == ["rank 0 of 2: 3 steps", "rank 1 of 2: 3 steps"]
    said = re.findall("truestep: .*", process.stderr)  # perhaps behind a bar of another rank
    expected = f"truestep: SyncRefModelCallback of {subject} in the place of TRL's"
    assert [line[: len(expected)] for line in said] == [expected]
