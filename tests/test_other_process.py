"""The helper that runs Python in a process of its own."""

from __future__ import annotations

import psutil
import pytest
from other_process import run_python

WAITS = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("child", child.pid, flush=True)
child.wait()
"""


def test_what_waits_for_good_is_ended_with_its_children() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"not done after 3 s\nchild \d+") as raised:
        run_python("-c", WAITS, limit=3)
    pid = int(str(raised.value).split("child ")[-1].split()[0])
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_output_and_environment() -> None:
    done = run_python("-c", "import os, sys, rosa_fx; print(os.environ['WORD']); sys.exit('bad')", WORD="said")
    assert (done.returncode, done.stdout, done.stderr.strip().endswith("bad")) == (1, "said\n", True)
