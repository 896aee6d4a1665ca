"""One architecture from end to end: transform, account, a rewritten training step against eager, an optimizer step, merge."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

import rosa_fx
from rosa_fx.coverage_models import tensors, tiny_model
from rosa_fx.coverage_others import other_model
from rosa_fx.passes.report import GraphReport
from rosa_fx.report import compilations, target_reports
from rosa_fx.state import state_of
from rosa_fx.targets import select_targets

RANK, DENSITY = 2, 0.05
# Float32 through a few layers, summed in another order: relative to the norm of all outputs, or of all gradients.
TOLERANCE = 2.0**-12


def check(model_type: str, class_name: str) -> dict[str, Any]:
    """The row of one architecture of transformers, as JSON values. `error` names the exception where a stage failed."""
    return check_model(class_name, lambda: tiny_model(model_type, class_name))


def check_other(name: str, class_name: str) -> dict[str, Any]:
    """The row of a model of `coverage_others`, as `check`."""
    return check_model(class_name, lambda: other_model(name))


def check_model(class_name: str, build: Callable[[], tuple[nn.Module, dict[str, Any]]]) -> dict[str, Any]:
    """The row of what `build` returns: a model in eval mode and its inputs by name."""
    start = time.perf_counter()
    row: dict[str, Any] = {"stage": "build", "class": class_name}
    try:
        model, inputs = build()
        row["inputs"] = sorted(name for name, value in inputs.items() if isinstance(value, Tensor))
        row["parameters"] = sum(p.numel() for p in model.parameters())
        _check(model, inputs, row)
        row["stage"] = "done"
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def _check(model: nn.Module, inputs: dict[str, Any], row: dict[str, Any]) -> None:
    row["stage"] = "bare"
    spec = rosa_fx.RosaSpec(rank=RANK, alpha=2.0 * RANK, density=DENSITY, base="nf4")
    row["breaks_bare"] = bare_breaks(model, inputs, {target.name for target in select_targets(model, spec)})
    convolutions = {id(p) for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd) for p in m.parameters()}
    stacked = {name for name, p in model.named_parameters() if p.dim() == 3 and id(p) not in convolutions}
    row["stage"] = "transform"
    rosa_fx.transform(model, spec)
    row["stacked"] = len(stacked - state_of(model).targets.keys())
    fill(model)
    row["stage"] = "eager"
    expected, expected_grads = step(model, model, inputs)
    row["stage"] = "compiled"
    graphs: list[GraphReport] = []
    call = rewritten(model, graphs)
    # The accounting of `explain`, over the graphs that then run: capture is most of the time that a row takes.
    with compilations() as counted:
        actual, actual_grads = step(call, model, inputs)
    state = state_of(model)
    targets = target_reports(state, graphs)
    row["targets"] = len(targets)
    for status in ("fused", "dense", "unused"):
        row[status] = sum(t.status == status for t in targets)
    row["breaks"], row["recompiles"] = counted["graph_breaks"], counted["recompiles"]
    row["reasons"] = [[t.name, list(t.shape), t.reason] for t in targets if t.status == "dense"]
    row["unused_names"] = [t.name for t in targets if t.status == "unused"]
    row["output_error"], row["gradient_error"] = distance(actual, expected), distance(actual_grads, expected_grads)
    row["stage"] = "optimizer"
    torch.optim.AdamW(rosa_fx.trainable_parameters(model)).step()
    row["stage"] = "merge"
    with torch.no_grad():
        before = tensors(model(**inputs))
        rosa_fx.merge(model)
        row["merge_error"] = distance(tensors(model(**inputs)), before)
    row["stage"] = "compare"
    wrong = [key for key in ("output_error", "gradient_error", "merge_error") if not row[key] <= TOLERANCE]
    if wrong:
        raise ArithmeticError(", ".join(f"{key} {row[key]:.2g}" for key in wrong))


def fill(model: nn.Module) -> None:
    """Every adapter tensor away from zero, with a random mask: zeros would hide a mistake."""
    for name, weight in state_of(model).weights.items():
        if weight.low_rank is not None:
            nn.init.normal_(weight.low_rank.B, std=0.05)
        if weight.sparse is not None:
            dense = torch.zeros(math.prod(weight.shape), dtype=torch.bool)
            dense[torch.randperm(dense.numel())[: weight.sparse.values.numel()]] = True
            rosa_fx.set_masks(model, {name: dense.view(weight.shape)})
            nn.init.normal_(weight.sparse.values, std=0.05)


def bare_breaks(model: nn.Module, inputs: dict[str, Any], trained: Collection[str]) -> int:
    """Graph breaks of the model as it is, with the parameters of these names alone requiring gradients.

    What requires gradients decides how often a part of the model is captured, and each capture counts its breaks again.
    """
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    before = sum(counters["graph_break"].values())
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    torch.compile(model, backend="eager")(**inputs)
    for parameter, needed in required.items():
        parameter.requires_grad_(needed)
    return sum(counters["graph_break"].values()) - before


def rewritten(model: nn.Module, graphs: list[GraphReport]) -> Any:
    """The model compiled with the rewrite, without code generation; `graphs` receives what became of each graph."""
    from rosa_fx.kernels.inductor import capture_backend
    from rosa_fx.passes.joint import rewrite

    torch._dynamo.reset()
    return torch.compile(model, backend=capture_backend(lambda graph: graphs.append(rewrite(graph, strict=False))))


def step(call: Any, model: nn.Module, inputs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of the trainable parameters, for a fixed random upstream gradient."""
    for parameter in model.parameters():
        parameter.grad = None
    torch.manual_seed(3)
    outputs = tensors(call(**inputs))
    generator = torch.Generator().manual_seed(7)
    pairs = [(out, torch.randn(out.shape, generator=generator)) for out in outputs if out.requires_grad]
    torch.autograd.backward([out for out, _ in pairs], [upstream.to(out.dtype) for out, upstream in pairs])
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [o.detach() for o in outputs], [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trainable]


def distance(actual: list[Tensor], expected: list[Tensor]) -> float:
    """‖actual − expected‖ / ‖expected‖ over all tensors together. Infinite values must agree in place."""
    difference = size = 0.0
    if len(actual) != len(expected):
        return float("inf")
    for ours, theirs in zip(actual, expected):
        finite = torch.isfinite(theirs)
        if not torch.equal(finite, torch.isfinite(ours)):
            return float("inf")
        difference += float((ours[finite].double() - theirs[finite].double()).square().sum())
        size += float(theirs[finite].double().square().sum())
    return (difference / size) ** 0.5 if size else difference**0.5
