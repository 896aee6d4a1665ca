"""One class for all modules that are parametrised alike.

torch gives every parametrised module a class of its own. `torch.compile` guards on classes, so identical blocks would each
be compiled again; with one class per (original class, parametrised tensors) they compile once.
"""

from __future__ import annotations

from weakref import WeakValueDictionary

from torch import nn

from rosa_fx.weight import RosaWeight

_shared: WeakValueDictionary[tuple[type, tuple[str, ...]], type] = WeakValueDictionary()


def share_class(module: nn.Module) -> None:
    """Give `module` the class of those parametrised like it; one with parametrisations of another maker keeps its own."""
    lists = module.parametrizations
    assert isinstance(lists, nn.ModuleDict)
    if all(len(entry) == 1 and isinstance(entry[0], RosaWeight) for entry in lists.values()):  # type: ignore[arg-type, index]
        cls = type(module)
        module.__class__ = _shared.setdefault((cls.__bases__[0], tuple(lists)), cls)


def own_class(module: nn.Module) -> None:
    """Give `module` a class of its own again, which torch may take properties from without touching its siblings."""
    cls = type(module)
    members = {name: member for name, member in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(cls.__name__, cls.__bases__, members)
