"""The documents say what is so: their code runs, their commands exist, their links lead somewhere."""

import configparser
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from truestep_fixtures.weave_server import recording_server

DOCUMENTS = ("README.md", "SPEC.md", "CONTRIBUTING.md", "CHANGELOG.md")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    lines = "".join(blocks(text, "console")).splitlines()
    return [shlex.split(command, comments=True) for line in lines for command in line.split("&&")]


@pytest.fixture(scope="module")
def readme(checkout: Path) -> str:
    return (checkout / "README.md").read_text(encoding="utf-8")


def test_the_readmes_code_runs(readme: str, tmp_path: Path) -> None:
    program = "\n".join(blocks(readme, "python"))  # one after the other, as a reader would
    with recording_server() as server:
        subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=120)
        evaluations = server.evaluations()
    assert (tmp_path / "out" / "bema" / "model.safetensors").is_file()
    assert "SyncRefModelCallback" in program
    if importlib.util.find_spec("weave") is not None:
        assert [evaluation.attributes["training_step"] for evaluation in evaluations] == [10, 20]
    shown = [words for words in commands(readme) if words[:2] == ["truestep", "completions"]]
    assert len(shown) >= 2
    for words in shown:
        command = [sys.executable, "-m", *words]
        assert (
            "What is a step?"
            in subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
        )


def test_the_readmes_tox_commands_are_what_ci_runs(readme: str, checkout: Path) -> None:
    first = commands(readme)[:4]
    assert first[0] == first[2] == ["python", "-m", "pip", "install", "tox"]
    assert first[1] == ["tox", "run", "-e", "verify"]
    assert first[3] == ["tox", "run"]
    assert "python -m pip install tox && tox run\n" in (checkout / ".ci" / "run").read_text(encoding="utf-8")


def test_the_tox_environments_that_documents_name_exist(checkout: Path) -> None:
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(checkout / "tox.ini")
    for document in DOCUMENTS:
        for name in re.findall(r"tox run -e ([a-z]+)\b", (checkout / document).read_text(encoding="utf-8")):
            assert f"testenv:{name}" in tox, f"{document} names the environment {name!r}"


def test_the_readmes_verify_commands_are_understood(readme: str) -> None:
    from truestep_spec_tests.verify.arguments import parser

    found = [words for words in commands(readme) if "verify" in words and "tox" not in words]
    assert len(found) >= 3
    for words in found:
        parser().parse_args(words[words.index("verify") + 1 :])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_within_the_tree_lead_somewhere(document: str, checkout: Path) -> None:
    text = (checkout / document).read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in re.findall(r"^#+ .*", text, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, f"{document} links to the heading {target}"
        elif "://" not in target:
            assert (checkout / target.partition("#")[0]).exists(), f"{document} links to {target}"
