"""`truestep verify` as its users run it: its exit status, what it prints and what it leaves.

Where a process of its own would add nothing, it runs in this one: the command starts its ranks as processes in either
case.
"""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor
from truestep_fixtures import models
from truestep_reference import BEMACallback as ReferenceBEMACallback
from truestep_reference import LogCompletionsCallback as ReferenceLogCompletionsCallback

from truestep_spec_tests.lockstep import Comparison, Comparisons
from truestep_spec_tests.meta.mutants import MUTANTS
from truestep_spec_tests.meta.mutants.patch import copy_package
from truestep_spec_tests.meta.verify_cases import QUICK, Verify, report, rows
from truestep_spec_tests.runs import Setup
from truestep_spec_tests.verify.arguments import understand
from truestep_spec_tests.verify.command import main
from truestep_spec_tests.verify.trainings.check import Result
from truestep_spec_tests.verify.trainings.display import show_trainings
from truestep_spec_tests.verify.trainings.plan import SHORT, plan

_BY_NAME = {mutant.name: mutant for mutant in MUTANTS}
WRONG = _BY_NAME["weights_of_the_average_exchanged"]
ROUNDS_DIFFERENTLY = _BY_NAME["last_elements_of_a_range_rounded_differently"]


@pytest.mark.parametrize(("callback", "short"), [("BEMACallback", "BEMA"), ("SyncRefModelCallback", "SYNC")])
def test_a_run_that_equals_the_reference_exits_with_0_and_leaves_a_report(
    verify: Verify, tmp_path: Path, callback: str, short: str
) -> None:
    status, printed = verify(f"--topology single {QUICK.replace('BEMACallback', callback)}")
    assert status == 0
    ((*row, ratio, bitwise, _, verdict),) = rows(printed)
    assert row == [short, "single", "1", "float32", "5"]
    assert (bitwise, verdict) == ("yes", "equal")
    contents = report(tmp_path)
    assert contents["passed"] is True
    assert contents["implementation"].startswith("truestep ")
    assert {"python", "torch", "transformers", "cpu"} <= contents["environment"].keys()
    (only,) = contents["runs"]
    assert only["callback"] == callback
    assert only["steps_compared"] == 5
    assert f"{only['largest_error_over_bound']:.3f}" == ratio
    assert 0 < only["largest_error_over_bound"] <= 1
    assert list(only["steps"]) == ["0", "1", "2", "3", "4"]
    for step in only["steps"].values():
        assert step["ratio"] == (step["error"] / step["bound"] if step["error"] else 0)
    assert max(step["ratio"] for step in only["steps"].values()) == only["largest_error_over_bound"]
    assert only["divergence"] is only["bitwise_difference"] is only["replay"] is None
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"index.html", "report.json"}
    assert "report: out/report.json, out/index.html\n" in printed


def test_completions_are_compared_in_float64_and_have_no_error_at_all(verify: Verify, tmp_path: Path) -> None:
    status, printed = verify("--callback LogCompletionsCallback --topology single --steps 4 --report out")
    assert status == 0
    ((*row, ratio, bitwise, _, verdict),) = rows(printed)
    assert row == ["LOGC", "single", "1", "float64", "5"]
    assert (ratio, bitwise, verdict) == ("0.000", "yes", "equal")
    assert report(tmp_path)["runs"][0]["largest_error_over_bound"] == 0


