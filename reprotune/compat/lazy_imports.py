"""Skip imports that scoring never uses: torch's compiler, its distributed part and scipy.optimize.

They take a quarter of the time before a cell's model is loaded; a placeholder stands for each and loads it
when it is used after all.
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
ASSIGNMENT = "scipy.optimize"


class Placeholder(ModuleType):
    """Stands for a module: has a few of its names, and loads the module for all others."""

    def __init__(self, module: str, names: dict[str, Callable]) -> None:
        super().__init__(module)
        # a package, so that SubmoduleFinder is asked for its submodules
        self.__path__ = []
        self.names = names

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.names[name] if name in self.names else getattr(load(self.__name__), name)


class SubmoduleFinder(MetaPathFinder, Loader):
    """Imports the submodules of a module that has a placeholder, after loading the module itself."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        parent = sys.modules.get(name.rpartition(".")[0])
        return ModuleSpec(name, self) if isinstance(parent, Placeholder) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = load(spec.name)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


def load(name: str) -> ModuleType:
    """Import a module, and end all placeholders."""
    remove_placeholders()
    return importlib.import_module(name)


def remove_placeholders() -> None:
    for name in [name for name, module in sys.modules.items() if isinstance(module, Placeholder)]:
        del sys.modules[name]


def deferred(module: str, name: str) -> Placeholder:
    """A placeholder with one function, which loads the module when it is called."""
    return Placeholder(module, {name: lambda *args, **kwargs: getattr(load(module), name)(*args, **kwargs)})


def undecorated(function: Callable | None = None, *_: Any, **__: Any) -> Callable:
    """A decorator, with or without arguments, that returns the function itself."""
    return undecorated if function is None else function


@contextmanager
def for_scoring() -> Iterator[None]:
    """Skip these imports inside a `with` block that imports transformers.

    transformers imports the compiler for its masks, torch.distributed where it is available, and
    scipy.optimize for object detection. bitsandbytes wraps four functions in torch.compile, none of them a
    kernel of NF4, which takes another three seconds. On a GPU everything is imported: a second counts for
    less there. Does nothing if transformers is already imported. Seen with torch 2.13.0, transformers 5.23.0
    and bitsandbytes 0.50.2.
    """
    if "transformers" in sys.modules or torch.cuda.is_available():
        yield
        return
    with (
        without_compiler(deferred(ASSIGNMENT, "linear_sum_assignment")),
        patch.object(torch.distributed, "is_available", lambda: False),
        patch.object(torch, "compile", undecorated),
    ):
        yield


@contextmanager
def without_compiler(*others: Placeholder) -> Iterator[None]:
    """Skip the import of torch's compiler inside a `with` block, for instance one that loads a model.

    torch imports it only to exempt functions from compilation
    (https://github.com/pytorch/pytorch/pull/162595), and nothing is compiled here. Seen with torch 2.13.0.

    Args:
        others: placeholders for further modules.
    """
    if COMPILER in sys.modules or torch.cuda.is_available():
        yield
        return
    exemptions = dict.fromkeys(("allow_in_graph", "assume_constant_result", "disable"), undecorated)
    placeholders = Placeholder(COMPILER, exemptions), deferred(MASKS, "TransformGetItemToIndex"), *others
    sys.modules |= {module.__name__: module for module in placeholders if module.__name__ not in sys.modules}
    sys.meta_path.insert(0, finder := SubmoduleFinder())
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        remove_placeholders()
