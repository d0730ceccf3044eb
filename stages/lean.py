"""Import libraries without their parts that scoring never uses, and that are a quarter of what a cell otherwise waits for before its model is loaded.

Something else stands in for such a part, and gives way to it where it is used after all. Where there is a GPU, all is imported: a second counts for less there, and other packages are imported too.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

COMPILER = "torch._dynamo"
MASKS = f"{COMPILER}._trace_wrapped_higher_order_op"
MATCHING = "scipy.optimize"


class StandIn(ModuleType):
    """In a module's place: has these names, and loads the module for all others."""

    # a package, so that Parts is asked for its parts
    __path__ = ()

    def __init__(self, module: str, names: dict[str, Callable]) -> None:
        super().__init__(module)
        self.names = names

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.names[name] if name in self.names else getattr(real(self.__name__), name)


class Parts(MetaPathFinder, Loader):
    """Finds the parts of a module in whose place something stands: it is loaded, whole."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if isinstance(sys.modules.get(name.rpartition(".")[0]), StandIn) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = real(spec.name)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


def real(name: str) -> ModuleType:
    """The module, in whose place nothing stands from now on."""
    remove()
    return importlib.import_module(name)


def remove() -> None:
    for name in [name for name, module in sys.modules.items() if isinstance(module, StandIn)]:
        del sys.modules[name]


def later(module: str, name: str) -> StandIn:
    """Its function loads the module when it is called."""
    return StandIn(module, {name: lambda *given, **named: getattr(real(module), name)(*given, **named)})


def unchanged(function: Callable | None = None, *_: Any, **__: Any) -> Callable:
    """A decorator, with or without arguments, that leaves a function as it is."""
    return unchanged if function is None else function


@contextmanager
def imports() -> Iterator[None]:
    """Import here what imports transformers: as where torch has no distributed part, without its compiler, and without what finds objects in pictures.

    Does nothing where transformers has been imported before.
    """
    if "transformers" in sys.modules or torch.cuda.is_available():
        yield
        return
    with without_compiler(later(MATCHING, "linear_sum_assignment")), patch.object(torch.distributed, "is_available", lambda: False):
        yield


@contextmanager
def without_compiler(*more: StandIn) -> Iterator[None]:
    """Torch loads its compiler to tell it of functions that it is not to touch, such as those that make a model's weights before they are read: nothing is compiled here, so it is not told."""
    if COMPILER in sys.modules or torch.cuda.is_available():
        yield
        return
    told = StandIn(COMPILER, dict.fromkeys(("allow_in_graph", "assume_constant_result", "disable"), unchanged))
    sys.modules |= {module.__name__: module for module in (told, later(MASKS, "TransformGetItemToIndex"), *more) if module.__name__ not in sys.modules}
    sys.meta_path.insert(0, parts := Parts())
    try:
        yield
    finally:
        sys.meta_path.remove(parts)
        remove()
