"""Every use of torch._inductor's private interface, in one place: torch 2.13 promises none of it to the next release."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

__all__ = ["CustomGraphPass", "add_joint_pass", "capture_backend", "hash_files", "joint_passes", "load_cpp"]


def joint_passes() -> tuple[Any, ...]:
    """The passes that Inductor runs on the joint graph before its own, in order."""
    import torch._inductor.config as config

    current = config.joint_custom_pre_pass
    if current is None:
        return ()
    return tuple(current) if isinstance(current, (list, tuple)) else (current,)


def add_joint_pass(graph_pass: CustomGraphPass) -> None:
    """Append to the passes that are set, unless a pass of that class is among them."""
    import torch._inductor.config as config

    current = joint_passes()
    if not any(type(existing) is type(graph_pass) for existing in current):
        config.joint_custom_pre_pass = [*current, graph_pass]


def hash_files(paths: Sequence[str]) -> bytes:
    """A digest of the contents of `paths`, read now."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in paths:
        with open(path, "rb") as file:
            digest.update(file.read())
    return digest.digest()


def _cpu_fingerprint() -> str:
    """What `-march=native` means here: the cache directory may be shared by machines with other instruction sets."""
    flags = platform.machine() + platform.processor()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            flags += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        pass
    return hashlib.sha256(flags.encode()).hexdigest()[:16]


def load_cpp(source: str) -> ctypes.CDLL:
    """Compile C++ source with Inductor's compiler and flags, and load it.

    The library lies in Inductor's cache directory under a hash of the source, the command line and the instruction
    set, so edited source is compiled anew, and a lock file makes concurrent processes wait for one compilation. Calls
    through the returned ctypes library release the GIL. Raises whatever Inductor or the loader raises when there is no
    usable compiler (the class is not documented: catch Exception).
    """
    from torch._inductor.codecache import CppCodeCache

    # Inductor's own flags forbid fused multiply-add, which generated code needs for parity with eager; kernels here
    # state their own numerics. needs_vec_isa only adds a probe compilation of intrinsics that plain C++ does not use.
    source = f"{source}\n// instruction set: {_cpu_fingerprint()}\n"
    library: ctypes.CDLL = CppCodeCache.load(source, extra_flags=("-ffp-contract=fast",), needs_vec_isa=False)
    return library


