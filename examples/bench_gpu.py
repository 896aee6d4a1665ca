"""Time one linear layer on your GPU: python examples/bench_gpu.py [--shapes 4096x4096 ...] [--rows 1 16 2048] [--out bench.csv]

Per shape [N, K] and number of rows M, forward alone and forward with backward, interleaved. What is timed is the GPU: the
host's part, which models hide by running ahead or by CUDA graphs, is not in it.

    dense             F.linear with a frozen weight: what everything else is compared with
    bitsandbytes+peft Linear4bit (NF4) with PEFT's LoRA of the same rank; it has no sparse part
    rosa_fx composed  torch.compile with ROSA_FX_TRITON=0: one dequantised weight, then the vendor's GEMM, by separate calls
    rosa_fx triton    torch.compile: kernels that decode in the GEMM's loop or into a scratch buffer, as the heuristics choose
    rosa_fx autotuned the same, where Inductor times the candidates first (only with --autotune)

Before anything is timed every contender's results are compared with float64. The column error_ratio is its RMS error over that
of the plain computation in the same dtype; a rosa_fx contender above 1.1 is not timed, and the exit status is 1.
`--device cpu` runs everything but the Triton kernels, for a trial.
"""

import argparse
import csv
import importlib.metadata
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import bitsandbytes
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rosa_fx

LLAMA = ["4096x4096", "11008x4096", "4096x11008", "8192x8192", "28672x8192"]
ERROR_LIMIT = 1.1
# Cycles, some 5 ms: longer than the host takes for the calls of a pass.
HEAD_START = 10_000_000
# Results and activations of this many rows are compared with float64.
CHECKED_ROWS = 256


@dataclass
class Layer:
    """Operands of one layer, and x [M, K] and the gradient dy [M, N] that it is run with. `mask` bool [N, K]."""

    weight: Tensor
    A: Tensor
    B: Tensor
    values: Tensor
    mask: Tensor
    x: Tensor
    dy: Tensor
    scale: float
    density: float


@dataclass
class Contender:
    """`module(x)` gives y; `parameters` get gradients. `sparse`: whether it computes the sparse part, `adapted`: any part."""

    name: str
    module: Callable[[Tensor], Tensor]
    parameters: list[Tensor]
    base: Tensor
    adapted: bool = True
    sparse: bool = True
    judged: bool = True
    error_ratio: float = float("nan")
    times: dict[str, list[float]] = field(default_factory=lambda: {"forward": [], "forward+backward": []})

    def forward(self, layer: Layer) -> Tensor:
        with torch.no_grad():
            return self.module(layer.x)

    def backward(self, layer: Layer) -> tuple[Tensor, list[Tensor]]:
        """y, and the gradients of x and of the parameters."""
        y = self.module(layer.x)
        return y, list(torch.autograd.grad(y, [layer.x, *self.parameters], layer.dy))


