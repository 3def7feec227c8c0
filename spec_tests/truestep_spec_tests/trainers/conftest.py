"""What the trainings of this package begin with."""

from pathlib import Path

import pytest
from truestep_fixtures import models

from truestep_spec_tests.implementation import Implementation


@pytest.fixture
def subject(implementation: Implementation) -> Implementation:
    """The implementation under test, if it has the callback."""
    if "SyncRefModelCallback" not in implementation.offered:
        pytest.skip(f"{implementation} has no SyncRefModelCallback")
    return implementation


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny model, from which TRL loads the policy and, once more, the reference."""
    directory = tmp_path_factory.mktemp("model")
    models.build("qwen2").save_pretrained(directory)
    return directory
