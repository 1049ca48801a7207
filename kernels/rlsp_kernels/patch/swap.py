"""Puts functions in the place of others, wherever those were imported to, and takes them out again.

`from x import f` copies: whoever imported f before goes on calling it. So every module that is loaded is searched for the
object itself, under whatever name. Later imports read the module that defines it, and get the replacement by themselves.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any


@dataclass(frozen=True)
class Swap:
    """One function to replace."""

    home: str
    """Module that defines it."""
    name: str
    """Its name there: "function", or "Class.method", which then holds for the instances that exist too."""
    parameters: tuple[str, ...]
    """Names of the parameters that the replacement was written for."""
    build: Callable[[Any], Any]
    """Makes the replacement of the original: what it does not cover, it hands to that one."""
    signature: str = ""
    """Where to read the parameters, when not off the function itself: a name in home."""
    registries: tuple[str, ...] = ()
    """Dictionaries in home that hold the function too."""


@dataclass(frozen=True)
class Replaced:
    """One function that was replaced."""

    name: str
    """Dotted, where it is defined."""
    places: tuple[str, ...]
    """Every name that pointed at it and now points at the replacement."""


@dataclass(frozen=True)
class Patch:
    """What apply() did."""

    package: str
    version: str
    replaced: tuple[Replaced, ...]

    def __str__(self) -> str:
        lines = [f"{self.package} {self.version}: {len(self.replaced)} functions replaced"]
        return "\n".join([*lines, *(f"  {one.name} ({len(one.places)} places)" for one in self.replaced)])


@dataclass(frozen=True)
class _Pair:
    """A swap with its two objects."""

    swap: Swap
    owner: Any  # the module, or the class of a method
    original: Any
    replacement: Any


_applied: dict[str, list[_Pair]] = {}


def apply(package: str, tested: Sequence[str], any_version: bool, swaps_of: Callable[[str], Sequence[Swap]]) -> Patch:
    """Replaces what swaps_of(version) names, all of it or nothing.

    Raises:
        ImportError: when the package, or a module of it that is to be changed, cannot be imported.
        RuntimeError: when it is patched already, when this version was not tested and any_version is False, or when a function
            is not there or takes other parameters. Nothing has been changed then.
    """
    if package in _applied:
        raise RuntimeError(f"{package} is patched already: call rlsp_kernels.patch.{package}.revert() first")
    try:
        found = version(package)
    except PackageNotFoundError as error:
        raise ImportError(f"{package} is not installed: pip install '{package}=={tested[-1]}'") from error
    if found not in tested and not any_version:
        raise RuntimeError(
            f"{package} {found} was not tested, {', '.join(tested)} were: install one of those, or pass any_version=True"
        )
    pairs = [_prepare(package, found, swap) for swap in swaps_of(found)]
    with ExitStack() as undo:
        undo.callback(_exchange, pairs, back=True)
        replaced = _exchange(pairs)
        undo.pop_all()
    _applied[package] = pairs
    return Patch(package, found, replaced)


def revert(package: str) -> None:
    """Puts every original back, in modules that were imported since too.

    Raises:
        RuntimeError: when it is not patched.
    """
    if package not in _applied:
        raise RuntimeError(f"{package} is not patched: call rlsp_kernels.patch.{package}.apply() first")
    _exchange(_applied.pop(package), back=True)


def _prepare(package: str, found: str, swap: Swap) -> _Pair:
    """Finds the function and builds its replacement; changes nothing."""
    module = importlib.import_module(swap.home)
    *outer, name = swap.name.split(".")
    owner = _find(package, found, swap.home, module, outer)
    original = _find(package, found, swap.home, owner, [name])
    for registry in swap.registries:
        _find(package, found, swap.home, module, [registry])
    described = _find(package, found, swap.home, module, (swap.signature or swap.name).split("."))
    parameters = tuple(inspect.signature(described).parameters)
    if parameters != swap.parameters:
        raise RuntimeError(
            f"{swap.home}.{swap.name} of {package} {found} takes {parameters}, the replacement {swap.parameters}: "
            f"nothing was replaced; it needs another version of {package}"
        )
    return _Pair(swap, owner, original, swap.build(original))


def _find(package: str, found: str, home: str, start: Any, names: Sequence[str]) -> Any:
    for name in names:
        if not hasattr(start, name):
            raise RuntimeError(f"{package} {found} has no {home}.{name}: nothing was replaced; it needs another version")
        start = getattr(start, name)
    return start


def _exchange(pairs: Sequence[_Pair], back: bool = False) -> tuple[Replaced, ...]:
    """Puts replacements where the originals are, or the other way round."""
    done = []
    for pair in pairs:
        old, new = (pair.replacement, pair.original) if back else (pair.original, pair.replacement)
        places = []
        for label, names, key in list(_places(pair, old)):
            if isinstance(names, dict):
                names[key] = new
            else:
                setattr(names, key, new)
            places.append(label)
        done.append(Replaced(f"{pair.swap.home}.{pair.swap.name}", tuple(places)))
    return tuple(done)


def _places(pair: _Pair, wanted: Any) -> Iterator[tuple[str, Any, str]]:
    """(label, namespace, key) of everything that is `wanted`: in its class, its registries and every loaded module."""
    home, name = pair.swap.home, pair.swap.name
    if inspect.isclass(pair.owner):
        key = name.rsplit(".", 1)[-1]
        if vars(pair.owner).get(key) is wanted:
            yield f"{home}.{name}", pair.owner, key
    for registry in pair.swap.registries:
        entries = vars(sys.modules[home])[registry]
        yield from ((f"{home}.{registry}[{key!r}]", entries, key) for key, value in entries.items() if value is wanted)
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("rlsp_kernels.") or not inspect.ismodule(module):
            continue  # a replacement that is a function of ours stays what it is
        names = vars(module)  # not getattr: a lazy module would import all it has
        yield from ((f"{module_name}.{key}", names, key) for key, value in names.items() if value is wanted)