def make_layer(n: int, k: int, m: int, rank: int, density: float, dtype: torch.dtype, device: str) -> Layer:
    generator = torch.Generator(device).manual_seed(0)

    def randn(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    count = int(density * n * k)
    mask = torch.zeros(n * k, dtype=torch.bool, device=device)
    mask[torch.randperm(n * k, generator=generator, device=device)[:count]] = True
    return Layer(
        weight=(randn(n, k) * k**-0.5).to(dtype),
        A=randn(rank, k) * k**-0.5,
        B=randn(n, rank) * 0.1,
        values=randn(count) * 0.1 * k**-0.5,
        mask=mask.view(n, k),
        x=randn(m, k, dtype=dtype).requires_grad_(),
        dy=randn(m, n, dtype=dtype),
        scale=16 / rank,
        density=density,
    )


def dense(layer: Layer) -> Contender:
    return Contender("dense", lambda x: F.linear(x, layer.weight), [], layer.weight, adapted=False, judged=False)


def peft(layer: Layer) -> Contender:
    """Raises ImportError where PEFT is not installed."""
    from peft import LoraConfig, get_peft_model

    n, k = layer.weight.shape
    linear = bitsandbytes.nn.Linear4bit(
        k, n, bias=False, compute_dtype=layer.x.dtype, quant_type="nf4", compress_statistics=False
    )
    linear.weight = bitsandbytes.nn.Params4bit(
        layer.weight.clone().cpu(), requires_grad=False, quant_type="nf4", compress_statistics=False
    )
    rank = layer.A.shape[0]
    config = LoraConfig(r=rank, lora_alpha=16, target_modules=["0"], lora_dropout=0.0)
    model = get_peft_model(nn.Sequential(linear).to(layer.x.device), config)  # type: ignore[arg-type]
    adapter = model.base_model.model[0]
    parameters = [adapter.lora_A["default"].weight, adapter.lora_B["default"].weight]
    with torch.no_grad():
        parameters[0].copy_(layer.A)
        parameters[1].copy_(layer.B)
    state = adapter.base_layer.weight.quant_state
    base = bitsandbytes.functional.dequantize_4bit(adapter.base_layer.weight.data, state).to(layer.x.dtype)
    return Contender("bitsandbytes+peft", model, parameters, base, sparse=False, judged=False)


def rosa(layer: Layer, name: str, **compile_options: bool) -> Contender:
    """Dynamo takes what it compiled for a model of the same structure, unless the options differ: give each its own."""
    n, k = layer.weight.shape
    model = nn.Sequential(nn.Linear(k, n, bias=False, device=layer.x.device, dtype=layer.x.dtype))
    with torch.no_grad():
        model[0].weight.copy_(layer.weight)
    spec = rosa_fx.RosaSpec(base="nf4", rank=layer.A.shape[0], alpha=16.0, density=layer.density, targets=("0.weight",))
    rosa_fx.transform(model, spec)
    if layer.values.numel():
        rosa_fx.set_masks(model, {"0.weight": layer.mask})
    rosa_fx.adapter(model, "0.weight").set_phase("joint")
    state = rosa_fx.adapter_state(model)
    with torch.no_grad():
        for key, value in (("low_rank.A", layer.A), ("low_rank.B", layer.B), ("sparse.values", layer.values)):
            if f"0.weight.{key}" in state:
                state[f"0.weight.{key}"].copy_(value)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    base = rosa_fx.base_weight(model, "0.weight").detach().to(layer.x.dtype)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, options=dict(compile_options))
    return Contender(name, compiled, parameters, base, sparse=layer.values.numel() > 0)


