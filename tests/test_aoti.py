"""Compiled ahead of time, and under CUDA graphs: what is provable without a GPU.

On the CPU a transformed model goes through torch.export and AOTInductor. For CUDA, code is generated for a GPU that is not
there and read: what it calls must be what a CUDA graph can record.
"""

from __future__ import annotations

import ast
import json
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from other_process import run_python
from torch import Tensor, nn
from torch._inductor.utils import is_cudagraph_unsafe_fx_node

import rosa_fx
from rosa_fx.kernels import ops
from rosa_fx.kernels.bases.base import base_format
from rosa_fx.kernels.layout import Layout
from rosa_fx.kernels.terms.registry import term


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 48)
        self.down = nn.Linear(48, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(x)))


def transformed() -> nn.Module:
    """A block with an NF4 base and both adapters away from zero."""
    torch.manual_seed(0)
    model = Block().eval()
    rosa_fx.transform(model, rosa_fx.RosaSpec(base="nf4", rank=4, density=0.05))
    chosen = {}
    for name in ("up.weight", "down.weight"):
        weight = rosa_fx.adapter(model, name)
        flat = torch.zeros(weight.shape[0] * weight.shape[1], dtype=torch.bool)
        count = weight.sparse.values.numel()
        chosen[name] = flat.index_fill_(0, torch.randperm(flat.numel())[:count], True).view(weight.shape)
    rosa_fx.set_masks(model, chosen)
    with torch.no_grad():
        for name in chosen:
            weight = rosa_fx.adapter(model, name)
            weight.low_rank.B.normal_(0, 0.1)
            weight.sparse.values.normal_(0, 0.1)
            weight.set_phase("joint")
    return model


LOAD = """
import sys, torch
package, inputs, outputs = sys.argv[1:]
inputs = torch.load(inputs)
try:
    torch._inductor.aoti_load_package(package)(inputs[0])
except RuntimeError as error:
    # What a process without the operators is told: their name.
    assert "rosa_fx::linear" in str(error), error
else:
    raise AssertionError("the package runs without rosa_fx: the operators are not in it")
import rosa_fx.kernels.ops
model = torch._inductor.aoti_load_package(package)
torch.save([model(x) for x in inputs], outputs)
"""


@pytest.mark.timeout(600)
def test_packaged_ahead_of_time(tmp_path: Path) -> None:
    """Exported with a dynamic number of rows, packaged, and loaded by another process that imports the operators."""
    model = transformed()
    inputs = [torch.randn(rows, 32) for rows in (5, 1, 17)]
    package = tmp_path / "model.pt2"
    with torch.no_grad():
        eager = [model(x) for x in inputs]
        exported = torch.export.export(model, (inputs[0],), dynamic_shapes=({0: torch.export.Dim("rows", min=1, max=64)},))
        torch._inductor.aoti_compile_and_package(exported, package_path=str(package))
    # The rewrite took place: fused operators, which the package calls by name, and no dense weight.
    with zipfile.ZipFile(package) as archive:
        described = [json.loads(archive.read(name)) for name in archive.namelist() if name.endswith("wrapper.json")]
    targets = [node["node"]["target"] for content in described for node in content["nodes"]]
    assert targets == ["rosa_fx::linear", "rosa_fx::linear"]
    torch.save(inputs, tmp_path / "inputs.pt")
    done = run_python("-c", LOAD, package, tmp_path / "inputs.pt", tmp_path / "outputs.pt")
    assert done.returncode == 0, done.stderr[-3000:]
    exact_model = transformed().double()
    for x, plain, ours in zip(inputs, eager, torch.load(tmp_path / "outputs.pt"), strict=True):
        with torch.no_grad():
            exact = exact_model(x.double())
        error, usual = ((y.double() - exact).square().mean().sqrt().item() for y in (ours, plain))
        # Short float32 sums in another order: errors of the size of a rounding differ by chance.
        assert error <= max(1.1 * usual, 2.0**-23 * exact.abs().max().item())


# --- CUDA graphs ------------------------------------------------------------------------------------------------------

