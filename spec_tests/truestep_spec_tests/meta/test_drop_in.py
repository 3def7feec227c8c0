"""The callbacks in the place of TRL's, as far as it needs no TRL: `truestep run`, what stands in for TRL, and classes.

A package of a few lines goes by TRL's name here. It has one of the callbacks, as an old version of TRL may.
"""

import importlib
import inspect
import logging
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Protocol

import pytest

from truestep_spec_tests.implementation import CALLBACKS, Implementation

Patch = Callable[[], AbstractContextManager[object]]

OLD_TRL = {
    "__init__.py": "",
    "trainer/__init__.py": "",
    "trainer/callbacks.py": (
        "class SyncRefModelCallback:\n"
        "    def __init__(self, ref_model, accelerator): self.of = accelerator\n"
        "    @staticmethod\n"
        "    def blend(): return SyncRefModelCallback.share()\n"
        "    @staticmethod\n"
        "    def share(): return 0.6\n"
        "class OtherCallback: pass\n"
    ),
    "trainer/training.py": "from trl.trainer.callbacks import OtherCallback, SyncRefModelCallback as Sync\n",
    "teacher.py": (
        "from trl.trainer.callbacks import SyncRefModelCallback\n"
        "class Teacher(SyncRefModelCallback):\n"
        "    def __init__(self): super().__init__(None, accelerator='teacher')\n"
    ),
}


@pytest.fixture
def patch(implementation: Implementation) -> Patch:
    found: Patch | None = getattr(importlib.import_module(implementation.name), "patch_trl", None)
    if found is None:
        pytest.skip(f"{implementation} does not patch TRL")
    return found


@contextmanager
def other_trl() -> Iterator[None]:
    """What is loaded of TRL is forgotten, and back at the end."""

    def take() -> dict[str, ModuleType]:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if f"{name}.".startswith("trl.")}

    before = take()
    yield
    take()
    sys.modules.update(before)


@pytest.fixture
def no_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """TRL is looked for in a folder that has nothing yet."""
    find = PathFinder.find_spec

    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return find(name, [str(tmp_path)] if name == "trl" else path)

    monkeypatch.setattr(PathFinder, "find_spec", find_spec)
    with other_trl():
        yield


@pytest.fixture
def old_trl(no_trl: None, tmp_path: Path) -> None:
    """A package of a few lines is TRL."""
    write_old_trl(tmp_path)


def write_old_trl(directory: Path) -> None:
    for name, text in OLD_TRL.items():
        file = directory / "trl" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    importlib.invalidate_caches()


def load(module: str) -> ModuleType:
    return importlib.import_module(module)


@pytest.mark.usefixtures("no_trl")
@pytest.mark.parametrize("callback", CALLBACKS)
def test_without_trl_its_name_has_the_five(callback: str, patch: Patch, implementation: Implementation) -> None:
    with patch():
        found = getattr(load("trl"), callback)
        assert found is getattr(load("trl"), callback)
        assert found is getattr(load("trl.trainer.callbacks"), callback)
        assert issubclass(implementation.callback(callback), found)
        assert inspect.signature(found) == inspect.signature(implementation.callback(callback))
    with pytest.raises(ModuleNotFoundError):
        load("trl")


@pytest.mark.usefixtures("no_trl")
def test_without_trl_its_name_has_nothing_else_and_says_why(patch: Patch) -> None:
    with patch():
        assert "TRL itself is not installed" in str(load("trl").__doc__)
        with pytest.raises(AttributeError, match=r"'DPOTrainer': TRL was not found.*; truestep stands in for BEMA"):
            _ = load("trl").DPOTrainer
        with pytest.raises(ImportError, match=r"cannot import name 'DPOTrainer' from 'trl' \(.*truestep.drop_in\.py\)"):
            exec("from trl import DPOTrainer")
        with pytest.raises(ModuleNotFoundError):
            load("trl.trainer.dpo_trainer")


@pytest.mark.usefixtures("no_trl")
def test_trl_is_found_that_is_installed_after_the_call(
    patch: Patch, implementation: Implementation, tmp_path: Path
) -> None:
    with patch():
        write_old_trl(tmp_path)
        assert load("trl").__file__ == str(tmp_path / "trl" / "__init__.py")
        assert issubclass(implementation.SyncRefModelCallback, load("trl.trainer.training").Sync)
    assert load("trl.trainer.training").Sync.__module__ == "trl.trainer.callbacks"


@pytest.mark.usefixtures("no_trl")
def test_it_is_undone_where_a_program_has_forgotten_trl(patch: Patch) -> None:
    finders = list(sys.meta_path)
    with patch():
        load("trl.trainer.callbacks")
        del sys.modules["trl"]
    assert finders == sys.meta_path
    assert [name for name in sys.modules if f"{name}.".startswith("trl.")] == []


