"""`truestep verify` of callbacks and processes that end too early, or in a single process only."""

import multiprocessing
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import torch
from truestep_reference import BEMACallback as ReferenceBEMACallback

from truestep_spec_tests.meta.verify_cases import QUICK, Verify, report, rows


class RaisesAlone(ReferenceBEMACallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.distributed.get_rank()
        super().on_train_begin(args, state, control, **kwargs)


def test_what_raises_in_a_single_process_only_differs_there(verify: Verify, tmp_path: Path) -> None:
    implementation = f"BEMACallback={__name__}.{RaisesAlone.__name__}"
    status, printed = verify(f"--implementation {implementation} --topology ddp --ranks 2 {QUICK}")
    assert status == 1
    ((*_, bitwise, _, verdict),) = rows(printed)
    assert (bitwise, verdict) == ("no", "differs")
    assert "a single process on the same trajectory: rank 0 raised\n" in printed
    (only,) = report(tmp_path)["runs"]
    assert (tmp_path / only["replay"]).is_file()


class Ends(ReferenceBEMACallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        control.should_training_stop = state.global_step == 2


def test_a_training_that_ends_early_cannot_be_replayed(verify: Verify, tmp_path: Path) -> None:
    status, printed = verify(f"--implementation BEMACallback={__name__}.{Ends.__name__} --topology single {QUICK}")
    assert status == 1
    assert re.search(r"^BEMA .* stops early$", printed, flags=re.MULTILINE)
    assert "compared at 3 of 5 steps" in printed
    (only,) = report(tmp_path)["runs"]
    assert (only["verdict"], only["replay"]) == ("stops early", None)


class Interrupts(ReferenceBEMACallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.max_steps == 3:
            parent = multiprocessing.parent_process()
            assert parent is not None
            assert parent.pid is not None
            os.kill(parent.pid, signal.SIGTERM)
            time.sleep(60)
        super().on_train_begin(args, state, control, **kwargs)


def test_what_was_found_is_reported_when_the_process_is_told_to_end(verify: Verify, tmp_path: Path) -> None:
    implementation = f"BEMACallback={__name__}.{Interrupts.__name__}"
    arguments = f"--implementation {implementation} --callback BEMACallback --topology single --report out"
    status, printed = verify(f"{arguments} --steps 3")
    assert status == 1
    assert [row[-2:] for row in rows(printed)] == [["not", "run"]] * 3
    contents = report(tmp_path)
    assert contents["passed"] is False
    assert {run["verdict"] for run in contents["runs"]} == {"not run"}
