"""Every use of torch._inductor's private interface, in one place: torch 2.13 promises none of it to the next release."""

from __future__ import annotations

import ctypes
import hashlib
import platform
from collections.abc import Callable, Sequence
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