@pytest.mark.usefixtures("old_trl")
def test_a_module_has_it_whether_it_was_loaded_before_or_is_later(patch: Patch, implementation: Implementation) -> None:
    own = load("trl.trainer.callbacks").SyncRefModelCallback
    assert load("trl.trainer.training").Sync is own
    with patch():
        found = load("trl.trainer.callbacks").SyncRefModelCallback
        assert issubclass(implementation.SyncRefModelCallback, found)
        assert load("trl.trainer.training").Sync is found
        del sys.modules["trl.trainer.training"]
        assert load("trl.trainer.training").Sync is found
    assert load("trl.trainer.callbacks").SyncRefModelCallback is own
    assert load("trl.trainer.training").Sync is own


@pytest.mark.usefixtures("old_trl")
def test_nothing_of_trl_is_loaded_before_it_is_used(patch: Patch, implementation: Implementation) -> None:
    finders = list(sys.meta_path)
    with patch():
        assert [name for name in sys.modules if f"{name}.".startswith("trl.")] == []
        assert issubclass(implementation.SyncRefModelCallback, load("trl.trainer.training").Sync)
    assert finders == sys.meta_path
    assert load("trl.trainer.training").Sync is load("trl.trainer.callbacks").SyncRefModelCallback
    assert load("trl.trainer.training").Sync.__module__ == "trl.trainer.callbacks"


@pytest.mark.usefixtures("old_trl")
def test_other_callbacks_and_those_that_a_version_does_not_have_are_left_alone(patch: Patch) -> None:
    with patch():
        callbacks = load("trl.trainer.callbacks")
        assert callbacks.OtherCallback.__module__ == "trl.trainer.callbacks"
        assert not hasattr(callbacks, "BEMACallback")


@pytest.mark.usefixtures("old_trl")
def test_it_is_undone_when_nobody_wants_it_any_more(patch: Patch) -> None:
    callbacks = load("trl.trainer.callbacks")
    own = callbacks.SyncRefModelCallback
    with patch():
        found = callbacks.SyncRefModelCallback
        with patch(), patch():
            assert callbacks.SyncRefModelCallback is found
        assert callbacks.SyncRefModelCallback is found
    assert callbacks.SyncRefModelCallback is own
    stays = patch()
    with patch():
        pass
    assert callbacks.SyncRefModelCallback is found
    with stays:
        pass
    assert callbacks.SyncRefModelCallback is own


@pytest.mark.usefixtures("old_trl")
def test_what_derives_from_one_derives_from_trls_own(patch: Patch, implementation: Implementation) -> None:
    with patch():
        found = load("trl.trainer.callbacks").SyncRefModelCallback
        teacher = load("trl.teacher").Teacher
        assert not issubclass(teacher, implementation.SyncRefModelCallback)
        assert teacher().of == "teacher"
        assert teacher.blend() == found.blend() == 0.6
        assert issubclass(teacher, found)
        assert isinstance(teacher(), found)
        assert isinstance(implementation.SyncRefModelCallback(None, None), found)
        assert not isinstance(load("trl.trainer.callbacks").OtherCallback(), found)


@pytest.mark.usefixtures("no_trl")
def test_without_trl_what_derives_from_one_derives_from_ours(patch: Patch, implementation: Implementation) -> None:
    with patch():
        bema = load("trl").BEMACallback
        derived = type("Derived", (bema,), {})
    assert issubclass(derived, implementation.BEMACallback)
    assert isinstance(derived(), bema)
    assert isinstance(derived(), derived)
    assert not isinstance(bema(), derived)


class Named(Protocol):
    """Has another metaclass than a callback."""

    name: str


