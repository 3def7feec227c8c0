"""`truestep verify` under torchrun, which starts every rank as an interpreter of its own."""

import os
import subprocess
import sys
from pathlib import Path

from truestep_spec_tests.meta.verify_cases import QUICK, assert_one_of_two_ranks_reports


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
