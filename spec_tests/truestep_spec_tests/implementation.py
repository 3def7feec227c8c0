"""The implementation under test: an argument of the suite, never a patch."""

import importlib.util
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from types import ModuleType
from typing import Any

CALLBACKS = {
    "BEMACallback": "bema",
    "SyncRefModelCallback": "ref_sync",
    "LogCompletionsCallback": "log_completions",
    "WeaveCallback": "weave_eval",
    "RichProgressCallback": "rich_progress",
}
"""The callbacks that the suite tests: their documented names, and how files that are about them are called."""


@dataclass(frozen=True)
class Implementation:
    """Where the callbacks under test are imported from. Picklable, so that ranks import them for themselves.

    Args:
        name: A package or module that has the callbacks under their documented names (`truestep`, `trl`,
            `mypackage.callbacks`), or the path of one class (`mypackage.callbacks.BEMACallback`), which may have
            another name if it says which callback it is (`BEMACallback=mypackage.averaging.FastBEMA`).

    Raises:
        ValueError: Nothing can be imported by that name, or it has none of the callbacks.

    Example:
        >>> Implementation("truestep_reference").BEMACallback.__module__
        'truestep_reference.bema'
        >>> Implementation("json")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: implementation='json': it has none of BEMACallback, SyncRefModelCallback, ...
    """

    name: str

    def __post_init__(self) -> None:
        if not self.offered:
            message = f"implementation={self.name!r}: it has none of {', '.join(CALLBACKS)}"
            raise ValueError(f"{message}; of a class with another name say which one it is: BEMACallback={self._path}")

    @property
    def BEMACallback(self) -> type[Any]:  # noqa: N802 - the documented name of the class
        """The class under test."""
        return self.callback("BEMACallback")

    @property
    def SyncRefModelCallback(self) -> type[Any]:  # noqa: N802 - the documented name of the class
        """The class under test."""
        return self.callback("SyncRefModelCallback")

    @property
    def LogCompletionsCallback(self) -> type[Any]:  # noqa: N802 - the documented name of the class
        """The class under test."""
        return self.callback("LogCompletionsCallback")

    @property
    def WeaveCallback(self) -> type[Any]:  # noqa: N802 - the documented name of the class
        """The class under test."""
        return self.callback("WeaveCallback")

    @property
    def RichProgressCallback(self) -> type[Any]:  # noqa: N802 - the documented name of the class
        """The class under test."""
        return self.callback("RichProgressCallback")

    def callback(self, callback: str) -> type[Any]:
        """The class under test of a documented name.

        Raises:
            ValueError: The implementation has none.
        """
        found = self._find(callback)
        if found is None:
            raise ValueError(f"implementation={self.name!r}: it has no {callback}")
        return found

    @property
    def offered(self) -> list[str]:
        """Names of the callbacks that it has."""
        return [callback for callback in CALLBACKS if self._find(callback) is not None]

    @property
    def version(self) -> str:
        """Version of the distribution that it is installed from, or else where it lies."""
        package = self._path.partition(".")[0]
        distributions = packages_distributions().get(package, [package])
        try:
            return version(distributions[0])
        except PackageNotFoundError:
            module = importlib.import_module(package)
            return str(getattr(module, "__version__", f"from {module.__file__}"))

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    @property
    def _path(self) -> str:
        return self.name.rpartition("=")[2]

    def _find(self, callback: str) -> type[Any] | None:
        module, attribute = _resolve(self.name, self._path)
        named = callback if attribute is None else self.name.rpartition("=")[0] or attribute
        try:
            return getattr(module, attribute or callback, None) if named == callback else None
        except ImportError:  # of a module that imports when asked for a name
            return None


def _resolve(argument: str, path: str) -> tuple[ModuleType, str | None]:
    """The module that `path` leads to, and the class in it where the last part is not a module."""
    if not all(part.isidentifier() for part in path.split(".")):
        raise ValueError(f"implementation={argument!r}: {path!r} is not the path of a package or class")
    parent, _, attribute = path.rpartition(".")
    if parent:
        module = _imported(argument, parent)
        if not hasattr(module, "__path__") or importlib.util.find_spec(path) is None:
            return module, attribute
    return _imported(argument, path), None


def _imported(argument: str, path: str) -> ModuleType:
    try:
        return importlib.import_module(path)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"implementation={argument!r}: cannot be imported ({reason})") from error
