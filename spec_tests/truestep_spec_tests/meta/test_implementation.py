"""What `--implementation` takes, and what it says about what it does not take."""

import pickle
from pathlib import Path

import pytest
from truestep_reference import BEMACallback as ReferenceBEMACallback

from truestep_spec_tests.implementation import CALLBACKS, Implementation


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that modules are imported from."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "name",
    [
        "truestep_reference",
        "truestep_reference.bema",
        "truestep_reference.bema.BEMACallback",
        "BEMACallback=truestep_reference.bema.BEMACallback",
    ],
)
def test_a_package_a_module_and_a_class_lead_to_the_callback(name: str) -> None:
    implementation = Implementation(name)
    assert implementation.BEMACallback is ReferenceBEMACallback
    every = name == "truestep_reference"
    assert implementation.offered == (list(CALLBACKS) if every else ["BEMACallback"])


def test_a_class_of_another_name_says_which_callback_it_is(installed: Path) -> None:
    (installed / "averages_of_mine.py").write_text("class Fast: ...\n")
    assert Implementation("BEMACallback=averages_of_mine.Fast").BEMACallback.__name__ == "Fast"
    with pytest.raises(ValueError, match=r"it has none of BEMACallback.*: BEMACallback=averages_of_mine.Fast$"):
        Implementation("averages_of_mine.Fast")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_package", r"implementation='no_such_package': cannot be imported"),
        ("no_such_package.callbacks.BEMACallback", r"cannot be imported"),
        ("truestep_reference.no_such_module.BEMACallback", r"cannot be imported"),
        ("json", r"implementation='json': it has none of BEMACallback"),
        ("json.decoder.JSONDecoder", r"it has none of BEMACallback"),
        ("BEMACallback=json.NoSuchClass", r"it has none of BEMACallback"),
        ("NoSuchCallback=truestep_reference.bema.BEMACallback", r"it has none of BEMACallback"),
    ],
)
def test_what_has_no_callback_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Implementation(name)


def test_a_package_that_lacks_a_dependency_says_which(installed: Path) -> None:
    (installed / "needs_more.py").write_text("import what_is_not_installed\n")
    with pytest.raises(ValueError, match=r"'needs_more': .*what_is_not_installed"):
        Implementation("needs_more")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("from json import what_is_not_there", "cannot be imported .ImportError: cannot import name"),
        ("raise OSError('no disk')", "cannot be imported .OSError: no disk"),
        ("class", "cannot be imported .SyntaxError: "),
    ],
)
def test_a_package_that_cannot_be_imported_says_why(installed: Path, text: str, message: str) -> None:
    (installed / "broken_by_me.py").write_text(text)
    with pytest.raises(ValueError, match=message):
        Implementation("broken_by_me")


def test_what_cannot_be_imported_when_asked_for_is_not_offered(installed: Path) -> None:
    (installed / "lazy_one.py").write_text(
        "class BEMACallback: ...\ndef __getattr__(name):\n    import what_is_not_installed\n"
    )
    assert Implementation("lazy_one").offered == ["BEMACallback"]


def test_the_version_is_that_of_the_distribution(installed: Path) -> None:
    (installed / "averages_of_theirs.py").write_text("class BEMACallback: ...\n")
    about = installed / "their_distribution-3.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Name: their-distribution\nVersion: 3.2\n")
    (about / "top_level.txt").write_text("averages_of_theirs\n")
    assert str(Implementation("averages_of_theirs.BEMACallback")) == "averages_of_theirs.BEMACallback 3.2"


def test_without_a_distribution_the_version_is_what_the_package_says_or_where_it_lies(installed: Path) -> None:
    (installed / "with_version.py").write_text("__version__ = '7.1'\nclass BEMACallback: ...\n")
    (installed / "without_version.py").write_text("class BEMACallback: ...\n")
    assert Implementation("with_version").version == "7.1"
    assert Implementation("without_version").version == f"from {installed / 'without_version.py'}"


def test_ranks_can_be_sent_one() -> None:
    implementation = Implementation("truestep_reference")
    assert pickle.loads(pickle.dumps(implementation)) == implementation
