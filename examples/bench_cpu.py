"""Speed and memory of QRoSA on the CPU, against PEFT, bitsandbytes and the floor: a frozen dense linear.

    python examples/bench_cpu.py                     # everything (the better part of an hour on two cores)
    python examples/bench_cpu.py --check             # the same; exits with 1 where a bar is missed twice in a row
    python examples/bench_cpu.py layer --rows 512    # one part; --help lists its options

All peers run in one process, interleaved, under the same allocator setting; the tables hold medians and quartiles of the
ratio to the floor *of the same round*. Outputs and gradients are compared with float64 before anything is timed.
Each part writes <out>/<part>.csv, .md and .png. Needs the extra `bench`: pip install -e ".[bench]"
"""

from __future__ import annotations

import os

# Spinning threads cost 5 to 20 times outliers where cores are shared; read once, when OpenMP starts.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks.app import app

if __name__ == "__main__":
    app()
