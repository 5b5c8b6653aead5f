"""What a command saves while it loads: garbage collection, a third of the time that torch and transformers take and a second at
the exit; and libraries that others import wherever they are installed, each of a fifth of a second to half of one.
"""

from __future__ import annotations

import gc
import importlib.util
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_own_process = False


def take_process() -> None:
    """The process runs one command and nothing else: how it collects garbage, and what it loads late, is ours to say."""
    global _own_process
    _own_process = True
    defer("bitsandbytes")  # peft imports it, and full training has no use for it


@contextmanager
def importing() -> Iterator[None]:
    """Around imports: modules live as long as the process, and looking through them for garbage, again and again, finds none.

    Behind the block garbage is collected as before, but not in what is there by then (``gc.freeze``). Does nothing in a process
    that is not ours: a notebook, a test, a user's own script.
    """
    if not _own_process or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class _Deferred(ModuleType):
    """A module whose code runs when a name of it is first asked for.

    Unlike ``importlib.util.LazyLoader``'s, which is loaded by those who ask whether it is installed (``find_spec``) as well.
    """

    _lock = threading.RLock()

    def __getattr__(self, name: str) -> Any:
        with self._lock:
            if not self.__dict__.get("_begun"):
                self._begun = True  # its own code asks for names that are not there yet
                spec = self.__spec__
                assert spec is not None and spec.loader is not None
                self.__path__ = spec.submodule_search_locations or []
                try:
                    spec.loader.exec_module(self)
                except BaseException:
                    del self._begun, self.__path__  # who holds it finds the cause again
                    sys.modules.pop(spec.name, None)  # as after an import that fails
                    raise
                self.__class__ = ModuleType  # type: ignore[assignment]
        return ModuleType.__getattribute__(self, name)


class _Submodules(MetaPathFinder):
    """``import package.part`` loads a deferred package when it asks for its path, and then looks for the part, which the package
    has loaded by then: a second time, if nobody told it."""

    def __init__(self, package: str) -> None:
        self.prefix = f"{package}."

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        loaded = sys.modules.get(name)
        if target is not None or loaded is None or not name.startswith(self.prefix):
            return None
        return ModuleSpec(name, _Found(loaded))


class _Found(Loader):
    """Of a module that is loaded: there is nothing to do."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


def defer(name: str) -> None:
    """Let ``import name`` load the package at its first use; nothing where it is not installed, or is loaded."""
    spec = None if name in sys.modules else importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        return
    module = _Deferred(name)
    module.__spec__, module.__loader__, module.__file__ = spec, spec.loader, spec.origin
    module.__package__ = spec.parent
    sys.modules[name] = module
    sys.meta_path.insert(0, _Submodules(name))


def spare_deepspeed() -> None:
    """accelerate imports DeepSpeed to see that a model is not DeepSpeed's: where nobody has imported it, none is."""
    if not _own_process:
        return
    from accelerate.utils import other

    installed = other.is_deepspeed_available
    other.is_deepspeed_available = lambda: "deepspeed" in sys.modules and installed()