class AnotherLetter(ReferenceLogCompletionsCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        for row in self.table:
            row["completion"] = f"{row['completion']}!"


def test_a_row_that_diverges_is_printed_and_can_be_replayed(verify: Verify, tmp_path: Path) -> None:
    implementation = f"LogCompletionsCallback={__name__}.{AnotherLetter.__name__}"
    status, printed = verify(f"--implementation {implementation} --topology ddp --ranks 2 --steps 2 --report out")
    assert status == 1
    assert rows(printed)[0][-1] == "diverges"
    (only,) = report(tmp_path)["runs"]
    where, subject = "step 1, rank 0, row 0: subject ", only["divergence"]["subject"]
    assert f"{where}{subject}, reference {subject.replace('!', '')}" in printed
    (replay,) = re.findall(r"^truestep verify (--replay \S+)$", printed, flags=re.MULTILINE)
    status, printed = verify(f"{replay} --report out")
    assert status == 1
    assert where in printed
    assert report(tmp_path)["runs"][0]["divergence"] == only["divergence"]


def test_a_divergence_exits_with_1_and_can_be_replayed(verify: Verify, tmp_path: Path) -> None:
    copy_package(tmp_path, "package_of_mine", WRONG)
    arguments = f"--topology single --seed 1 {QUICK}"
    status, printed = verify(f"--implementation package_of_mine {arguments}")
    assert status == 1
    contents = report(tmp_path)
    (only,) = contents["runs"]
    divergence = only["divergence"]
    assert contents["passed"] is False
    assert only["verdict"] == rows(printed)[0][-1] == "diverges"
    assert abs(divergence["subject"] - divergence["reference"]) > divergence["bound"]
    where = f"step {divergence['step']}, rank 0, {divergence['parameter']}{divergence['index']} "
    for shown in (where, repr(divergence["subject"]), repr(divergence["reference"])):
        assert shown in printed
    assert re.search(r"bound \d", printed)
    (replay,) = re.findall(r"^truestep verify (--replay \S+)$", printed, flags=re.MULTILINE)
    status, printed = verify(f"{replay} --report out")
    assert status == 1
    assert where in printed
    assert report(tmp_path)["runs"][0]["divergence"] == divergence


class Raises(ReferenceBEMACallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError(f"rank {args.process_index} divides by zero \ud800")


def test_a_crash_exits_with_1_and_reports_every_rank(verify: Verify, tmp_path: Path) -> None:
    implementation = f"BEMACallback={__name__}.{Raises.__name__}"
    status, printed = verify(f"--implementation {implementation} --topology ddp --ranks 2 {QUICK}")
    assert status == 1
    assert rows(printed)[0][-1] == "crashes"
    for rank in (0, 1):
        assert f"rank {rank} raised" in printed
    (only,) = report(tmp_path)["runs"]
    for rank in range(2):
        assert f"ZeroDivisionError: rank {rank} divides by zero" in only["crash"]


class NotANumber(ReferenceBEMACallback):
    def shadow_state_dict(self) -> dict[str, Tensor]:
        return {name: torch.full_like(value, math.nan) for name, value in super().shadow_state_dict().items()}


def test_the_report_can_be_read_where_values_are_not_finite(verify: Verify, tmp_path: Path) -> None:
    implementation = f"BEMACallback={__name__}.{NotANumber.__name__}"
    status, printed = verify(f"--implementation {implementation} --topology single {QUICK}")
    assert status == 1
    assert "subject nan" in printed
    assert report(tmp_path)["runs"][0]["verdict"] == "diverges"


def test_what_is_within_the_bound_but_not_bitwise_the_same_exits_with_1(verify: Verify, tmp_path: Path) -> None:
    copy_package(tmp_path, "rounds_differently", ROUNDS_DIFFERENTLY)
    # The mistake is in the correction, which the arguments that a seed gives may turn off.
    place = f"--topology ddp --ranks 2 --model odd --seed {_seed_with_correction()}"
    status, printed = verify(f"--implementation rounds_differently {place} {QUICK}")
    assert status == 1
    ((*_, bitwise, _, verdict),) = rows(printed)
    assert (bitwise, verdict) == ("no", "differs")
    (only,) = report(tmp_path)["runs"]
    assert only["divergence"] is None
    assert re.match(r"step \d, \w", only["bitwise_difference"])
    assert (tmp_path / only["replay"]).is_file()


def _seed_with_correction() -> int:
    runs = (
        plan(implementation="truestep", callbacks=["BEMACallback"], topologies=["ddp"], ranks=[2], seed=seed)
        for seed in range(100)
    )
    return next(seed for seed, (run, *_) in enumerate(runs) if run.hyperparameters["bias_power"] > 0)


def test_a_model_of_ones_own_is_taken_from_its_directory(verify: Verify, tmp_path: Path) -> None:
    models.build("llama", seed=5).save_pretrained(tmp_path / "mine")
    status, _ = verify(f"--model mine --topology single {QUICK}")
    assert status == 0
    assert report(tmp_path)["runs"][0]["setup"]["model"] == "mine"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("", ["trainings"]),
        ("--seed 3 --callback BEMACallback", ["trainings"]),
        ("--implementation truestep", ["trainings", "clauses"]),
        ("--implementation trl --expect known --report out --markdown out.md", ["trainings", "clauses"]),
        ("--implementation trl --topology ddp", ["trainings"]),
        ("--replay file", ["trainings"]),
        ("--implementation trl --trainings", ["trainings"]),
        ("--only RICH", ["clauses"]),
        ("--implementation trl --clauses", ["clauses"]),
        ("--only RICH-3 --ranks 2", ["trainings", "clauses"]),
        ("--time 1", ["clauses"]),
    ],
)
def test_arguments_of_one_part_leave_the_other_out(arguments: str, parts: list[str]) -> None:
    options = understand(arguments.split())
    assert parts == [part for part in ("trainings", "clauses") if getattr(options, part)]


