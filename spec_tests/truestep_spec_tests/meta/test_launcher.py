"""`truestep verify` where a launcher has started every rank, such as torchrun."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
from truestep_fixtures.ranks import free_port
from truestep_fixtures.terminal import Terminal

from truestep_spec_tests.meta.verify_cases import QUICK, assert_one_of_two_ranks_reports
from truestep_spec_tests.verify.command import main


def test_under_torchrun_its_ranks_are_used_and_one_of_them_reports(tmp_path: Path) -> None:
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2"
    command = f"{launcher} -m truestep verify --topology ddp {QUICK}"
    process = subprocess.run(
        [sys.executable, *command.split()],
        cwd=tmp_path,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
        check=False,
    )
    assert process.returncode == 0
    assert_one_of_two_ranks_reports(process.stdout, tmp_path)


def exit_with(arguments: str) -> NoReturn:
    sys.exit(main(arguments.split()))


def test_the_ranks_of_a_launcher_are_used_and_one_of_them_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with Terminal(columns=120) as terminal:
        ranks = [
            terminal.start(exit_with, f"--topology ddp {QUICK}", environment=world | {"RANK": rank, "LOCAL_RANK": rank})
            for rank in "01"
        ]
        assert [rank.wait(120) for rank in ranks] == [0, 0]
        printed = "\n".join(terminal.history)
    assert_one_of_two_ranks_reports(printed, tmp_path)
