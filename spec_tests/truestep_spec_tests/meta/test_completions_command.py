"""`truestep completions` as its users run it: its exit status and what it shows of files of completions.

The command is called in this process, as `truestep` would call it, except where the process itself matters.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

# Of arguments, of which the last may have spaces: what is printed.
Show = Callable[..., str]

QUESTION = "What is 12 + 5?"
STORY = "One day the fox went to the river and met a heron there, who asked what it was looking for, and why so late."

STYLES = re.compile(r"\x1b\[[0-9;]*m")
COLOURS = re.compile(r"\x1b\[(?:[0-9;]*;)?(?:3|4|9|10)[0-9][0-9;]*m")


def write(rows: Sequence[Mapping[str, Any]], file: Path = Path("out/completions.jsonl"), rest: str = "") -> None:
    file.parent.mkdir(exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    file.write_text("".join(lines) + rest, encoding="utf-8", newline="\n")


def table(steps: Sequence[int] = (2, 4, 6)) -> list[dict[str, Any]]:
    """Three prompts, of which two have the same text, in two datasets."""
    return [
        {"step": step, "prompt": prompt, "completion": completion, "dataset": dataset}
        for step in steps
        for prompt, completion, dataset in (
            (QUESTION, f"{10 + step}", "easy"),
            ("Tell a story.", f"{STORY} {step}", "easy"),
            (QUESTION, "Seventeen." if step < 6 else "17", "hard"),
        )
    ]


@pytest.fixture
def show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Show:
    """Runs the command on what is below the working directory; as on a terminal where a width is given."""
    (command,) = entry_points(group="truestep.commands", name="completions")
    main = command.load()
    monkeypatch.chdir(tmp_path)
    for variable in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")

    def run(*arguments: str, width: int | None = None) -> str:
        with monkeypatch.context() as patch:
            if width is not None:
                patch.setenv("FORCE_COLOR", "1")
                patch.setenv("COLUMNS", str(width))
            assert main(arguments) == 0
        printed = capfd.readouterr()
        assert printed.err == ""
        return printed.out

    return run


def test_without_options_the_newest_step_is_shown(show: Show) -> None:
    write(table())
    expected = f"""\
step 6

  #1
    prompt: {QUESTION}
    completion: 16
    dataset: easy

  #2
    prompt: Tell a story.
    completion: {STORY} 6
    dataset: easy

  #3
    prompt: {QUESTION}
    completion: 17
    dataset: hard

out/completions.jsonl: 9 rows, 3 steps (2 to 6), 3 prompts
"""
    assert show("out") == expected
    assert show("out", "--step", "6") == show("out", "--step", "-1") == expected


@pytest.mark.parametrize(("step", "found"), [("2", 2), ("-3", 2), ("4", 4), ("-2", 4)])
def test_a_step_is_given_by_its_number_or_counted_from_the_newest(show: Show, step: str, found: int) -> None:
    write(table())
    printed = show("out", "--step", step)
    assert printed.startswith(f"step {found}\n")
    assert f"completion: {STORY} {found}\n" in printed
    assert printed.count("completion: ") == 3


def test_a_prompt_is_shown_over_time_with_what_never_changes_once(show: Show) -> None:
    write(table())
    assert (
        show("out", "--prompt", "3")
        == f"""\
#3
  prompt: {QUESTION}
  dataset: hard

  step 2
    completion: Seventeen.

  step 4
    completion: Seventeen.

  step 6
    completion: 17

out/completions.jsonl: 9 rows, 3 steps (2 to 6), 3 prompts
"""
    )


def test_a_text_finds_the_prompts_that_contain_it_and_tells_equal_ones_apart(show: Show) -> None:
    write(table())
    printed = show("out", "--prompt", "what IS 12")
    assert re.findall(r"^#\d$", printed, flags=re.MULTILINE) == ["#1", "#3"]
    assert re.findall(r"dataset: (\w+)", printed) == ["easy", "hard"]
    assert re.findall(r"completion: (.+)", printed) == ["12", "14", "16", "Seventeen.", "Seventeen.", "17"]
    at_a_step = show("out", "--prompt", "what IS 12", "--step", "-2")
    assert re.findall(r"#\d|completion: .+", at_a_step) == ["#1", "completion: 14", "#3", "completion: Seventeen."]


def test_columns_that_come_up_later_are_shown(show: Show) -> None:
    write([*table([2]), *({**row, "eval_answer": None} for row in table([4]))])
    printed = show("out", "--prompt", "1")
    assert printed.index("dataset: easy") < printed.index("step 2") < printed.index("    eval_answer: None")
    assert re.search(r"^step +completion +eval_answer$", STYLES.sub("", show("out", "--prompt", "1", width=80)), re.M)


def test_other_tables_are_found_by_name_and_as_files(show: Show) -> None:
    write(table())
    write([{"step": 5, "prompt": "Another", "completion": "one"}], Path("out/completions_2.jsonl"))
    expected = """\
