"""Fixtures of the tests of the suite's own tools."""

import runpy
import sys
from pathlib import Path

import pytest

from truestep_spec_tests.meta.verify_cases import Verify


@pytest.fixture
def verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Verify:
    """Runs `python -m truestep verify` in this process, in a directory that packages can be imported from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def run(arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["truestep", "verify", *arguments.split()])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("truestep", run_name="__main__")
        assert isinstance(ended.value.code, int)
        return ended.value.code, capfd.readouterr().out

    return run
