"""The callbacks of this package in the place of TRL's, for programs that import them from there."""

import logging
import sys
import types
from abc import ABCMeta
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import cache, wraps
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.metadata import version
from typing import Any

logger = logging.getLogger(__name__)

NAMES = ("BEMACallback", "LogCompletionsCallback", "RichProgressCallback", "SyncRefModelCallback", "WeaveCallback")
"""What TRL and this package both have."""

SOURCE = "trl.trainer.callbacks"
"""The module that all of TRL takes them from."""

STAND_INS = ("trl", "trl.trainer", SOURCE)
"""The modules that have them where TRL is not found."""


def patch_trl() -> AbstractContextManager[object]:
    """Put the callbacks of this package in the place of TRL's.

    Whatever takes one of the five from TRL then gets the one of this package: `from trl import BEMACallback`, and TRL's
    trainers with `sync_ref_model=True`. It imports neither TRL nor torch. Modules of TRL that are loaded are changed,
    and those that are loaded later; not your own, so call it before they import from TRL. A process that the program
    starts has TRL's own unless it is forked or calls this itself.

    A class that derives from one of the five, in TRL or elsewhere, still derives from TRL's own, whose methods it may
    override, and calls them as ever: by `super().__init__(…)` or `BEMACallback.__init__(self, …)`. Only
    `super(BEMACallback, self)` begins with TRL's own there instead of behind it.

    Where TRL is not found when it is first imported, `trl` is a module that has the five. `find_spec("trl")` finds it.

    Returns:
        A context manager that undoes it at its end. Without `with` it stays.

    Example:
        >>> with patch_trl():
        ...     from trl import BEMACallback
        >>> import truestep
        >>> type(BEMACallback()) is truestep.BEMACallback
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
        self._first, self._last = _Finder(), _StandIn()

    def on(self) -> None:
        if self._users == 0:
            sys.meta_path.insert(0, self._first)
            sys.meta_path.append(self._last)
            if SOURCE in sys.modules:
                _to_ours(sys.modules[SOURCE])
        self._users += 1

    def off(self) -> None:
        self._users -= 1
        if self._users == 0:
            sys.meta_path.remove(self._first)
            sys.meta_path.remove(self._last)
            self._last.forget()
            _exchange({ours: own for own, ours in _in_place.items()})


# What is in place


@cache
def _substitute(name: str, own: type[Any] | None = None) -> type:
    """What is in the place of a class of TRL: called, it makes one of ours; derived from, it is TRL's own."""
    ours: type[Any] = getattr(import_module("truestep"), name)
    base = own or ours

    @cache
    def announce() -> None:
        logger.info("%s of truestep %s in the place of TRL's", name, version("truestep"))

    @wraps(ours.__init__)
    def construct(cls: type, *args: Any, **kwargs: Any) -> Any:
        if cls is not substitute:
            return super(substitute, cls).__new__(cls)
        made = ours(*args, **kwargs)
        announce()
        return made

    def is_base(cls: type, subclass: type) -> Any:
        return True if cls is substitute and issubclass(subclass, (ours, base)) else NotImplemented

    substitute: type[Any] = ABCMeta(
        name,
        (base,),
        {
            "__new__": construct,
            "__subclasshook__": classmethod(is_base),
            "__module__": SOURCE,  # where pickle finds it
            "__doc__": ours.__doc__,
        },
    )
    return substitute


# Where TRL is found


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


_in_place: dict[type, type] = {}
"""Substitutes, by TRL's own."""


def _to_ours(source: types.ModuleType) -> None:
    own = {name: vars(source)[name] for name in NAMES if name in vars(source)}
    _in_place.update({value: _substitute(name, value) for name, value in own.items()})
    _exchange(_in_place)


def _exchange(others: Mapping[type, type]) -> None:
    """Exchanges classes in all modules of TRL that are loaded, by whatever name they are there."""
    for module_name, module in list(sys.modules.items()):
        if f"{module_name}.".startswith("trl.") and isinstance(module, types.ModuleType):
            for name, value in list(vars(module).items()):
                if isinstance(value, type) and value in others:
                    setattr(module, name, others[value])


# Where it is not


class _StandIn(MetaPathFinder, Loader):
    """Finds modules that have the five by TRL's names; as the last finder, only those that no other does."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        if path or fullname not in STAND_INS:  # the path is empty within a stand-in
            return None
        return ModuleSpec(fullname, self, origin=__file__, is_package=True)

    def exec_module(self, module: types.ModuleType) -> None:
        vars(module).update(
            __all__=list(NAMES),
            __doc__="The callbacks of truestep by TRL's name. TRL itself is not installed.",
            __file__=__file__,  # which a failed import shows
            __getattr__=_found_in_stand_in,
        )

    def forget(self) -> None:
        for name in STAND_INS:
            if getattr(sys.modules.get(name), "__loader__", None) is self:
                del sys.modules[name]


def _found_in_stand_in(name: str) -> type:
    if name not in NAMES:
        raise AttributeError(
            f"no attribute {name!r}: TRL was not found when it was imported; truestep stands in for {', '.join(NAMES)}"
        )
    return _substitute(name)


_switch = _Switch()
