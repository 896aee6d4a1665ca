"""Runs in a process of their own that is killed, told to stop, or denied the disk; what resumes equals what never stopped."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kill_server import Server

from rosa_fx.training import read_metrics

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
TIMES = {"seconds", "tokens_per_s", "rss"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """Contents of the run that nobody disturbs, and the server's answer: seconds and changes to files."""
    return undisturbed(server, tmp_path_factory.mktemp("whole"))


def undisturbed(server: Server, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    answers = [server.run(folder / name) for name in ("a", "b")]
    assert [answer["status"] for answer in answers] == [0, 0], answers
    assert contents(folder / "a") == contents(folder / "b")
    return contents(folder / "a"), answers[1]


def contents(out: Path) -> dict[str, Any]:
    """All that a run leaves but times: digests of every tensor file (adapter, best adapter, optimizer, random state,
    losses, collected gradients), the state of the last checkpoints, and the rows of the metrics."""
    found: dict[str, Any] = {}
    for file in sorted(path for path in out.rglob("*") if path.is_file()):
        name = str(file.relative_to(out))
        if file.name in ("run.json", "manifest.json"):  # the first has the time of day, the second digests of times
            continue
        if file.name == "state.json":
            found[name] = {key: value for key, value in json.loads(file.read_text()).items() if key not in TIMES}
        elif file.name == "metrics.jsonl":
            found[name] = [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(file)]
        else:
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def resume_and_compare(server: Server, out: Path, expected: dict[str, Any]) -> None:
    answer = server.run(out)
    assert answer["status"] == 0, answer
    found = contents(out)
    assert found.keys() == expected.keys()  # nothing half-written stays either
    for name, value in expected.items():
        assert found[name] == value, name


def test_what_is_compared_is_the_whole_run(whole: tuple[dict[str, Any], dict[str, Any]]) -> None:
    files = whole[0]
    groups = ("adapter", "optimizer", "schedule", "random", "buffers", "metrics")
    assert {f"checkpoints/step-9/{group}.safetensors" for group in groups} <= files.keys()
    assert {"adapter/adapter_model.safetensors", "best/adapter_model.safetensors", "best/evaluation.json"} <= files.keys()
    steps = [row for row in files["metrics.jsonl"] if row["event"] == "step"]
    assert [row["phase"] for row in steps] == ["low_rank"] * 2 + ["collect"] * 2 + ["joint"] * 5


def test_a_run_killed_again_and_again_ends_as_if_it_never_was(
    server: Server, whole: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    expected, answer = whole
    moments = random.Random(6)
    killed = 0
    while killed < 6:
        status = server.run(tmp_path, kill_after=moments.uniform(0, 0.6) * answer["seconds"])["status"]
        assert status in (0, -signal.SIGKILL)
        if status == 0:  # it came to its end: kill another one
            resume_and_compare(server, tmp_path, expected)
            tmp_path = tmp_path / "next"
        killed += status != 0
    resume_and_compare(server, tmp_path, expected)


@pytest.mark.parametrize("share", [0.0, 0.37, 0.71, 0.99])
def test_killed_between_two_changes_to_files(
    server: Server, whole: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path, share: float
) -> None:
    """0: when the first file, run.json, is written but not yet in its place."""
    expected, answer = whole
    event = 3 + int(share * (answer["events"] - 3))
    assert server.run(tmp_path / "run", kill_at_event=event)["status"] == -signal.SIGKILL
    if not share:
        assert [path.name.rpartition("-")[0] for path in (tmp_path / "run").iterdir()] == [".run.json.new"]
    resume_and_compare(server, tmp_path / "run", expected)


def test_an_evaluation_that_came_after_its_checkpoint_is_not_told_twice(
    server: Server, whole: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    """Stopped in the evaluation after step 3; resumed, evaluated, and killed before the next checkpoint."""
    assert server.run(tmp_path, signals_at_call=[[signal.SIGTERM, 8]])["status"] == 143
    assert server.run(tmp_path, signals_at_call=[[signal.SIGKILL, 3]])["status"] == -signal.SIGKILL
    resume_and_compare(server, tmp_path, whole[0])


@pytest.mark.parametrize("call", [7, 11])
def test_killed_while_gradients_are_collected(
    server: Server, whole: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path, call: int
) -> None:
    """In the first collecting step, and in the second one with gradients of both in the sums."""
    assert server.run(tmp_path, signals_at_call=[[signal.SIGKILL, call]])["status"] == -signal.SIGKILL
    resume_and_compare(server, tmp_path, whole[0])


@pytest.mark.parametrize("how", [{"full_from_event": 1}, {"full_from_event": 70}, {"file_size": 1500}])
def test_a_full_disk_is_an_error_and_costs_nothing_that_was_written(
    server: Server, whole: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path, how: dict[str, int]
) -> None:
    answer = server.run(tmp_path / "run", **how)
    assert answer["status"] == 1, answer
    reason = "File too large" if "file_size" in how else "No space left on device"
    assert "could not write" in answer["error"]
    assert reason in answer["error"]
    assert str(tmp_path) in answer["error"]
    resume_and_compare(server, tmp_path / "run", whole[0])


@pytest.mark.parametrize(("mode", "said"), [(0o555, "could not write"), (0o000, "cannot be used")])
def test_a_folder_that_may_not_be_written_to_is_an_error(server: Server, mode: int, said: str) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is hidden from other users
        os.chmod(folder, mode)
        answer = server.run(Path(folder) / "run", nobody=os.geteuid() == 0)  # root may write everywhere
        os.chmod(folder, 0o755)
        assert not list(Path(folder).iterdir())
    assert answer["status"] == 1, answer
    assert said in answer["error"]
    assert "Permission denied" in answer["error"]


@pytest.mark.parametrize(
    ("signals", "status", "said"),
    [
        ([[signal.SIGTERM, 10]], 143, "interrupted after step 4: continue with resume=True"),
        ([[signal.SIGINT, 10]], 130, "interrupted after step 4: continue with resume=True"),
        ([[signal.SIGTERM, 10], [signal.SIGTERM, 11]], 143, "interrupted after step 4"),
        ([[signal.SIGTERM, 8]], 143, "interrupted after step 3"),  # within an evaluation, which is made again
        # The second one ends it on the spot, in the middle of collecting: what counts is the checkpoint before.
        ([[signal.SIGINT, 10], [signal.SIGINT, 11]], 130, "stopped at once after step 3: continue with resume=True"),
        ([[signal.SIGINT, 1]], 130, "interrupted after step 0, before the first checkpoint"),
    ],
)
def test_signals_end_a_run_in_order(
    server: Server,
    whole: tuple[dict[str, Any], dict[str, Any]],
    tmp_path: Path,
    signals: list[list[int]],
    status: int,
    said: str,
) -> None:
    """Calls of the loss function: 1 and 2 evaluate, 3 to 7 make the steps 1 to 3, 8 and 9 evaluate, 10 and 11 make step 4."""
    answer = server.run(tmp_path, signals_at_call=signals)
    assert answer["status"] == status, answer
    assert said in answer["error"]
    steps = [int(path.name.removeprefix("step-")) for path in (tmp_path / "checkpoints").glob("step-*")]
    assert max(steps, default=0) == int(said.split("after step ")[1][0])
    resume_and_compare(server, tmp_path, whole[0])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_random_moments(server: Server, whole: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path) -> None:
    """Each in a run of its own, killed once; then compared in full."""
    expected, answer = whole
    moments = random.Random(20)
    for number in range(20):
        out = tmp_path / str(number)
        while server.run(out, kill_after=moments.uniform(0, 1) * answer["seconds"])["status"] == 0:
            out = out / "again"
        resume_and_compare(server, out, expected)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_fifth_change_to_a_file(server: Server, whole: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path) -> None:
    expected, answer = whole
    for event in range(1, answer["events"] + 1, 5):
        for kind, status in (("kill_at_event", -signal.SIGKILL), ("full_from_event", 1)):
            found = server.run(tmp_path / kind / str(event), **{kind: event})
            # On a full disk old files can still be removed, so a run may have nothing left to write.
            assert found["status"] == status or (kind == "full_from_event" and found["status"] == 0), found
            resume_and_compare(server, tmp_path / kind / str(event), expected)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_compiled_run_is_killed(tmp_path: Path) -> None:
    server = Server(compiled=True)
    try:
        expected, answer = undisturbed(server, tmp_path)
        moments = random.Random(4)
        for number in range(4):
            out = tmp_path / f"killed-{number}"
            assert server.run(out, kill_after=moments.uniform(0.3, 0.9) * answer["seconds"])["status"] == -signal.SIGKILL
            resume_and_compare(server, out, expected)
    finally:
        server.close()
