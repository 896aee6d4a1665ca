"""Ends of groups on a device: read once for the products of a layer, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, Node

import rosa_fx
from rosa_fx import RosaSpec
from rosa_fx.kernels.inductor import capture_backend
from rosa_fx.passes import group_ends
from rosa_fx.passes.joint import rewrite

E, N, K = 3, 32, 16
COPY = torch.ops.prims.device_put.default


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(E, N, K) * 0.2)
        self.down = nn.Parameter(torch.randn(E, K, N) * 0.2)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        offs = counts.cumsum(0).to(torch.int32)
        y = torch.tanh(F.grouped_mm(x, self.up.mT, offs=offs))
        return F.grouped_mm(y, self.down.mT, offs=offs)


def prepared() -> nn.Module:
    torch.manual_seed(0)
    spec = RosaSpec(base="keep", targets=["up", "down"], rank=2, density=0)
    return rosa_fx.transform(Experts(), spec).to(torch.bfloat16)


def calls(graph: Graph, name: str) -> list[Node]:
    return [node for node in graph.nodes if str(node.target) == name]


def test_one_copy_for_a_layer_forward_and_backward(fresh_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made in the forward graph and kept: to read the ends in the backward pass costs no wait."""
    model, x, counts = prepared(), torch.randn(48, K).bfloat16().requires_grad_(), torch.tensor([16, 0, 32])
    parameters = [p for p in model.parameters() if p.requires_grad]
    graphs: list[Graph] = []

    def gradients() -> list[Tensor]:
        graphs.clear()
        torch._dynamo.reset()
        y = torch.compile(model, fullgraph=True, backend=backend)(x, counts)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *parameters])]

    def run(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module.graph)
        return make_boxed_func(module.forward)

    def partition(module: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        rewrite(module.graph)
        module.recompile()
        return min_cut_rematerialization_partition(module, inputs, **kwargs)

    backend = aot_autograd(fw_compiler=run, bw_compiler=run, partition_fn=partition, decompositions=select_decomp_table())
    plain = gradients()
    monkeypatch.setattr(group_ends, "_on_host", lambda node: False)  # what another device would say
    copied = gradients()
    assert all(torch.equal(one, other) for one, other in zip(plain, copied, strict=True))
    forward, backward = graphs
    (copy,) = calls(forward, str(COPY))
    assert not calls(backward, str(COPY))
    products = calls(forward, "rosa_fx.grouped_linear.default")
    assert [node.args[1] for node in products] == [copy] * 2
    given = [node.args[1] for node in calls(backward, "rosa_fx.grouped_linear_t.default")]
    given += [node.args[2] for node in calls(backward, "rosa_fx.grouped_linear_grads.default")]
    assert len(given) == 4
    assert {(node.op, node.name) for node in given if isinstance(node, Node)} == {("placeholder", copy.name)}


def test_ends_on_the_host_are_left_alone(fresh_compiler: None) -> None:
    graphs: list[Graph] = []
    backend = capture_backend(lambda graph: (rewrite(graph), graphs.append(graph)))
    with torch.no_grad():
        torch.compile(prepared(), fullgraph=True, backend=backend)(torch.randn(48, K).bfloat16(), torch.tensor([16, 0, 32]))
    (graph,) = graphs
    assert len(calls(graph, "rosa_fx.grouped_linear.default")) == 2
    assert not calls(graph, str(COPY))