@pytest.mark.usefixtures("old_trl")
def test_what_derives_from_one_is_written_as_it_is_for_trl(patch: Patch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with patch():
        base = load("trl.trainer.callbacks").SyncRefModelCallback

        class ByName(base, Named):  # type: ignore[misc, valid-type]
            def __init__(self, of: str) -> None:
                base.__init__(self, None, of)

        class BySuper(ByName):
            def __init__(self, of: str) -> None:
                super(BySuper, self).__init__(of)  # noqa: UP008

        assert {"of": "x"} == vars(ByName("x")) == vars(BySuper("x"))
    assert caplog.records == []


@pytest.mark.usefixtures("old_trl")
def test_a_class_and_what_is_made_of_it_can_be_pickled(patch: Patch, implementation: Implementation) -> None:
    with patch():
        found = load("trl.trainer.callbacks").SyncRefModelCallback
        assert pickle.loads(pickle.dumps(found)) is found
        stored = pickle.dumps(found(None, None))
    assert type(pickle.loads(stored)) is implementation.SyncRefModelCallback


@pytest.mark.usefixtures("old_trl")
def test_what_is_constructed_in_the_place_of_trls_is_logged_once(
    patch: Patch, implementation: Implementation, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, implementation.name)
    with patch():
        for _ in range(2):
            load("trl.trainer.training").Sync(ref_model=None, accelerator=None)
        implementation.BEMACallback()
    expected = f"SyncRefModelCallback of {implementation} in the place of TRL's"
    assert [record.getMessage() for record in caplog.records] == [expected]


# `truestep run`

SHOW = """\
import sys
print(sys.argv, sys.path, __name__, __file__, __package__, __cached__, type(__loader__), __spec__ and __spec__.name)
print(sys.modules["__main__"].__dict__ is globals(), type(__builtins__), "torch" in sys.modules)
"""

LATE = """\
import atexit, pickle, sys, threading
def function(): pass
def wait_and_pickle():
    threading.main_thread().join()
    print(pickle.dumps(function))
atexit.register(lambda: print(pickle.dumps(function)))
threading.Thread(target=wait_and_pickle).start()
"""

RAISES = """\
def deep():
    raise ValueError(5)
deep()
"""

ENDS = {
    "late": LATE,
    "raises": RAISES,
    "raises_late": LATE + RAISES,
    "caused": "try:\n    [][0]\nexcept IndexError as error:\n    raise OSError from error\n",
    "syntax": "a b\n",
    "interrupt": "raise KeyboardInterrupt\n",
    "status": "raise SystemExit(7)\n",
    "text": "raise SystemExit('no')\n",
    "no_status": "raise SystemExit\n",
    "last": (
        "import atexit, sys\n"
        "atexit.register(lambda: print(repr(sys.last_value), sys.last_value.__traceback__.tb_lineno))\n"
        "raise ValueError(5)\n"
    ),
    "hook": (
        "import sys\n"
        "def hook(kind, error, trace): print(kind, repr(error), trace.tb_lineno, trace is error.__traceback__)\n"
        "sys.excepthook = hook\n"
        "raise ValueError(5)\n"
    ),
}
"""Programs, by how they end."""

FORMS = {
    "file": ["scripts/program.py"],
    "file_here": ["./program.py"],
    "module": ["-m", "scripts.program"],
    "package": ["-m", "scripts"],
    "directory": ["./scripts"],
    "zip": ["scripts.zip"],
}


def write_program(text: str, directory: Path) -> None:
    """Writes a program so that each form finds it."""
    (directory / "scripts").mkdir()
    for file in ("program.py", "scripts/program.py", "scripts/__main__.py"):
        (directory / file).write_text(text)
    with zipfile.ZipFile(directory / "scripts.zip", "w") as archive:
        archive.writestr("__main__.py", text)


def run(*arguments: str, directory: Path) -> tuple[str, str, int]:
    """What a process writes to its two streams, and its exit status."""
    command = [sys.executable, *arguments]
    process = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=60, check=False)
    return process.stdout, process.stderr, process.returncode


@pytest.mark.parametrize("form", FORMS)
def test_a_program_finds_what_it_does_under_python(form: str, tmp_path: Path) -> None:
    write_program(SHOW, tmp_path)
    arguments = [*FORMS[form], "-m", "x", "--help", "--", "1"]
    run(*arguments, directory=tmp_path)  # which leaves bytecode
    expected = run(*arguments, directory=tmp_path)
    assert "'-m', 'x', '--help', '--', '1'] [" in expected[0]
    assert expected == run("-m", "truestep", "run", *arguments, directory=tmp_path)


@pytest.mark.parametrize(
    ("form", "end"), [*(("file", end) for end in ENDS), *((form, "raises_late") for form in FORMS if form != "file")]
)
def test_a_program_ends_as_it_does_under_python(form: str, end: str, tmp_path: Path) -> None:
    write_program(ENDS[end], tmp_path)
    expected = run(*FORMS[form], directory=tmp_path)
    assert expected == run("-m", "truestep", "run", *FORMS[form], directory=tmp_path)


@pytest.mark.parametrize("form", [["-m", "missing"], ["empty"]])
def test_a_module_that_is_not_there_is_missed_as_by_python(form: list[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    expected = run(*form, directory=tmp_path)
    assert expected[2] == 1
    assert expected == run("-m", "truestep", "run", *form, directory=tmp_path)


def test_a_program_that_is_not_there_exits_with_2(tmp_path: Path) -> None:
    _, errors, status = run("-m", "truestep", "run", "missing.py", directory=tmp_path)
    assert status == 2
    assert "truestep run: error: PROGRAM missing.py: no such file; for a module, give -m missing.py" in errors


LOGS = """\
import logging
logging.basicConfig(level=logging.INFO)
from trl.trainer.callbacks import SyncRefModelCallback
SyncRefModelCallback(None, None)
"""


def test_a_program_that_logs_says_once_what_is_in_place(tmp_path: Path, implementation: Implementation) -> None:
    write_old_trl(tmp_path)
    (tmp_path / "logs.py").write_text(LOGS)
    _, errors, _ = run("-m", "truestep", "run", "logs.py", directory=tmp_path)
    assert errors.splitlines() == [f"truestep: SyncRefModelCallback of {implementation} in the place of TRL's"]


SPAWNS = """\
import multiprocessing
import truestep
truestep.patch_trl()

def show():
    from trl.trainer.callbacks import SyncRefModelCallback
    print(issubclass(truestep.SyncRefModelCallback, SyncRefModelCallback), flush=True)

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=show)
    process.start()
    process.join()
"""


def test_a_process_that_is_spawned_has_it_where_the_program_itself_calls_for_it(tmp_path: Path) -> None:
    write_old_trl(tmp_path)
    (tmp_path / "spawns.py").write_text(SPAWNS)
    expected = ("True\n", "", 0)
    assert expected == run("-m", "truestep", "run", "spawns.py", directory=tmp_path)
