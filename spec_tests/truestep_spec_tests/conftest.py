"""Options and fixtures of the suite."""

import gc
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from truestep_fixtures.pytest_ranks import ranks
from truestep_fixtures.trackers import QUIET

from truestep_spec_tests.implementation import CALLBACKS, Implementation

__all__ = ["ranks"]

os.environ |= QUIET  # before a test imports Transformers, and with it trackers

# What runs on several ranks takes milliseconds that vary with the machine's load.
settings.register_profile(
    "suite",
    max_examples=50,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("fuzz", settings.get_profile("suite"), max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--implementation",
        default="truestep",
        help="what is tested: a package (truestep, truestep_reference, trl, …) or the path of a class",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "clause(*ids): the clauses of SPEC.md that the test holds")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")


def pytest_report_header(config: pytest.Config) -> str:
    return f"implementation under test: {Implementation(config.getoption('--implementation'))}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips the tests of callbacks that the implementation does not have."""
    implementation = Implementation(config.getoption("--implementation"))
    for callback, stem in CALLBACKS.items():
        if callback not in implementation.offered:
            skip = pytest.mark.skip(reason=f"{implementation.name} has no {callback}")
            for item in items:
                if item.path.name.startswith(f"test_{stem}"):
                    item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Keeps the hundred thousands of objects of imported libraries out of garbage collections, which take a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def implementation(request: pytest.FixtureRequest) -> Implementation:
    """The implementation under test."""
    return Implementation(request.config.getoption("--implementation"))


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The root of the source tree, for tests of the tree itself."""
    for directory in Path(__file__).parents:
        if (directory / "tox.ini").is_file():
            return directory
    pytest.skip("needs the source tree; this is an installed copy")
