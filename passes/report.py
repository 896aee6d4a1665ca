"""What a rewrite did with each weight in one graph."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.fx import Node

_TORCH = str(Path(torch.__file__).parent) + "/"


@dataclass(frozen=True)
class Work:
    """A product of `rows` rows with `n` x `k` entries of a weight.

    `kind`: "product" or "gradient" where it is fused, "dense product" or "dense gradient" where it is not.
    """

    kind: str
    rows: int
    n: int
    k: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.n * self.k


@dataclass(frozen=True)
class Other:
    """A product with a weight that is no target: path of the module that multiplies, the weight's shape, FLOPs."""

    path: str
    shape: tuple[int, ...]
    flops: int


@dataclass
class Use:
    """One weight in one graph: how many products and gradients were fused, and why and where others were not.

    `shared` of the products take a thin product of the low-rank part that is computed once for several users; `joined` of the
    gradients come out of a product of the backward pass.
    """

    name: str
    layout: str
    products: int = 0
    gradients: int = 0
    shared: int = 0
    joined: int = 0
    dense: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)

    def leave(self, reason: str, node: Node) -> None:
        """Something stays dense because of `node`."""
        line = source_line(node)
        self.dense.append(f"{reason} ({line})" if line else reason)
        self.sources += [line] if line else []


@dataclass
class GraphReport:
    """`uses` by weight name; `others`, products with other weights; counters of each rewrite over the whole graph.

    `shared`: products with the stacked matrices of several layers, thin products with several users, and gradients that are
    parts of one product. `joined`: layers whose gradients come out of a product of the backward pass.
    """

    uses: dict[str, Use] = field(default_factory=dict)
    others: list[Other] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: {"linear": 0, "linear_t": 0, "linear_grads": 0, "dense": 0})
    shared: dict[str, int] = field(default_factory=lambda: {"stacked": 0, "reused": 0, "gradients": 0})
    joined: int = 0

    def use(self, name: str, layout: str) -> Use:
        return self.uses.setdefault(name, Use(name, layout))


def weight_name(node: Node) -> str:
    """The weight's name in the original model, from the module stack that capture left on a materialise node.

    A graph that was captured for a part of the model names it from that part.
    """
    return module_path(node) or node.name


def module_path(node: Node) -> str:
    """The module in whose forward a node was made, from the model or from the part that was captured; empty if unknown."""
    for key in ("nn_module_stack", "fwd_nn_module_stack"):
        stack = node.meta.get(key)
        if stack:
            return normalise(list(stack.values())[-1][0])
    return ""


def normalise(path: str) -> str:
    """`L['self'].layers[0].up.parametrizations.weight.0` -> `layers.0.up.weight`."""
    path = path.replace(".__dict__['_modules']", "._modules").replace('.__dict__["_modules"]', "._modules")
    path = re.sub(r"\._modules\[['\"]([^'\"]+)['\"]\]", r".\1", path)
    path = re.sub(r"\[['\"]?([^'\"\]]+)['\"]?\]", r".\1", path)
    # A wrapper around `forward` that takes `*args` knows the module as the first of them.
    path = re.sub(r"^[A-Z]\.(?:args\.\d+|[^.]+)(?:\.|$)", "", path)
    path = re.sub(r"^_orig_mod\.", "", path)
    return re.sub(r"(^|\.)parametrizations\.(.+?)\.\d+$", r"\1\2", path)


def source_line(node: Node) -> str:
    """Where in the user's code a node came from, forward or backward: `file.py:12: text`, or nothing."""
    trace = node.meta.get("stack_trace") or ""
    frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]+\n\s*([^\n]*)', trace)
    for file, line, text in reversed(frames):
        if not file.startswith(_TORCH) and not file.endswith("rosa_fx/weight.py"):
            return f"{file.rsplit('/', 1)[-1]}:{line}: {text.strip()}"
    return ""
