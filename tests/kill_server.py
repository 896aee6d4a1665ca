"""A process that has loaded torch and forks a child for each training run, which may then be killed, starved or told to stop.

Requests come as JSON lines on standard input, answers go out as JSON lines. Nothing is computed before a fork, so that no
thread of a numerical library exists in the parent. `Server` is the other side, for the tests.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# How a run may end; `after`: seconds from its start; `event`: number of the change to its files; `call`: of the loss function.
HOW = ("kill_after", "kill_at_event", "full_from_event", "file_size", "signals_at_call", "nobody")
CHANGES = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove")


class Server:
    """Starts runs in a forked child: `run(out, **how)` gives {"status", "error", "seconds", "events"}."""

    def __init__(self, *, compiled: bool = False) -> None:
        environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
        root = Path(__file__).resolve().parent.parent
        environment["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "tests"), environment.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._compiled = compiled

    def run(self, out: Path, **how: Any) -> dict[str, Any]:
        """`status` is the exit code, or minus the signal; `error` the message of the exception, if any."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"out": str(out), "compiled": self._compiled, **how}) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    def close(self) -> None:
        self._process.kill()  # taking torch down in order takes seconds
        self._process.communicate()


def watch_files(request: dict[str, Any], counter: list[int]) -> None:
    """Count the changes to files of the run as Python announces them, before they happen, and act at the one asked for."""
    out = request["out"]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGES:
            return
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes, os.PathLike)) else ""
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        if os.path.isabs(path) and not path.startswith(out):
            return
        counter[0] += 1
        if counter[0] == request.get("kill_at_event"):
            os.kill(os.getpid(), signal.SIGKILL)
        full = request.get("full_from_event")
        if full and counter[0] >= full and event in ("open", "os.mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    sys.addaudithook(hook)


def train_once(request: dict[str, Any], counter: list[int]) -> None:
    import torch
    from training_models import config, make_data, make_model

    import rosa_fx

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits it ignored
    calls = [0]

    def loss_fn(model: Any, batch: Any) -> Any:
        calls[0] += 1
        for number, at in request.get("signals_at_call", []):
            if calls[0] == at:
                os.kill(os.getpid(), number)
        return model(**batch)["loss"]

    if request.get("nobody"):
        os.setuid(65534)
    if "file_size" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"], resource.RLIM_INFINITY))
    model = make_model(num_grads=2, schedule="wl2")
    fields = {"max_steps": 9, "gradient_accumulation": 2, "checkpoint_every": 1, "eval_every": 3, "restart": False}
    settings = config(**fields, compile=request["compiled"], bf16=False, tensorboard=False)
    watch_files(request, counter)
    out = Path(request["out"])
    rosa_fx.train(model, make_data(5), settings, eval_batches=make_data(2, seed=1), out=out, resume=True, loss_fn=loss_fn)
    rosa_fx.save_adapter(model, out / "adapter")


def child(request: dict[str, Any], answer: int) -> None:
    counter, status, error, began = [0], 0, "", time.perf_counter()
    os.write(answer, b"\n")
    try:
        train_once(request, counter)
    except SystemExit as stop:
        status, error = int(str(stop.code)), str(stop)
    except KeyboardInterrupt as stop:
        status, error = 130, str(stop)
    except ValueError as bad:  # RosaError is one
        status, error = 1, f"{type(bad).__name__}: {bad}"
    except BaseException as unexpected:
        status, error = 99, repr(unexpected)
    seconds = time.perf_counter() - began
    os.write(answer, json.dumps({"error": error, "seconds": seconds, "events": counter[0]}).encode())
    os._exit(status)


def serve() -> None:
    # Once for all children, torch's compiler included, which every optimizer and every transform loads.
    import training_models  # noqa: F401

    import rosa_fx.kernels.inductor
    import rosa_fx.training.trainer  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 1)
            child(request, writer)
        os.close(writer)
        os.read(reader, 1)  # it begins
        if "kill_after" in request:
            select.select([reader], [], [], request["kill_after"])
            os.kill(pid, signal.SIGKILL)
        text = b"".join(iter(lambda: os.read(reader, 1 << 16), b""))  # noqa: B023 - read to its end here
        os.close(reader)
        _, status = os.waitpid(pid, 0)
        answer = {"error": "", "events": 0, "seconds": 0.0, **(json.loads(text) if text else {})}
        print(json.dumps({**answer, "status": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    serve()