def capture_backend(visit: Callable[[Graph], None]) -> Callable[..., Any]:
    """A `torch.compile` backend that captures as Inductor would, shows each joint or inference graph, and generates no code.

    `visit` may rewrite the graph in place. Execution is eager.
    """
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    def partition(module: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        visit(module.graph)
        module.recompile()
        return min_cut_rematerialization_partition(module, inputs, **kwargs)

    def run(module: torch.fx.GraphModule, inputs: Any) -> Any:
        return make_boxed_func(module.forward)

    def run_inference(module: torch.fx.GraphModule, inputs: Any) -> Any:
        visit(module.graph)
        module.recompile()
        return make_boxed_func(module.forward)

    return aot_autograd(
        fw_compiler=run,
        bw_compiler=run,
        inference_compiler=run_inference,
        partition_fn=partition,
        decompositions=select_decomp_table,
    )


# --- lowerings and templates ---------------------------------------------------------------------------------------


def generates_triton(device: torch.device) -> bool:
    """Whether Inductor generates Triton kernels for `device` under the present configuration."""
    import torch._inductor.config as config

    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return config.cuda_backend == "triton" and has_triton()
    return device.type == "cpu" and config.cpu_backend == "triton"


def register_lowering(op: torch._ops.OpOverload, lower: Callable[..., Any]) -> None:
    """Let `lower(*args)` build Inductor's IR for `op`. Where it returns None the operator is called as it is.

    Arguments arrive realised and with the strides that they have in eager mode, as they would without a lowering.
    """
    from torch._inductor import lowering
    from torch._library.utils import get_layout_constraint_tag

    if op in lowering.lowerings and not getattr(lowering.lowerings[op], "_is_fallback_handler", False):
        return
    call = lowering.fallback_handler(op)

    def choose(*args: Any) -> Any:
        lowered = lower(*args)
        return call(*args) if lowered is None else lowered

    lowering.add_needs_realized_inputs(op)
    constraint = lowering.tag_to_layout_constraint(get_layout_constraint_tag(op, with_default=True))
    if constraint is not None:
        lowering.add_layout_constraint(op, constraint)
    lowering.register_lowering(op, type_promotion_kind=None)(choose)


def call_functions(module: str, ops: Sequence[torch._ops.OpOverload]) -> None:
    """Let generated Python call the function of `module` named like the operator, where all is on the CPU."""
    from torch._inductor.codegen.custom_extern_kernel_codegen import CUSTOM_EXTERN_KERNEL_CODEGEN, CustomCodegen

    def write(node: Any, writeline: Callable[[Any], None]) -> None:
        from torch._inductor import config
        from torch._inductor.codegen.wrapper import ExternKernelAllocLine
        from torch._inductor.virtualized import V

        wrapper = V.graph.wrapper_code
        if config.fx_wrapper or any(buffer.get_device_or_error().type != "cpu" for buffer in node.inputs):
            writeline(ExternKernelAllocLine(wrapper, node))
            return
        wrapper.add_import_once(f"import {module}")
        name = node.op_overload._schema.name.rpartition("::")[2]
        writeline(f"{node.get_name()} = {module}.{name}({', '.join([*node.codegen_args(), *node.codegen_kwargs()])})")

    for op in ops:
        CUSTOM_EXTERN_KERNEL_CODEGEN[f"torch.ops.{op}"] = CustomCodegen(python=write)


def lower(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    """The IR of `op` applied to IR nodes."""
    from torch._inductor.lowering import lowerings

    return lowerings[op](*args, **kwargs)


def realize(*nodes: Any) -> tuple[Any, ...]:
    """The nodes as buffers, or views of buffers, that a template can read."""
    from torch._inductor.ir import ExternKernel

    return tuple(ExternKernel.realize_input(node) for node in nodes)


def size_hint(size: Any) -> int:
    """The size that a dimension has in the example that is compiled."""
    from torch._inductor.virtualized import V

    return int(V.graph.sizevars.optimization_hint(size))


def is_static(node: Any) -> bool:
    """Whether every size of `node` is a number."""
    return all(getattr(size, "is_number", isinstance(size, int)) for size in node.get_size())


def constant(data: torch.Tensor, device: torch.device) -> Any:
    """A tensor that becomes part of the compiled graph."""
    from torch._inductor.virtualized import V

    with torch.utils._python_dispatch._disable_current_modes():
        return V.graph.add_tensor_constant(data.to(device))


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability (major, minor) of a CUDA device; of an A100 for what stands in for one."""
    if device.type != "cuda":
        return (8, 0)
    major, minor = torch.cuda.get_device_capability(device)
    return major, minor


def runs_ptx(device: torch.device) -> bool:
    """Whether kernels for `device` may hold PTX: NVIDIA GPUs, not AMD's and not the interpreter."""
    return device.type == "cuda" and torch.version.hip is None


def cast(node: Any, dtype: torch.dtype) -> Any:
    """`node` in `dtype`; itself if it has it."""
    return node if node.get_dtype() == dtype else lower(torch.ops.prims.convert_element_type.default, node, dtype)


def triton_template(name: str, by_row: bool, source: str) -> Any:
    """A `TritonTemplate` over tiles of its output [rows, columns].

    Tiles are BLOCK_M rows by BLOCK_N columns (BLOCK_K if TRANSPOSED), counted in one dimension of the grid; `by_row`: one row
    by BLOCK_K columns, in two, of the first COLUMNS if there is that constant. Sources may call `output_pointer()` for the name
    of the output's pointer.
    """
    from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate, TritonTemplateKernel

    @SymbolicGridFn
    def tiles(rows: Any, columns: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, Any, Any]:
        return cdiv(rows, meta["BLOCK_M"]) * cdiv(columns, meta["BLOCK_K" if meta["TRANSPOSED"] else "BLOCK_N"]), 1, 1

    @SymbolicGridFn
    def rows_by_tiles(rows: Any, columns: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, Any, Any]:
        return rows, cdiv(meta.get("COLUMNS", columns), meta["BLOCK_K"]), 1

    class Kernel(TritonTemplateKernel):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.extra_template_env_fns.append(self.output_pointer)

        def output_pointer(self) -> str:
            return str(self.args.output(self.output_node.get_name()))

    class Template(TritonTemplate):
        kernel_type = Kernel

    return Template(name=name, grid=rows_by_tiles if by_row else tiles, source=source)


@dataclass(frozen=True)
class Alternative:
    """Another way to a template's output: how long it takes in ms, on tensors like the template's inputs, and its IR."""

    name: str
    time: Callable[[Sequence[torch.Tensor], torch.Tensor], float]
    build: Callable[[], Any]


def time_call(function: Callable[[], object], device: torch.device) -> float:
    """Milliseconds that `function` takes on `device`, as Inductor times the choices of its autotuner."""
    from torch._inductor.runtime.benchmarking import benchmarker

    return float(benchmarker.benchmark(function, (), {}, device=device))


def template_timer(
    template: Any, inputs: Sequence[Any], size: Sequence[Any], dtype: torch.dtype, option: dict[str, Any]
) -> Callable[..., float]:
    """`timer(*tensors, out=tensor)`: milliseconds that the template takes over buffers like `inputs`."""
    from torch._inductor.ir import FixedLayout

    choices: list[Any] = []
    layout = FixedLayout(inputs[0].get_device(), dtype, list(size))
    error = template.maybe_append_choice(choices, input_nodes=tuple(inputs), layout=layout, **option)
    if error is not None:
        raise error
    timer: Callable[..., float] = choices[0].benchmark
    return timer


def _alternative_choice(alternative: Alternative, inputs: Sequence[Any], layout: Any) -> Any:
    from torch._inductor.ir import ChoiceCaller

    class Choice(ChoiceCaller):
        def benchmark(self, *args: Any, out: torch.Tensor) -> float:
            return alternative.time(args, out)

        def call_name(self) -> str:
            return alternative.name

        def hash_key(self) -> str:
            return alternative.name

        def output_node(self) -> Any:
            return alternative.build()

    return Choice(alternative.name, list(inputs), layout, "")


def template_output(
    name: str,
    template: Any,
    inputs: Sequence[Any],
    size: Sequence[Any],
    dtype: torch.dtype,
    options: Sequence[dict[str, Any]],
    examples: dict[int, Callable[[], torch.Tensor]] | None = None,
    alternative: Alternative | None = None,
) -> Any:
    """The output of the template over `inputs`: of the only option, or of the one that autotuning finds fastest.

    `examples` makes inputs for autotuning, by position: random numbers will not do for what is used as an address, and
    integers would all be 0. `alternative` is timed beside the options.
    """
    from torch._inductor.ir import FixedLayout
    from torch._inductor.select_algorithm import autotune_select_algorithm

    layout = FixedLayout(inputs[0].get_device(), dtype, list(size))
    choices: list[Any] = []
    for option in options:
        error = template.maybe_append_choice(choices, input_nodes=tuple(inputs), layout=layout, **option)
        if error is not None:
            raise error
    # What is several buffers cannot be decided on later, when epilogues are fused.
    now: dict[str, Any] = {}
    if alternative is not None:
        choices.append(_alternative_choice(alternative, inputs, layout))
        now["return_multi_template"] = False
    makers = {position: lambda buffer, make=make: make() for position, make in (examples or {}).items()}
    node, _ = autotune_select_algorithm(name, choices, list(inputs), layout, input_gen_fns=makers or None, **now)
    return node


def flat_template(name: str, block: str, source: str) -> Any:
    """A `TritonTemplate` whose output has one dimension, cut into pieces of `block` elements."""
    from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate

    @SymbolicGridFn
    def pieces(size: Any, meta: dict[str, Any], *, cdiv: Any) -> tuple[Any, Any, Any]:
        return cdiv(size, meta[block]), 1, 1

    return TritonTemplate(name=name, grid=pieces, source=source)


def call(op: torch._ops.OpOverload, *args: Any) -> Any:
    """A call of `op` as it is, on IR nodes."""
    from torch._inductor.lowering import fallback_handler

    return fallback_handler(op, add_to_fallback_set=False)(*args)


def graph() -> Any:
    """The graph that is being lowered."""
    from torch._inductor.virtualized import V

    return V.graph


def contiguous(node: Any) -> Any:
    """`node` as a contiguous buffer; itself if it is one."""
    from torch._inductor.ir import ExternKernel

    return ExternKernel.require_contiguous(node)


def triton_devices() -> bool:
    """Whether this process wants Triton kernels: where there is a GPU or Inductor runs Triton on the CPU.

    `ROSA_FX_TRITON=0` turns them off. AMD's GPUs have not run them yet: there `ROSA_FX_TRITON=1` asks for them.
    """
    import torch._inductor.config as config

    unasked = "0" if torch.version.hip is not None else "1"
    wanted = os.environ.get("ROSA_FX_TRITON", unasked) == "1"
    return (wanted and torch.cuda.is_available()) or config.cpu_backend == "triton"


def max_autotune() -> bool:
    """Whether Inductor is asked to time several choices."""
    import torch._inductor.config as config

    return bool(config.max_autotune or config.max_autotune_gemm)
