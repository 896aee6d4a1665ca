"""The rewrite as Inductor knows it: a joint-graph pass with an identity for its caches."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from torch.fx import Graph

from rosa_fx.kernels import direct
from rosa_fx.kernels.inductor import CustomGraphPass, hash_files, triton_devices
from rosa_fx.kernels.lowering import register as register_lowerings
from rosa_fx.passes.joint import rewrite


@lru_cache(maxsize=1)
def source_files() -> tuple[str, ...]:
    """Every file whose text decides what a compiled graph does: passes, operators, lowerings, native code."""
    root = Path(__file__).resolve().parent.parent
    folders = [root / name for name in ("passes", "kernels")]
    files = [f for folder in folders for f in folder.rglob("*") if f.suffix in (".py", ".cpp", ".h", ".jinja")]
    return tuple(sorted(str(f) for f in files))


class RosaPass(CustomGraphPass):
    """`rewrite` as a joint-graph pass. Its identity covers the sources, so that an edit never meets a stale cache."""

    def __call__(self, graph: Graph) -> None:
        # Inductor lowers the graph next; nothing that imports it runs earlier.
        register_lowerings()
        direct.register()
        rewrite(graph)

    def uuid(self) -> bytes:
        # The same graph becomes other code where Triton kernels are asked for.
        return hash_files(source_files()) + bytes([triton_devices()])


ROSA_PASS = RosaPass()
