"""One class for all modules that are parametrised alike, and one that can be copied and pickled.

torch gives every parametrised module a class of its own. `torch.compile` guards on classes, so identical blocks would each
be compiled again; with one class per (original class, parametrised tensors) they compile once. torch's classes also refuse
pickling, because a class made at run time has no name to be found by: these are made again from the original class.
"""

from __future__ import annotations

import copyreg
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn
from torch.nn.utils import parametrize

from rosa_fx.packed import members_for
from rosa_fx.weight import RosaWeight

_shared: WeakValueDictionary[tuple[type, tuple[str, ...]], type] = WeakValueDictionary()


def share_class(module: nn.Module) -> None:
    """Give `module` the class of those parametrised like it; one with parametrisations of another maker keeps its own."""
    lists = module.parametrizations
    assert isinstance(lists, nn.ModuleDict)
    if all(len(entry) == 1 and isinstance(entry[0], RosaWeight) for entry in lists.values()):  # type: ignore[arg-type, index]
        cls = type(module)
        key = cls.__bases__[0], tuple(lists)
        module.__class__ = _shared.get(key) or _shared.setdefault(key, _completed(cls, *key))


def own_class(module: nn.Module) -> None:
    """Give `module` a class of its own again, which torch may take properties from without touching its siblings."""
    cls = type(module)
    members = {name: member for name, member in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(cls.__name__, cls.__bases__, members)


def _completed(cls: Any, original: Any, names: tuple[str, ...]) -> type[nn.Module]:
    """`cls`, torch's class of a parametrised module, with what is needed to copy, to pickle and to multiply with `weight`."""
    plain = all(getattr(original, name) is getattr(object, name) for name in ("__new__", "__reduce__", "__reduce_ex__"))
    if plain:  # else the class makes or copies its instances in a way of its own, which is left as it is

        def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
            state = original.__getstate__(self)
            if tuple(self.parametrizations) != names:  # type: ignore[arg-type]
                # Others were added since: it can be copied, but not pickled, as torch has it.
                return copyreg.__newobj__, (type(self),), state  # type: ignore[attr-defined]
            return _empty_module, (original, names), state

        cls.__reduce_ex__ = reduce
        # torch's raises, and torch's __deepcopy__ would keep a compiled `forward` that is bound to the first module.
        for name in {"__getstate__", "__deepcopy__"} & vars(cls).keys():
            delattr(cls, name)

    def delete(self: Any, name: str) -> None:
        # torch takes a tensor away just before it puts a property in its place, on the class: not on that of the siblings.
        if name in self._parameters or name in self._buffers:
            own_class(self)
        original.__delattr__(self, name)

    def represent(self: Any) -> str:
        if len(self._modules) > 1:
            text: str = original.__repr__(self)
            return text
        weights = [f"{name}: {entry[0].extra_repr()}" for name, entry in self.parametrizations.items()]
        return f"{self._get_name()}({'; '.join([self.extra_repr(), *weights])})"

    # In one line: `vmap` asks for it, and Dynamo does not follow how torch indents a longer one.
    cls.__repr__ = represent
    cls.__delattr__ = delete
    for name, member in members_for(original).items():
        setattr(cls, name, member)
    completed: type[nn.Module] = cls
    return completed


def _empty_module(original: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """For unpickling: a module of the shared class, without contents, in a process that may never have transformed one."""
    from rosa_fx.passes.install import install

    install()
    cls = _shared.get((original, names))
    if cls is None:
        # torch makes the class, with properties that know of its cache, from a module without contents.
        sample = object.__new__(original)
        nn.Module.__init__(sample)
        for name in names:
            sample.register_buffer(name, torch.empty(0))
            parametrize.register_parametrization(sample, name, nn.Identity(), unsafe=True)
        cls = _shared.setdefault((original, names), _completed(type(sample), original, names))
    return object.__new__(cls)
