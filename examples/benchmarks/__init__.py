"""The parts of `bench_cpu.py`."""