OPERATORS = [
    getattr(torch.ops.rosa_fx, name).default
    for name in ("materialize", "linear", "linear_t", "linear_grads", "materialize_backward")
]


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_operators_do_not_break_cuda_graphs(operator: torch._ops.OpOverload) -> None:
    """Inductor splits graphs at operators that it holds unsafe; none of ours, and none whose output size depends on data."""
    assert torch.Tag.cudagraph_unsafe not in operator.tags
    assert torch.Tag.dynamic_output_shape not in operator.tags
    assert torch.Tag.data_dependent_output not in operator.tags
    node = torch.fx.Graph().call_function(operator)
    assert not is_cudagraph_unsafe_fx_node(node)


@pytest.mark.parametrize("kind", ["dense", "int8", "nf4", "nested"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_composition_asks_nothing_of_the_device(kind: str, dtype: torch.dtype) -> None:
    """No value and no size is read back: on meta tensors, which have no values and are not on the CPU, that would raise."""
    form = base_format("nf4", double_quant=True) if kind == "nested" else base_format(kind)
    layout = Layout((24, 16), dtype, form, (term("low_rank", scale=2.0), term("sparse")))

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    base = [empty(*part.shape, dtype=part.dtype) for part in form.layout(layout.shape, dtype)]
    delta = [empty(4, 16), empty(24, 4), empty(30), empty(25, dtype=torch.int32), empty(30, dtype=torch.int32)]
    x, dy = empty(7, 16, dtype=dtype), empty(7, 24, dtype=dtype)
    assert ops.product(x, None, base, delta, layout, False).shape == (7, 24)
    assert ops.product(dy, None, base, delta, layout, True).shape == (7, 16)
    grads = [grad for item, tensors in layout.split(delta) for grad in item.grads(dy, x, tensors)]
    assert [tuple(grad.shape) for grad in grads] == [(4, 16), (24, 4), (30,)]
    assert all(grad.is_meta for grad in grads)


GENERATE = """
import json, sys
from rosa_fx.kernels import inductor_offline as offline, lowering
from rosa_fx.kernels.report.architectures import ARCHITECTURES
from rosa_fx.kernels.report.kernels import KERNELS
found = {}
architecture = ARCHITECTURES["sm_90"]
# Other formats differ inside the kernels only.
FORMS = ("double quant", "fp4", "int8", "dense")
for kernel in [kernel for kernel in KERNELS if not any(form in kernel.name for form in FORMS)]:
    if kernel.graph is None:
        continue  # Python launches it
    choose = lambda name, choices: next((c for c in choices if offline.is_template(c) and name.startswith("rosa")), choices[0])
    with offline.present(architecture.device), kernel.lowering():
        lowering.register()
        found[kernel.name] = offline.generate(*kernel.graph(architecture), choose)
json.dump(found, open(sys.argv[1], "w"))
"""

# What the call of a generated module may do. Buffers are Inductor's; products are the library's, into such buffers.
ALLOWED = {
    *("assert_size_stride", "assert_alignment", "empty_strided_cuda", "reinterpret_tensor", "get_raw_stream"),
    *("extern_kernels.mm", "extern_kernels.addmm", "torch.cuda._DeviceGuard", "torch.cuda.set_device", "args.clear"),
    # Sorts and gathers on the device, into tensors of sizes that are known: what is recorded is replayed.
    "torch.ops.rosa_fx.by_column.default",
}


def called(module: str) -> set[str]:
    """Names of everything that the `call` of a generated module calls."""
    (function,) = [node for node in ast.walk(ast.parse(module)) if isinstance(node, ast.FunctionDef) and node.name == "call"]
    return {ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}


def test_generated_code_can_be_recorded(tmp_path: Path) -> None:
    """The code for an H100 of every kernel: templates, library products, Inductor's buffers. No sync, no other allocation."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    file = tmp_path / "modules.json"
    done = run_python("-c", GENERATE, file)
    assert done.returncode == 0, done.stderr[-3000:]
    modules = json.loads(file.read_text(encoding="utf-8"))
    assert len(modules) >= 7
    for name, module in modules.items():
        names = called(module)
        kernels = {item for item in names if item.startswith("triton_") and item.endswith(".run")}
        assert any("_tem_" in item for item in kernels), name
        assert names - kernels <= ALLOWED, f"{name}: {names - kernels - ALLOWED}"
