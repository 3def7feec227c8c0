"""Golden files: they are what the reference says now, and what is held against them and wrong is found."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from jsonschema import Draft202012Validator
from torch import Tensor
from truestep_fixtures import topologies
from truestep_fixtures.ranks import RankPool

from truestep_spec_tests.golden.command import main
from truestep_spec_tests.golden.consuming import FILES
from truestep_spec_tests.golden.driving import point, policy_of
from truestep_spec_tests.golden.files import DIRECTORY, FORMAT, read

Ranks = Callable[[int], RankPool]
Run = Callable[..., list[Any]]

LARGEST = 400_000
"""Bytes that all files may have together."""


@pytest.fixture
def run(ranks: Ranks) -> Run:
    return lambda size, function, *args: ranks(size).run(function, *args)


def partitions(trajectory: Any) -> dict[str, tuple[int, Tensor]]:
    """Of each parameter, where this rank's partition begins, and what is in it, in a model as DeepSpeed places it."""
    placed = topologies.place(policy_of(trajectory), "zero3")
    return {
        name: (dist.get_rank(parameter.ds_process_group) * parameter.ds_tensor.numel(), parameter.ds_tensor.clone())
        for name, parameter in placed.model.named_parameters()
    }


def test_the_reference_fills_the_files_byte_for_byte(tmp_path: Path) -> None:
    assert main(["fill", "--directory", str(tmp_path)]) == 0
    expected = {file.name: file.read_bytes() for file in DIRECTORY.glob("*.json") if file.name != "schema.json"}
    assert expected == {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert {f"{stem}.json" for stem in FILES} == expected.keys()
    assert sum(map(len, expected.values())) <= LARGEST


@pytest.mark.parametrize("file", FILES)
def test_the_files_are_what_the_schema_says(file: str) -> None:
    schema = json.loads((DIRECTORY / "schema.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator({"$ref": f"#/$defs/{file}", "$defs": schema["$defs"]})
    assert [error.message for error in validator.iter_errors(read(DIRECTORY, file))] == []


@pytest.mark.parametrize("implementation", ["truestep_reference", "truestep"])
def test_every_case_is_equal(implementation: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["consume", "--implementation", implementation], run)
    printed = capsys.readouterr().out.splitlines()
    assert (status, [line for line in printed if ": different" in line]) == (0, [])
    counts = {file: len(read(DIRECTORY, file)["cases"]) for file in FILES}
    left_out = 0 if importlib.util.find_spec("weave") else counts["weave_eval"]
    assert min(counts.values()) > 0
    assert printed[-1] == f"{sum(counts.values()) - left_out} equal, 0 different, {left_out} left out"


def test_the_order_of_names_does_not_count(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in FILES:
        text = (DIRECTORY / f"{file}.json").read_text(encoding="utf-8")
        reversed_ = json.loads(text, object_pairs_hook=lambda pairs: dict(reversed(pairs)))
        (tmp_path / f"{file}.json").write_text(json.dumps(reversed_), encoding="utf-8")
    status = main(["consume", "--implementation", "truestep_reference", "--directory", str(tmp_path)], run)
    printed = capsys.readouterr().out
    assert (status, [line for line in printed.splitlines() if ": different" in line]) == (0, [])


def test_a_file_of_another_version_is_refused(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bema.json"
    contents = json.loads((DIRECTORY / file.name).read_text(encoding="utf-8"))
    file.write_text(json.dumps(contents | {"format": FORMAT + 1}), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["consume", "--directory", str(tmp_path), "--file", "bema"], run)
    assert f"{file} has format={FORMAT + 1}, and what is read here is format={FORMAT}: " in capsys.readouterr().err
    file.write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="has format=None"):
        read(tmp_path, "bema")


def spoil_bema(case: Any) -> None:
    case["steps"][4]["values"]["embedding.weight"][3] = "0x1.0000000000000p+9"


def spoil_ref_sync(case: Any) -> None:
    case["steps"][5]["values"]["scale"][0] = "nan"


def spoil_sign(case: Any) -> None:
    values, bounds = (case["steps"][2][part]["head.bias"] for part in ("values", "bounds"))
    assert (values[2], bounds[2]) == ("-0x0.0p+0", "0x0.0p+0")
    values[2] = "0x0.0p+0"


def spoil_zero3(case: Any) -> None:
    case["ranks"][1]["steps"]["3"]["values"]["shift"][0] = "0x1.0000000000000p+9"


def spoil_weave_eval(case: Any) -> None:
    case["evaluations"][1]["summary"]["avg_exact match"] = {"float": "0x1.0000000000000p+9"}


def spoil_rich_progress(case: Any) -> None:
    case["events"][2]["view"]["epoch"] = "0.51/3"


def spoil_log_completions(case: Any) -> None:
    case["rows"][6]["prompt"] += "."


def spoil_columns(case: Any) -> None:
    case["columns"].reverse()


@pytest.mark.parametrize(
    ("file", "spoil", "case", "where"),
    [
        ("bema", spoil_bema, "the weights of the defaults", "step 4, embedding.weight[1, 1]: found "),
        ("ref_sync", spoil_ref_sync, "every step", "step 5, scale: found "),
        (
            "ref_sync",
            spoil_sign,
            "copies of what is not finite",
            "step 2, head.bias[2]: found -0x0.0p+0, expected 0x0.0p+0",
        ),
        ("zero3", spoil_zero3, "BEMACallback on 2 ranks", "rank 1, step 3, shift[0]: found "),
        (
            "weave_eval",
            spoil_weave_eval,
            "evaluations with three scorers",
            "some scores are missing, avg_exact match, float: found ",
        ),
        (
            "rich_progress",
            spoil_rich_progress,
            "a training with an evaluation in it",
            'event 3, on_step_end, epoch: found "0.50/3", expected "0.51/3"',
        ),
        ("log_completions", spoil_log_completions, "every prompt at every second step", "row 6, prompt: found "),
        ("log_completions", spoil_columns, "several datasets", 'row 0, columns[0]: found "step", expected "level"'),
    ],
)
def test_a_wrong_value_is_reported_with_its_case_and_where_it_is(
    file: str,
    spoil: Callable[[Any], None],
    case: str,
    where: str,
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(DIRECTORY, tmp_path, dirs_exist_ok=True)
    contents = read(tmp_path, file)
    contents["cases"] = [one for one in contents["cases"] if one["name"] == case]
    spoil(contents["cases"][0])
    (tmp_path / f"{file}.json").write_text(json.dumps(contents), encoding="utf-8")
    arguments = ["consume", "--implementation", "truestep_reference", "--directory", str(tmp_path), "--file", file]
    assert main(arguments, run) == 1
    reported = capsys.readouterr().out.splitlines()
    assert reported[-1] == "0 equal, 1 different, 0 left out"
    assert reported[0].startswith(f"{file}, {case}: different: {where}")


def test_callbacks_that_are_not_offered_are_left_out(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["consume", "--implementation", "truestep_reference.RichProgressCallback"]
    assert main([*arguments, "--file", "bema", "--file", "rich_progress"], run) == 0
    *_, counts = capsys.readouterr().out.splitlines()
    left_out, equal = (len(read(DIRECTORY, file)["cases"]) for file in ("bema", "rich_progress"))
    assert counts == f"{equal} equal, 0 different, {left_out} left out"


def test_the_ranges_are_those_that_deepspeed_gives_ranks(ranks: Ranks) -> None:
    contents = read(DIRECTORY, "zero3")
    trajectory = contents["trajectory"]
    whole = point(trajectory, trajectory["steps"][0])
    for case in contents["cases"]:
        found = ranks(len(case["ranks"])).run(partitions, trajectory)
        for rank, expected in enumerate(case["ranks"]):
            for name, (start, stop) in expected["ranges"].items():
                begin, held = found[rank][name]
                value = whole[name].flatten()
                assert [min(begin, len(value)), min(begin + len(held), len(value))] == [start, stop]
                assert value[start:stop].tolist() == held[: stop - start].double().tolist()
                assert held[stop - start :].isnan().all()
