"""A CPU on which Inductor generates Triton: kernels run on CPU tensors in Triton's interpreter.

Import this module before anything imports triton, in a process of its own, and call `install`: it registers a Triton backend
named "cpu", and points Inductor's CPU device at Triton. From then on `torch.compile(f)(cpu_tensors)` generates real Triton
source (pointwise kernels, reductions, templates with fused epilogues) and executes it. It is slow, numpy per program: keep
shapes small.
"""

from __future__ import annotations

import os
import sys
from typing import Any

if os.environ.get("TRITON_INTERPRET") != "1":
    assert "triton" not in sys.modules, "triton is imported already: the interpreter must be chosen before that"
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import torch._inductor.config as inductor_config
import triton
import triton.backends
import triton.language as tl
from triton.backends import Backend
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


class InterpreterCompiler(CUDABackend):
    """Inductor asks a backend for options and a hash; nothing is compiled."""

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return bool(target.backend == "cpu")

    def hash(self) -> str:
        return "interpreter"


class InterpreterDriver(DriverBase):
    """One device, "cpu", with the capability of an A100 and one stream."""

    def __init__(self) -> None:
        """Nothing to load: the base class would look for a GPU's tools."""

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", 0, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_device_capability(self, *args: Any) -> tuple[int, int]:
        return (8, 0)

    def set_current_device(self, device: Any) -> None:
        return None

    def get_benchmarker(self) -> Any:
        return lambda fn, **kwargs: [1.0, 1.0, 1.0]

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(1)

    def clear_cache(self, cache: Any) -> None:
        return None


class Libdevice:
    """libdevice is bitcode, which the interpreter cannot call: its functions by name from tl.math.

    They are looked up when they are called, because the interpreter patches tl.math only while a kernel runs.
    """

    def __getattr__(self, name: str) -> Any:
        return lambda *args: getattr(tl.math, name)(*args)

    @staticmethod
    def tanh(x: Any) -> Any:
        return 2.0 / (1.0 + tl.math.exp(-2.0 * x)) - 1.0


def round_and_multiply_bfloat16() -> None:
    """Give the interpreter bfloat16 as a GPU has it.

    It keeps bfloat16 as the bits in uint16: it cuts float32 off instead of rounding it to nearest even, and multiplies the bits
    of matrices as if they were integers.
    """
    cast, dot, convert = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot, InterpreterBuilder.create_fp_to_fp

    def widened(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def cast_impl(self: Any, src: TensorHandle, dst_type: Any) -> TensorHandle:
        wide = widened(src)
        if dst_type.scalar != tl.bfloat16 or src.dtype.scalar == tl.bfloat16:
            return cast(self, wide, dst_type)
        data = np.ascontiguousarray(cast(self, wide, tl.float32).data)
        rounded = torch.from_numpy(data).to(torch.bfloat16).view(torch.uint16)
        return TensorHandle(rounded.numpy().reshape(src.data.shape), tl.bfloat16)

    def create_fp_to_fp(self: Any, src: TensorHandle, dst_type: Any, rounding_mode: Any) -> TensorHandle:
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return cast_impl(self, src, dst_type)
        return convert(self, src, dst_type, rounding_mode)

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, *args: Any) -> TensorHandle:
        return dot(self, widened(a), widened(b), *args)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    InterpreterBuilder.create_dot = create_dot


def install() -> None:
    """From now on Inductor generates Triton for the CPU of this process."""
    round_and_multiply_bfloat16()
    from torch._inductor.graph import GraphLowering
    from torch._inductor.runtime import triton_helpers

    # Where a GPU kernel gets a pointer to a tensor without dimensions, one beside CPU tensors would get a number.
    GraphLowering.is_unspec_arg = lambda self, name: False
    triton.backends.backends["cpu"] = Backend(InterpreterCompiler, InterpreterDriver)
    triton.runtime.driver.set_active(InterpreterDriver())
    inductor_config.cpu_backend = "triton"
    inductor_config.compile_threads = 1
    triton_helpers.libdevice = Libdevice()
