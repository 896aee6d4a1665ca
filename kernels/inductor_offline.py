"""Inductor's code for a GPU that is not there: the second and last file that uses torch._inductor's private interface.

Everything here runs on fake tensors. Nothing is launched, and nothing is timed: where Inductor would time several kernels, the
caller says which one it takes.
"""

from __future__ import annotations

import os
import re
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from rosa_fx.kernels import inductor


@dataclass(frozen=True)
class Device:
    """What Inductor and Triton ask of a device. `backend`: "cuda" or "hip"; `arch`: 90 or "gfx942"; memory in bytes."""

    name: str
    backend: str
    arch: int | str
    capability: tuple[int, int]
    processors: int
    warp_size: int
    threads_per_processor: int
    shared_per_program: int
    shared_per_processor: int

    def properties(self) -> Any:
        """As `torch.cuda.get_device_properties` gives them."""
        return types.SimpleNamespace(
            name=self.name,
            major=self.capability[0],
            minor=self.capability[1],
            multi_processor_count=self.processors,
            max_threads_per_multi_processor=self.threads_per_processor,
            regs_per_multiprocessor=65536,
            warp_size=self.warp_size,
            total_memory=80 << 30,
            shared_memory_per_block_optin=self.shared_per_program,
            shared_memory_per_block=48 << 10,
            shared_memory_per_multiprocessor=self.shared_per_processor,
            L2_cache_size=40 << 20,
            max_threads_per_block=1024,
            gcnArchName=str(self.arch),
        )


def _driver(device: Device) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class Offline(DriverBase):
        def __init__(self) -> None:
            pass

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> Any:
            return GPUTarget(device.backend, device.arch, device.warp_size)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, index: int) -> int:
            return 0

        def get_device_capability(self, *args: Any) -> tuple[int, int]:
            return device.capability

        def set_current_device(self, index: int) -> None:
            pass

        def get_benchmarker(self) -> Any:
            raise RuntimeError("there is no GPU to time kernels on")

    return Offline()


@contextmanager
def present(device: Device) -> Iterator[None]:
    """Within, torch, Inductor and Triton believe that `device` is there. Configuration and drivers are restored."""
    import bitsandbytes  # noqa: F401  (asks at import whether there is a GPU, and must not be told)
    import torch._inductor.config as config
    from torch._dynamo.device_interface import CudaInterface
    from torch.utils import _triton as triton_support
    from triton.runtime import driver

    properties = device.properties()

    def capability(index: Any = None) -> tuple[int, int]:
        return device.capability

    patches: list[tuple[Any, str, Any]] = [
        (CudaInterface.Worker, "get_device_properties", staticmethod(lambda index=None: properties)),
        (CudaInterface.Worker, "current_device", staticmethod(lambda: 0)),
        (CudaInterface, "get_device_properties", staticmethod(lambda index=None: properties)),
        (CudaInterface, "get_compute_capability", staticmethod(lambda index=None: 10 * properties.major + properties.minor)),
        (CudaInterface, "current_device", staticmethod(lambda: 0)),
        (CudaInterface, "is_available", staticmethod(lambda: True)),
        (torch.cuda, "get_device_properties", lambda index=None: properties),
        (torch.cuda, "get_device_capability", capability),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "synchronize", lambda *args: None),
        (torch.version, "hip", "6.4" if device.backend == "hip" else None),
        # torch remembers its answer, which would outlive the device.
        (triton_support, "has_triton", lambda: True),
        (inductor, "constant", _fake_constant),
    ]
    before = driver._active
    with ExitStack() as stack:
        for target, name, value in patches:
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(mock.patch.dict(os.environ, {"ROSA_FX_TRITON": "1"}))
        stack.enter_context(config.patch(fx_graph_cache=False, compile_threads=1, max_autotune_gemm=True))
        driver.set_active(_driver(device))
        try:
            yield
        finally:
            driver._active = before


def _fake_constant(data: Tensor, device: torch.device) -> Any:
    """`inductor.constant`, whose data a fake device cannot hold: an input of that shape."""
    from torch._inductor.virtualized import V

    with V.fake_mode:
        return V.graph.add_tensor_constant(torch.empty(data.shape, dtype=data.dtype, device=device))


Choose = Callable[[str, Sequence[Any]], Any]