def effective(contender: Contender, layer: Layer, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """D + S and s B A of what the contender computes, in `dtype`."""
    base = contender.base.to(dtype)
    if contender.adapted and contender.sparse:
        base = base.clone()
        base[layer.mask] += layer.values.to(dtype)
    return base, layer.B.to(dtype) * layer.scale


def error_ratio(contender: Contender, layer: Layer) -> float:
    """The largest RMS error of y, dx, dA, dB and dS over that of the plain computation in x's dtype, both against float64."""
    y, (dx, *grads) = contender.backward(layer)
    rows = slice(0, CHECKED_ROWS)
    low = layer.x.dtype

    def products(dtype: torch.dtype) -> list[Tensor]:
        x, dy, A = layer.x.detach().to(dtype), layer.dy.to(dtype), layer.A.to(dtype)
        base, B = effective(contender, layer, dtype)
        if not contender.adapted:
            return [x[rows] @ base.t(), dy[rows] @ base]
        # The plain computation rounds W + S and each product, as adapter libraries do.
        found = [x[rows] @ base.t() + (x[rows] @ A.t()) @ B.t(), dy[rows] @ base + (dy[rows] @ B) @ A]
        found += [(dy @ B).t() @ x, layer.scale * (dy.t() @ (x @ A.t()))]
        if contender.sparse:
            # A few thousand entries are enough, and the dense gradient does not fit everywhere.
            at_row, at_column = layer.mask.nonzero(as_tuple=True)
            some = torch.arange(0, at_row.numel(), max(1, at_row.numel() // 2000), device=x.device)
            found.append((dy[:, at_row[some]] * x[:, at_column[some]]).sum(0))
        return found

    exact = products(torch.float64)
    ours = [y.detach()[rows], dx[rows], *grads]
    if contender.adapted and contender.sparse:
        ours[-1] = ours[-1][:: max(1, ours[-1].numel() // 2000)]

    def rms(result: Tensor, want: Tensor) -> float:
        return float((result.double() - want).square().mean().sqrt())

    ratios = []
    for got, want, usual in zip(ours, exact, products(low), strict=True):
        # A result in float32 may be better than the plain one by far, but no result beats its own rounding.
        rounding = want.square().mean().sqrt().item() * torch.finfo(got.dtype).eps / 4
        ratios.append(rms(got, want) / max(rms(usual, want), rounding))
    return max(ratios)


def measure(contenders: list[Contender], layer: Layer, repeats: int) -> None:
    """Milliseconds of every contender in turn, `repeats` times, with the caches of the GPU overwritten in between.

    Of the GPU's own time: it is kept busy until the host has enqueued all of a pass.
    """
    cuda = layer.x.is_cuda
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=layer.x.device) if cuda else None
    for repeat in range(repeats):
        order = contenders[repeat % len(contenders) :] + contenders[: repeat % len(contenders)]
        for name in ("forward", "forward+backward"):
            for contender in order:
                run = contender.forward if name == "forward" else contender.backward
                if flush is not None:
                    flush.zero_()
                    torch.cuda._sleep(HEAD_START)
                    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    start.record()
                    run(layer)
                    stop.record()
                    stop.synchronize()
                    contender.times[name].append(start.elapsed_time(stop))
                else:
                    begin = time.perf_counter()
                    run(layer)
                    contender.times[name].append(1e3 * (time.perf_counter() - begin))


def profile(contender: Contender, layer: Layer) -> None:
    """Print what the GPU spends forward with backward on, by kernel, to standard error."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    times = 10
    with record(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(times):
            contender.backward(layer)
        torch.cuda.synchronize()
    spent = [(row.device_time_total / times, row.count / times, row.key) for row in seen.key_averages()]
    print(f"{contender.name}: {sum(us for us, _, _ in spent):.1f} us in kernels", file=sys.stderr)
    for us, count, name in sorted(spent, reverse=True):
        if us:
            print(f"{us:10.1f} us  {count:3.0f}x  {name[:100]}", file=sys.stderr)


def machine(device: str) -> dict[str, str]:
    """Name of the GPU, driver and versions: the first columns of every line."""
    driver = "none"
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
        except (OSError, subprocess.CalledProcessError):
            driver = "unknown"
    found = {"gpu": torch.cuda.get_device_name() if device == "cuda" else "cpu", "driver": driver}
    for package in ("torch", "triton", "bitsandbytes", "peft", "rosa-fx"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found | {"cuda": str(torch.version.cuda or torch.version.hip or "none")}


def build(layer: Layer, device: str, autotune: bool) -> tuple[list[Contender], dict[str, str]]:
    """The contenders, and why others are missing. Each is run once, so that nothing is compiled later."""
    found, missing = [dense(layer)], {}
    try:
        found.append(peft(layer))
    except ImportError as error:
        missing["bitsandbytes+peft"] = f"pip install peft ({error})"
    # Lowerings stay once they are registered, so what does without them is compiled first, in both directions.
    os.environ["ROSA_FX_TRITON"] = "0"
    found.append(rosa(layer, "rosa_fx composed"))
    found[-1].forward(layer), found[-1].backward(layer)
    if device != "cuda":
        missing["rosa_fx triton"] = "Triton kernels need a GPU"
        return found, missing
    os.environ["ROSA_FX_TRITON"] = "1"
    found.append(rosa(layer, "rosa_fx triton", epilogue_fusion=True))
    if autotune:
        found.append(rosa(layer, "rosa_fx autotuned", max_autotune=True))
    for contender in found:
        contender.forward(layer), contender.backward(layer)
    return found, missing


def bench(arguments: argparse.Namespace, n: int, k: int, m: int) -> list[dict[str, str]]:
    """The lines of one shape and number of rows. Run in a process of its own: see `main`."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[arguments.dtype]
    layer = make_layer(n, k, m, arguments.rank, arguments.density, dtype, arguments.device)
    contenders, missing = build(layer, arguments.device, arguments.autotune)
    problem = {"n": n, "k": k, "m": m, "dtype": arguments.dtype, "rank": arguments.rank, "density": arguments.density}
    head = machine(arguments.device) | {key: str(value) for key, value in problem.items()}
    lines = [head | {"contender": name, "note": why} for name, why in missing.items()]
    timed = []
    for contender in contenders:
        contender.error_ratio = error_ratio(contender, layer)
        if contender.judged and not contender.error_ratio <= ERROR_LIMIT:
            note = f"wrong: {contender.error_ratio:.3g} times the error of the plain computation"
            lines.append(head | {"contender": contender.name, "error_ratio": f"{contender.error_ratio:.3f}", "note": note})
        else:
            timed.append(contender)
    if arguments.profile:
        for contender in timed:
            profile(contender, layer)
    measure(timed, layer, 3)
    for contender in timed:
        contender.times = {name: [] for name in contender.times}
    measure(timed, layer, arguments.repeats)
    for name in ("forward", "forward+backward"):
        floor = statistics.median(timed[0].times[name])
        for contender in timed:
            low, median, high = statistics.quantiles(contender.times[name], n=4)
            lines.append(
                head
                | {
                    "contender": contender.name,
                    "pass": name,
                    "median_ms": f"{median:.4f}",
                    "quartile1_ms": f"{low:.4f}",
                    "quartile3_ms": f"{high:.4f}",
                    "times_dense": f"{median / floor:.3f}",
                    "error_ratio": f"{contender.error_ratio:.3f}",
                    "repeats": str(arguments.repeats),
                }
            )
    return lines


COLUMNS = ["gpu", "driver", "cuda", "torch", "triton", "bitsandbytes", "peft", "rosa-fx", "dtype", "rank", "density"]
COLUMNS += ["n", "k", "m", "contender", "pass", "median_ms", "quartile1_ms", "quartile3_ms", "times_dense"]
COLUMNS += ["error_ratio", "repeats", "note"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=LLAMA, metavar="NxK", help=f"weights [N, K] ({' '.join(LLAMA)})")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 256, 2048, 8192], metavar="M")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--density", type=float, default=0.006)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--autotune", action="store_true", help="also let Inductor time its candidates")
    parser.add_argument("--profile", action="store_true", help="also say which kernels the time goes into")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", default="bench_gpu.csv")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU that PyTorch can use; --device cpu makes a trial run")
    if arguments.profile and arguments.device != "cuda":
        parser.error("--profile needs a GPU")
    if arguments.repeats < 2 or arguments.rank < 1 or min(arguments.rows) < 1:
        parser.error("--repeats takes 2 or more, --rank and --rows take 1 or more")
    problems = []
    for shape in arguments.shapes:
        n, _, k = shape.partition("x")
        if not (n.isdigit() and k.isdigit() and int(n) and int(k)):
            parser.error(f"--shapes: {shape!r} is not NxK, for example 4096x11008")
        problems += [(int(n), int(k), m) for m in arguments.rows]
    if arguments.one:
        # A child: one problem, whose lines go to standard output.
        csv.DictWriter(sys.stdout, COLUMNS, restval="").writerows(bench(arguments, *problems[0]))
        return 0
    wrong = False
    with open(arguments.out, "w", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, COLUMNS).writeheader()
        for n, k, m in problems:
            options = [f"--{name}={getattr(arguments, name)}" for name in ("dtype", "rank", "density", "repeats", "device")]
            command = [sys.executable, __file__, "--one", *options, "--shapes", f"{n}x{k}", "--rows", str(m)]
            # Lowerings that a process has registered stay, so every problem starts afresh; memory is given back, too.
            child = subprocess.run(
                [*command, *["--autotune"] * arguments.autotune, *["--profile"] * arguments.profile],
                stdout=subprocess.PIPE,
                text=True,
                check=False,
            )
            if child.returncode:
                print(f"[{n}, {k}], M = {m}: failed, see above", file=sys.stderr)
                wrong = True
                continue
            file.write(child.stdout)
            file.flush()
            for line in csv.DictReader(child.stdout.splitlines(), COLUMNS):
                wrong = wrong or line["note"].startswith("wrong")
                shown = (
                    f"{line['pass']}: {line['median_ms']} ms, {line['times_dense']} × dense" if line["pass"] else line["note"]
                )
                print(f"[{n}, {k}], M = {m}, {line['contender']}, {shown}", flush=True)
    print(f"wrote {arguments.out}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
