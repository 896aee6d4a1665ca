"""What tests of several processes share: run a function in two gloo processes, with a limit so that a hang is a failure."""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 240


def together(function: Callable[..., Any], *arguments: Any, size: int = 2) -> list[Any]:
    """`function(rank, *arguments)` of a test module in `size` processes of one group; what each returned, by rank.

    An exception comes back as its text, `"RosaError: ..."`.
    """
    with TemporaryDirectory() as folder:
        (Path(folder) / "arguments").write_bytes(pickle.dumps(arguments))
        name = f"{Path(function.__code__.co_filename).stem}:{function.__name__}"
        command = [sys.executable, str(Path(__file__)), name, folder, str(size)]
        variables = {
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        running = [
            subprocess.Popen(
                [*command, str(rank)], env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            for rank in range(size)
        ]
        try:
            printed = [process.communicate(timeout=LIMIT)[0] for process in running]
        finally:
            for process in running:
                process.kill()
        for rank, process in enumerate(running):
            assert process.returncode == 0, f"rank {rank}: {printed[rank]}"
        return [pickle.loads((Path(folder) / f"result-{rank}").read_bytes()) for rank in range(size)]


def main() -> None:
    name, folder, size, rank = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    import importlib

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    module, _, function = name.partition(":")
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    arguments = pickle.loads((folder / "arguments").read_bytes())
    try:
        result = getattr(importlib.import_module(module), function)(rank, *arguments)
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
        if not isinstance(error, ValueError):
            raise
    (folder / f"result-{rank}").write_bytes(pickle.dumps(result))
    if size > 1:
        gc.collect()  # a DistributedDataParallel that outlives the group takes it apart with Python's lock held, and may hang
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