@contextmanager
def choosing(choose: Choose) -> Iterator[None]:
    """Within, `choose(name, choices)` takes the place of Inductor's timing."""
    from torch._inductor.select_algorithm import AlgorithmSelectorCache

    def select(self: Any, name: str, choices: Sequence[Any], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        choice = choose(name, choices)
        return choice.output_node(), choice

    with mock.patch.object(AlgorithmSelectorCache, "__call__", select):
        yield


def is_template(choice: Any) -> bool:
    """Whether a choice is a Triton template (of ours, where the name of the product says so), not a library's product."""
    from torch._inductor.select_algorithm import TritonTemplateCaller

    return isinstance(choice, TritonTemplateCaller)


def generate(function: Callable[..., Any], make_arguments: Callable[[], Sequence[Tensor]], choose: Choose) -> str:
    """The Python module that Inductor generates for `function` on the device that is `present`.

    `make_arguments()` returns tensors on "cuda"; it runs under fake tensors.
    """
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        arguments = make_arguments()
        module = make_fx(function, select_decomp_table(), tracing_mode="fake")(*arguments)
    graph = GraphLowering(module)
    with V.set_graph_handler(graph), V.set_fake_mode(mode), V.set_debug_handler(DebugContext()), choosing(choose):
        graph.run(*arguments)
        code = graph.codegen()[0]
    return str(getattr(code, "value", code))


@contextmanager
def inductor_mm(options: dict[str, Any]) -> Iterator[None]:
    """Within, products are Inductor's own `mm` template with these options (BLOCK_M, ..., num_warps, num_stages)."""
    from torch._inductor import lowering
    from torch._inductor.ir import FixedLayout
    from torch._inductor.kernel.mm import mm_template
    from torch._inductor.select_algorithm import autotune_select_algorithm

    def product(left: Any, right: Any) -> Any:
        left, right = inductor.realize(left, right)
        layout = FixedLayout(left.get_device(), left.get_dtype(), [left.get_size()[0], right.get_size()[1]])
        choices: list[Any] = []
        error = mm_template.maybe_append_choice(choices, input_nodes=(left, right), layout=layout, **options)
        if error is not None:
            raise error
        node, _ = autotune_select_algorithm("mm", choices, [left, right], layout)
        return node

    with mock.patch.dict(lowering.lowerings, {torch.ops.aten.mm.default: product}):
        yield


@dataclass(frozen=True)
class Kernel:
    """One Triton kernel of a generated module: its name, its source, and the grid that it is launched with."""

    name: str
    source: str
    grid: tuple[int, ...]

    @property
    def is_template(self) -> bool:
        return "_tem_" in self.name

    @property
    def file(self) -> str:
        """The file that line tables name; `source` is its text."""
        return f"{self.name}.py"

    def constants(self) -> dict[str, str]:
        """`NAME : tl.constexpr = value` at the head of a template."""
        return dict(re.findall(r"^\s+(\w+) : tl\.constexpr = (.+)$", self.source, re.MULTILINE))


def kernels(module: str) -> list[Kernel]:
    """The Triton kernels of a generated module, in order."""
    found = []
    for body in re.findall(r"async_compile\.triton\('\w+', '''(.*?)'''", module, re.DOTALL):
        match = re.search(r"def (triton_\w+)\(", body)
        assert match is not None
        name = match.group(1)
        launch = re.search(rf"{name}\.run\(.*?, (\d+), (\d+), (\d+), stream=", module)
        found.append(Kernel(name, body, tuple(int(size) for size in launch.groups()) if launch else ()))
    return found


@dataclass(frozen=True)
class Compiled:
    """What Triton made of a kernel: text and binaries by name of the stage, shared memory in bytes."""

    stages: dict[str, Any]
    shared: int
    warps: int
    pipeline: int


@dataclass(frozen=True)
class Launched(Kernel):
    """A `triton.jit` function that Python launches: `signature` by argument, `values` of those that are constants, and the
    names of those that are multiples of 16, as Triton finds out when it is called."""

    function: Any = None
    signature: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    divisible: frozenset[str] = frozenset()
    options: dict[str, Any] = field(default_factory=dict)
    tile: tuple[int, int, int] = (0, 0, 0)

    @property
    def file(self) -> str:
        return Path(self.function.fn.__code__.co_filename).name

    def constants(self) -> dict[str, str]:
        """The tile by the names that templates have for it."""
        return {f"BLOCK_{axis}": str(size) for axis, size in zip("MNK", self.tile, strict=True)}


def compile_kernel(kernel: Kernel, device: Device, folder: Path) -> Compiled:
    """Compile for `device`, which must be `present`. Source that was generated is written into `folder` first."""
    import triton
    from triton.backends.compiler import GPUTarget

    source, options = _launched(kernel) if isinstance(kernel, Launched) else _generated(kernel, device, folder)
    target = GPUTarget(device.backend, device.arch, device.warp_size)
    compiled = triton.compile(source, target=target, options=options)
    return Compiled(dict(compiled.asm), int(compiled.metadata.shared), options["num_warps"], options["num_stages"])


def _launched(kernel: Launched) -> tuple[Any, dict[str, Any]]:
    import triton

    places = {name: place for place, name in enumerate(kernel.signature)}
    attributes = {(places[name],): [["tt.divisibility", 16]] for name in kernel.divisible}
    return triton.compiler.ASTSource(kernel.function, kernel.signature, kernel.values, attributes), dict(kernel.options)


def _generated(kernel: Kernel, device: Device, folder: Path) -> tuple[Any, dict[str, Any]]:
    import triton

    path = folder / kernel.file
    path.write_text(kernel.source, encoding="utf-8")
    scope: dict[str, Any] = {"__name__": kernel.name, "__file__": str(path)}
    with mock.patch("torch._inductor.runtime.triton_helpers.set_driver_to_gpu", return_value=None):
        exec(compile(kernel.source, str(path), "exec"), scope)
    heuristic = scope[kernel.name]
    config, meta = heuristic.configs[0], heuristic.triton_meta
    constants = {**meta.get("constants", {}), **config.kwargs}
    signature = {name: "constexpr" if name in constants else kind for name, kind in meta["signature"].items()}
    used = {name: value for name, value in constants.items() if name in signature}
    source = triton.compiler.ASTSource(heuristic.fn, signature, used, dict(meta["configs"][0]))
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if device.backend == "hip":
        names = {"matrix_instr_nonkdim", "waves_per_eu", "kpack"}
        options |= {name: value for name, value in config.kwargs.items() if name in names}
    return source, options