def test_under_a_launcher_there_are_trainings_only(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not understand(["--implementation", "truestep"]).clauses
    with pytest.raises(SystemExit):
        understand(["--only", "RICH"])
    assert "--clauses, --only and --time: tests start ranks of their own" in capfd.readouterr().err


def test_a_training_is_the_same_whatever_else_is_asked_for() -> None:
    whole = plan(implementation="truestep", callbacks=list(SHORT))
    for setup in whole:
        asked = {"topologies": [setup.topology], "ranks": [setup.ranks], "dtypes": [setup.dtype]}
        assert plan(implementation="truestep", callbacks=[setup.callback], **asked) == [setup]
    assert {setup.scorers is None for setup in whole if setup.callback == "WeaveCallback"} == {True, False}


def test_the_widest_row_fits_into_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    setup = Setup(topology="zero3_persistent", ranks=16, dtype="bfloat16", steps=10_000, callback="WeaveCallback")
    compared = Comparisons({step: Comparison(error=123.4, bound=0.1) for step in range(1000)})
    show_trainings(Console(width=80), [Result(setup, compared, seconds=1234.56)], lambda setup: False)
    heading, *_ = (line for line in capsys.readouterr().out.splitlines() if "bitwise" in line)
    assert heading.split() == [
        "callback",
        "topology",
        "ranks",
        "dtype",
        "steps",
        "bound",
        "bitwise",
        "in",
        "s",
        "verdict",
    ]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with files that are no trajectories."""
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("not safetensors")
    save_file({}, "model.safetensors")


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--implementation json", "implementation='json': it has none of BEMACallback"),
        ("--implementation no_such_package", "implementation='no_such_package': cannot be imported"),
        ("--callback BEMACallback --implementation truestep_reference.ref_sync", "--callback BEMACallback: "),
        ("--callback NoSuchCallback", "argument --callback: invalid choice: 'NoSuchCallback'"),
        ("--topology ring", "argument --topology: invalid choice: 'ring'"),
        ("--topology single --ranks 2", "--topology, --ranks and --dtype: no training has these together"),
        ("--topology ddp --ranks 1", "--topology, --ranks and --dtype: no training has these together"),
        ("--callback LogCompletionsCallback --dtype float32", "LogCompletionsCallback is compared in float64"),
        ("--ranks 0", "--ranks 0: "),
        ("--dtype int8", "argument --dtype: invalid choice: 'int8'"),
        ("--steps 0", "--steps 0: must be at least 1"),
        ("--seed -1", "argument --seed: -1: must be at least 0"),
        ("--seed one", "argument --seed: invalid _seed value: 'one'"),
        ("--time 0", "argument --time: 0: must be more than 0"),
        ("--timeout inf", "argument --timeout: inf: must be more than 0 and finite"),
        ("--timeout nan", "argument --timeout: nan: "),
        ("--report text", "text"),
        ("--report text/report", "text/report"),
        ("--markdown nowhere/document.md", "nowhere/document.md"),
        ("--steps few", "argument --steps: invalid int value: 'few'"),
        ("--model nowhere", "--model nowhere: neither qwen2, "),
        ("--replay nowhere", "nowhere"),
        ("--replay text", "text"),
        ("--replay model.safetensors", "model.safetensors: not a trajectory"),
        ("--no-such-option", "unrecognized arguments: --no-such-option"),
        ("--only RICH-99", "--only RICH-99: there is no such clause; there are BEMA, "),
        ("--only RICH-", "--only RICH-: "),
        ("--only RICH --callback BEMACallback", "--only RICH: --callback BEMACallback has other clauses"),
        ("--clauses --expect nowhere", "nowhere"),
        ("--clauses --implementation json", "implementation='json': it has none of BEMACallback"),
    ],
)
def test_arguments_that_do_not_fit_exit_with_2_and_say_why(
    arguments: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 2
    assert re.search(rf"truestep verify: error: .*{re.escape(message)}", capfd.readouterr().err)
    assert not Path("truestep-verify").exists()
