"""Which package imports which. An oracle that shares code with its subject repeats its mistakes."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from truestep_spec_tests.meta import specification

MAY_IMPORT = {
    "truestep": {"truestep"},
    "truestep_reference": {"truestep_reference"},
    "truestep_fixtures": {"truestep_fixtures"},
    "truestep_spec_tests": {"truestep_spec_tests", "truestep_reference", "truestep_fixtures"},
}
"""Of the packages of this project, which ones each may import, anywhere in its code."""

CORE = {"torch", "transformers", "accelerate", "safetensors"}
"""What `truestep` depends on without an extra: more may not be imported together with it, or with the reference."""

DRAWING = {f"progress/{part}.py" for part in ("drawing", "notebook", "outlet", "terminal")}
"""Files that draw with rich, and are imported when something is drawn."""

IMPORTED_WHEN_USED = [
    "deepspeed",
    "peft",
    "wandb",
    "weave",
    "comet_ml",
    "trackio",
    "mlflow",
    "tensorboard",
    "rich",
    "pandas",
    "pytest",
    "hypothesis",
    "torch.distributed.checkpoint",
    *sorted(set(MAY_IMPORT) - {"truestep"}),
]
"""What `import truestep` leaves alone, unless `import transformers` has imported it already."""


class Import(NamedTuple):
    """An import statement, or a call that imports a module by a literal name.

    Attributes:
        where: File and line.
        module: The dotted name; for `from a import b` it is `a.b`, which may be more than a module.
        when_loaded: Whether it is executed when its module is imported.
    """

    where: str
    module: str
    when_loaded: bool

    @property
    def file(self) -> str:
        """The file, in its folder."""
        return "/".join(Path(self.where.rpartition(":")[0]).parts[-2:])

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]


def folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def imports(package: str) -> list[Import]:
    files = sorted(folder(package).rglob("*.py"))
    assert files
    return [found for file in files for found in imports_in(file, package)]


def imports_in(file: Path, package: str) -> list[Import]:
    return [
        Import(f"{file}:{node.lineno}", name, when_loaded)
        for node, when_loaded in _walk(ast.parse(file.read_text(encoding="utf-8"), str(file)), True)
        for name in _imported(node, package)
    ]


def _walk(node: ast.AST, when_loaded: bool) -> Iterator[tuple[ast.expr | ast.stmt, bool]]:
    """All statements and expressions, and whether they are executed when their module is imported."""
    for child in ast.iter_child_nodes(node):
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        only_for_types = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
        if isinstance(child, ast.expr | ast.stmt):
            yield child, when_loaded
        yield from _walk(child, when_loaded and not is_function and not only_for_types)


def _imported(node: ast.expr | ast.stmt, package: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        module = package if node.level > 0 else node.module
        return [f"{module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
        return [str(name.value) for name in node.args[:1] if isinstance(name, ast.Constant)]
    return []


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "example.py"
    file.write_text(
        "import a.b, c\n"
        "from d import e\n"
        "from . import f\n"
        "if TYPE_CHECKING:\n"
        "    import g\n"
        "try:\n"
        "    import h\n"
        "except ImportError:\n"
        "    h = None\n"
        "def function():\n"
        "    from i.j import k\n"
        "    importlib.import_module('l.m')\n"
        "class Class:\n"
        "    import n\n"
    )
    expected = {
        **dict.fromkeys(["a.b", "c", "d.e", "package.f", "h", "n"], True),
        **dict.fromkeys(["g", "i.j.k", "l.m"], False),
    }
    assert {found.module: found.when_loaded for found in imports_in(file, "package")} == expected


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_only_what_they_may(package: str) -> None:
    forbidden = set(MAY_IMPORT) - MAY_IMPORT[package]
    assert [found for found in imports(package) if found.package in forbidden] == []


@pytest.mark.parametrize("package", ["truestep", "truestep_reference"])
def test_the_implementations_load_with_the_core_dependencies_alone(package: str) -> None:
    allowed = CORE | {package} | set(sys.stdlib_module_names)
    further = [found for found in imports(package) if found.when_loaded and found.package not in allowed]
    assert [found for found in further if found.package != "rich" or found.file not in DRAWING] == []


def test_fixtures_know_no_callback() -> None:
    callbacks = [callback for callback, _ in specification.statuses().values()]
    assert callbacks
    for file in folder("truestep_fixtures").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert re.findall("|".join(callbacks), text) == [], file


def test_importing_truestep_leaves_heavy_packages_alone() -> None:
    script = (
        "import json, sys\n"
        "import transformers\n"
        "transformers.TrainerCallback\n"
        "before = set(sys.modules)\n"
        "import truestep\n"
        "from truestep import *\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))\n"
    )
    run = subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.PIPE, text=True)
    added = json.loads(run.stdout.splitlines()[-1])
    assert {"truestep.bema", "truestep.log_completions", "truestep.ref_sync", "truestep.rich_progress"} <= set(added)
    heavy = [name for name in IMPORTED_WHEN_USED if any(f"{module}.".startswith(f"{name}.") for module in added)]
    assert heavy == []
