"""What a rewrite did with each weight in one graph."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch.fx import Node


@dataclass
class Use:
    """One weight in one graph: how many products and gradients were fused, and why others were not.

    `shared` of the products take a thin product of the low-rank part that is computed once for several users.
    """

    name: str
    layout: str
    products: int = 0
    gradients: int = 0
    shared: int = 0
    dense: list[str] = field(default_factory=list)


@dataclass
class GraphReport:
    """`uses` by weight name; counters of each rewrite over the whole graph.

    `shared`: products with the stacked matrices of several layers, thin products with several users, and gradients that are
    parts of one product.
    """

    uses: dict[str, Use] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=lambda: {"linear": 0, "linear_t": 0, "linear_grads": 0, "dense": 0})
    shared: dict[str, int] = field(default_factory=lambda: {"stacked": 0, "reused": 0, "gradients": 0})

    def use(self, name: str, layout: str) -> Use:
        return self.uses.setdefault(name, Use(name, layout))


def weight_name(node: Node) -> str:
    """The weight's name in the original model, from the module stack that capture left on a materialise node.

    A graph that was captured for a part of the model names it from that part.
    """
    for key in ("nn_module_stack", "fwd_nn_module_stack"):
        stack = node.meta.get(key)
        if stack:
            path = list(stack.values())[-1][0]
            return normalise(path)
    return node.name


def normalise(path: str) -> str:
    """`L['self'].layers[0].up.parametrizations.weight.0` -> `layers.0.up.weight`."""
    path = path.replace(".__dict__['_modules']", "._modules").replace('.__dict__["_modules"]', "._modules")
    path = re.sub(r"\._modules\[['\"]([^'\"]+)['\"]\]", r".\1", path)
    path = re.sub(r"\[['\"]?([^'\"\]]+)['\"]?\]", r".\1", path)
    path = re.sub(r"^[A-Z]\.[^.]+\.?", "", path)
    path = re.sub(r"^_orig_mod\.", "", path)
    return re.sub(r"(^|\.)parametrizations\.(.+?)\.\d+$", r"\1\2", path)


def source_line(node: Node) -> str:
    """Where in the user's code a node came from: `file.py:12: text`, or nothing."""
    trace = node.meta.get("stack_trace") or ""
    frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]+\n\s*([^\n]*)', trace)
    for file, line, text in reversed(frames):
        if "/torch/" not in file and "rosa_fx/weight.py" not in file:
            return f"{file.rsplit('/', 1)[-1]}:{line}: {text.strip()}"
    return ""
