"""`Shelf`: the versions of all models in memory, which of them answer, and of which the counters are kept."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from service.served import Served

MOST_LOADED = 3
"""Versions of one model in memory: what it is, what it was, and what it may become."""
_MOST_COUNTED = 2
"""Versions of one model whose counters stay though others took their place, so that a last scrape finds them."""


@dataclass(frozen=True)
class Told:
    """Who hears of every version that comes into force, and of every one (model and version) that is gone for good."""

    in_force: Callable[[Served], None]
    gone: Callable[[str, str], None]


class _Counted(NamedTuple):
    version: str
    base: str


class Shelf:
    """Changed by one thread at a time, and looked at by any number."""

    def __init__(self, told: Told) -> None:
        self._told = told
        self._active: dict[str, Served] = {}
        self._loaded: dict[str, list[Served]] = {}
        self._counted: dict[str, list[_Counted]] = {}

    def active(self, name: str) -> Served | None:
        """What a model answers by."""
        return self._active.get(name)

    def names(self) -> list[str]:
        """All models that answer."""
        return sorted(self._active)

    def loaded(self, name: str) -> list[Served]:
        """Versions of a model in memory, the active one among them."""
        return list(self._loaded.get(name, ()))

    def idle(self, name: str) -> list[Served]:
        """Those that it does not answer by."""
        now = self._active.get(name)
        return [one for one in self.loaded(name) if now is None or one.base != now.base]

    def put(self, served: Served) -> Served:
        """Make it what its name stands for."""
        before = self._active.get(served.name)
        self._active[served.name] = served
        counted = [one for one in self._counted.get(served.name, ()) if one.version != served.version]
        self._counted[served.name] = [*counted, _Counted(served.version, served.base)]
        self.remember(served)
        if before is not served:
            self._told.in_force(served)
        return served

    def remember(self, served: Served) -> None:
        """Keep it in memory, and what is active, and what was last beside them."""
        others = [one for one in self.loaded(served.name) if one.base != served.base]
        others.sort(key=lambda one: one is self._active.get(served.name))
        self._keep(served.name, [*others, served][-MOST_LOADED:])

    def drop(self, name: str, gone: list[Served]) -> None:
        """Forget idle versions of a model, and their counters."""
        bases = {one.base for one in gone}
        self._uncount(name, [one for one in self._counted.get(name, ()) if one.base in bases])
        self._keep(name, [one for one in self.loaded(name) if one.base not in bases])

    def end(self, name: str) -> None:
        """Forget a model."""
        self._active.pop(name, None)
        self._uncount(name, self._counted.get(name, []))
        self._keep(name, [])

    def _keep(self, name: str, loaded: list[Served]) -> None:
        self._loaded[name] = loaded
        counted = self._counted.get(name, [])
        stay = {one.version for one in loaded} | {one.version for one in counted[-_MOST_COUNTED:]}
        self._uncount(name, [one for one in counted if one.version not in stay])
        for by_name in (self._loaded, self._counted):
            if not by_name.get(name):
                by_name.pop(name, None)

    def _uncount(self, name: str, gone: list[_Counted]) -> None:
        versions = {one.version for one in gone}
        self._counted[name] = [one for one in self._counted.get(name, ()) if one.version not in versions]
        for version in versions:
            self._told.gone(name, version)
