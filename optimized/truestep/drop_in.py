"""The callbacks of this package in the place of TRL's, for programs that import them from there."""

import logging
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import cache, wraps
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

logger = logging.getLogger(__name__)

NAMES = ("BEMACallback", "LogCompletionsCallback", "RichProgressCallback", "SyncRefModelCallback", "WeaveCallback")
"""What TRL and this package both have."""

SOURCE = "trl.trainer.callbacks"
"""The module that all of TRL takes them from."""


def patch_trl() -> AbstractContextManager[object]:
    """Put the callbacks of this package in the place of TRL's.

    Whatever takes one of the five from TRL then gets the one of this package: `from trl import BEMACallback`, and TRL's
    trainers with `sync_ref_model=True`. It imports neither TRL nor torch. Modules of TRL that are loaded are changed,
    and those that are loaded later; not your own, so call it before they import from TRL.

    A class that derives from one of the five, in TRL or elsewhere, still derives from TRL's own, whose methods it may
    override. Where TRL is not installed, `trl` is a module that has the five.

    Returns:
        A context manager that undoes it at its end. Without `with` it stays.

    Example:
        >>> with patch_trl():
        ...     from trl import BEMACallback
        >>> import truestep
        >>> isinstance(BEMACallback(), truestep.BEMACallback)
        True
    """
    _switch.on()
    use = ExitStack()
    use.callback(_switch.off)
    return use


class _Switch:
    """Has them in place for as long as anybody uses them."""

    def __init__(self) -> None:
        self._users = 0
        self._undo: Callable[[], None]

    def on(self) -> None:
        if self._users == 0:
            self._undo = _stand_in() if find_spec("trl") is None else _replace()
        self._users += 1

    def off(self) -> None:
        self._users -= 1
        if self._users == 0:
            self._undo()


_switch = _Switch()


# What is in place


class _Substitute(type):
    """The type of the classes that are in the place of TRL's: each is one of this package, seen as TRL's own."""

    _own: type[Any]

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any) -> Any:
        """Derives from TRL's own class where a substitute is to be derived from."""
        own = tuple(base._own if isinstance(base, _Substitute) else base for base in bases)
        if own == bases:
            return super().__new__(cls, name, bases, namespace, **options)
        return types.new_class(name, own, options, lambda body: body.update(namespace))

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, (cls._own, *cls.__bases__))

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, (cls._own, *cls.__bases__))

    def __getattr__(cls, name: str) -> Any:
        """TRL's own classes call static methods by their public name, which is the substitute's now."""
        return getattr(cls._own, name)


@cache
def _substitute(name: str, own: type[Any] | None = None) -> _Substitute:
    ours: type[Any] = getattr(import_module("truestep"), name)

    @wraps(ours.__init__)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        ours.__init__(self, *args, **kwargs)
        _announce(name)

    made: _Substitute = _Substitute(name, (ours,), {"__init__": construct, "__module__": __name__, "_own": own or ours})
    return made


@cache
def _announce(name: str) -> None:
    logger.info("%s of truestep %s in the place of TRL's", name, version("truestep"))


# Where TRL is installed


class _Finder(MetaPathFinder):
    """Has the module that TRL takes its callbacks from loaded by a loader of ours."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path) if fullname == SOURCE else None
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(fullname, spec.origin)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: types.ModuleType) -> None:
        super().exec_module(module)
        _to_ours(module)


def _replace() -> Callable[[], None]:
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    if SOURCE in sys.modules:
        _to_ours(sys.modules[SOURCE])

    def undo() -> None:
        sys.meta_path.remove(finder)
        if SOURCE in sys.modules:
            classes = vars(sys.modules[SOURCE]).values()
            _exchange({ours: ours._own for ours in classes if isinstance(ours, _Substitute)})

    return undo


def _to_ours(source: types.ModuleType) -> None:
    own = {name: vars(source)[name] for name in NAMES if name in vars(source)}
    _exchange({value: _substitute(name, value) for name, value in own.items()})


def _exchange(others: Mapping[type, type]) -> None:
    """Exchanges classes in all modules of TRL that are loaded, by whatever name they are there."""
    for module_name, module in list(sys.modules.items()):
        if f"{module_name}.".startswith("trl.") and isinstance(module, types.ModuleType):
            for name, value in list(vars(module).items()):
                if isinstance(value, type) and value in others:
                    setattr(module, name, others[value])


# Where it is not


def _stand_in() -> Callable[[], None]:
    module = types.ModuleType("trl", "The callbacks of truestep by TRL's name. TRL itself is not installed.")
    vars(module).update(
        __all__=list(NAMES),
        __file__=__file__,  # which a failed import shows
        __getattr__=_found_in_stand_in,
        __spec__=ModuleSpec("trl", None, origin=__file__),
    )
    before = {name: sys.modules[name] for name in ("trl",) if name in sys.modules}  # None hides a package
    sys.modules["trl"] = module

    def undo() -> None:
        del sys.modules["trl"]
        sys.modules.update(before)

    return undo


def _found_in_stand_in(name: str) -> _Substitute:
    if name not in NAMES:
        raise AttributeError(
            f"module 'trl' has no attribute {name!r}: TRL is not installed; truestep stands in for {', '.join(NAMES)}"
        )
    return _substitute(name)
