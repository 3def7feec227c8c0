"""What a display shows of a GPU."""

import os
from pathlib import Path

import pytest
import torch
from truestep_fixtures.terminal import Terminal

from truestep_spec_tests.differential.cases import skip_the_reference
from truestep_spec_tests.differential.rich_progress_cases import hold_still
from truestep_spec_tests.implementation import Implementation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.clause("RICH-1")
def test_the_memory_in_use_is_shown(implementation: Implementation, tmp_path: Path) -> None:
    skip_the_reference(implementation, "draws nothing")
    visible = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
    with Terminal(columns=120) as terminal:
        child = terminal.start(hold_still, implementation.name, tmp_path, tmp_path / "go on", environment=visible)
        terminal.wait_for("GiB")
        (tmp_path / "go on").touch()
        assert child.wait() == 0