step 5

  #1
    prompt: Another
    completion: one

out/completions_2.jsonl: 1 row, step 5, 1 prompt
"""
    assert show("out", "--table", "completions_2") == expected
    assert show("out", "--table", "completions_2.jsonl") == expected
    assert show("out/completions_2.jsonl") == expected


def test_a_line_that_is_not_written_to_its_end_is_left_out(show: Show) -> None:
    write(table())
    whole = show("out")
    write(table(), rest='{"step": 8, "prompt": "What')
    assert show("out") == whole


@pytest.mark.parametrize("width", [None, 100])
def test_text_is_shown_literally_and_reaches_no_terminal_as_control_codes(show: Show, width: int | None) -> None:
    prompt = "[red]a[/red] [/b] :smile: \\[c]"
    completion = "\x1b[2J\x1b]0;title\x07 \u2028 \u0085 \r \x9b31m \u202e \ud800 東京"
    # What a Python writes that escapes half of a surrogate pair, which UTF-8 does not have.
    row = json.dumps({"step": 1, "prompt": prompt, "completion": completion, "[d]\x1b": "\u2029"})
    write([{"step": 1, "prompt": "\u2028", "completion": "\u0085"}], rest=f"{row}\n")
    printed = STYLES.sub("", show("out", width=width))
    shown = r"\x1b[2J\x1b]0;title\x07 \u2028 \x85 \x0d \x9b31m \u202e \ud800 東京"
    for text in (prompt, shown if width is None else shown[:20], r"[d]\x1b", r"\u2029", "東京", "2 rows, step 1"):
        assert text in printed
    assert [character for character in printed if not character.isprintable() and character != "\n"] == []


def test_lines_of_a_text_stay_lines_and_are_not_taken_for_columns(show: Show) -> None:
    write([{"step": 1, "prompt": "One\ncompletion: no\n\n", "completion": "\n\tif x:"}])
    assert "    prompt: One\n      completion: no\n      \n      \n    completion: \n      \tif x:\n" in show("out")
    lines = [line.rstrip() for line in STYLES.sub("", show("out", width=80)).splitlines()]
    assert lines[3] == "1   One"
    assert lines[4].startswith("    completion: no")
    assert lines[4].endswith("        if x:")


@pytest.mark.parametrize("width", [40, 60, 80, 100, 160])
@pytest.mark.parametrize("arguments", [(), ("--prompt", "2")])
def test_a_terminal_gets_what_fits_into_it(show: Show, width: int, arguments: tuple[str, ...]) -> None:
    wide = "東京はどこですか。" * 20
    write([{**row, "completion": f"{wide} {row['completion']}", "eval_answer": STORY} for row in table([2])])
    printed = STYLES.sub("", show("out", "--lines", "0", *arguments, width=width))
    *lines, _ = printed.splitlines()  # the last one is a line to copy a path from
    assert max(map(cell_len, lines)) <= width
    words = [*STORY.split(), *QUESTION.split()] if not arguments else STORY.split()
    assert [word for word in words if word not in printed] == []
    assert printed.count("東") == 20 * (1 if arguments else 3)


def test_there_is_a_table_where_texts_get_room_and_records_where_they_do_not(show: Show) -> None:
    write([{**row, "eval_answer": STORY} for row in table([2])])
    heading = re.compile(r"^# +prompt +completion +dataset +eval_answer *$", flags=re.MULTILINE)
    for width, is_table in ((60, False), (80, False), (100, True), (160, True)):
        printed = STYLES.sub("", show("out", width=width))
        assert (heading.search(printed) is not None) is is_table
        assert ("  #2\n    prompt       Tell a story." in re.sub(r" +\n", "\n", printed)) is not is_table


def test_a_terminal_leaves_out_the_middle_of_long_texts_and_nothing_else_does(show: Show) -> None:
    numbers = [f"line {number}" for number in range(1, 101)]
    write([{"step": 1, "prompt": "Count.", "completion": "\n".join(numbers)}])
    for arguments, lines in ((), 12), (("--lines", "5"), 5), (("--lines", "0"), 100), (("--lines", "99"), 100):
        printed = STYLES.sub("", show("out", *arguments, width=80))
        shown = re.findall(r"line \d+", printed)
        assert shown == (numbers if lines == 100 else numbers[: (lines + 1) // 2] + numbers[-(lines // 2) :])
        assert ("⋮" in printed) is (lines < 100)
        assert lines == 100 or f"⋮ {100 - lines} more lines" in printed
    assert re.findall(r"line \d+", show("out")) == numbers


def test_a_terminal_says_where_a_completion_is_the_one_of_the_step_before_or_empty(show: Show) -> None:
    write([{"step": step, "prompt": "?", "completion": text} for step, text in enumerate(["a", "a", "", "b"], start=1)])
    printed = STYLES.sub("", show("out", "--prompt", "1", width=80))
    assert re.findall(r"^ +(\d) +(\w+) *$", printed, flags=re.MULTILINE) == [
        ("1", "a"),
        ("2", "unchanged"),
        ("3", "empty"),
        ("4", "b"),
    ]


def test_no_color_is_respected(show: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    write(table())
    assert COLOURS.search(show("out", width=60))
    monkeypatch.setenv("NO_COLOR", "1")
    assert COLOURS.search(show("out", width=60)) is None


def test_without_rich_a_terminal_gets_plain_text(show: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    write(table())
    plain = show("out")
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert show("out", width=80) == plain


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nowhere", "OUTPUT_DIR nowhere: no such directory; give the output_dir of the training"),
        ("bare", "OUTPUT_DIR bare: it has no completions.jsonl; no completions have been logged there"),
        ("out --table third", "--table third: out has completions, completions.1"),
        ("out/completions.jsonl --table x", "--table x: out/completions.jsonl is a table already"),
        ("empty.jsonl", "empty.jsonl: it has no rows of completions"),
        ("empty.jsonl --prompt 1", "empty.jsonl: it has no rows of completions"),
        ("other.jsonl", "other.jsonl: row 1 has step, loss, not a prompt and a completion"),
        ("out --step 5", "--step 5: out/completions.jsonl has 3 steps (2 to 6); they are 2, 4, 6"),
        ("out --step 0", "--step 0: out/completions.jsonl has 3 steps (2 to 6); they are 2, 4, 6"),
        ("out --step -4", "--step -4: out/completions.jsonl has 3 steps (2 to 6); they are 2, 4, 6"),
        ("many.jsonl --step 99", "--step 99: many.jsonl has 1,000 steps (2 to 2000); the nearest of them are 80, 82, "),
        ("out --step x", "argument --step: invalid int value: 'x'"),
        ("out --prompt 4", "--prompt 4: out/completions.jsonl has prompts 1 to 3"),
        ("out --prompt 0", "--prompt 0: out/completions.jsonl has prompts 1 to 3"),
        ("out --prompt nothing", "--prompt nothing: no prompt in out/completions.jsonl contains this text"),
        ("out --lines -1", "argument --lines: '-1': must be an integer of at least 0"),
        ("", "the following arguments are required: OUTPUT_DIR"),
    ],
)
def test_what_cannot_be_shown_exits_with_2_and_says_why(
    show: Show, arguments: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    write(table())
    write(table(), Path("out/completions.1.jsonl"))
    write([], Path("empty.jsonl"))
    write([{"step": 1, "loss": 2.5}], Path("other.jsonl"))
    write([{"step": step, "prompt": "", "completion": ""} for step in range(2, 2001, 2)], Path("many.jsonl"))
    Path("bare").mkdir()
    with pytest.raises(SystemExit) as ended:
        show(*arguments.split())
    assert ended.value.code == 2
    assert f"truestep completions: error: {message}" in capfd.readouterr().err


def test_a_reader_that_has_enough_may_close_the_pipe(tmp_path: Path) -> None:
    rows = [{"step": 1, "prompt": f"{number}", "completion": STORY} for number in range(5000)]
    write(rows, tmp_path / "completions.jsonl")
    command = [sys.executable, "-m", "truestep", "completions", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "step 1\n"
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=120) == 0
