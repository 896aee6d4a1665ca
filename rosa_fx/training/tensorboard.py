"""The rows of metrics.jsonl as TensorBoard scalars, where TensorBoard is installed."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rosa_fx.errors import RosaError

# Name in TensorBoard of each figure of a step.
_SCALARS = {
    "loss": "loss/train",
    "lr": "rate/low_rank",
    "lr_sparse": "rate/sparse",
    "grad_norm": "gradient/norm",
    "tokens_per_s": "speed/tokens_per_s",
    "rss": "memory/resident_bytes",
    "device_memory": "memory/device_bytes",
}


class TensorBoardLog:
    """Writes into `folder`, from `step` on: what an earlier part of the run wrote after `step` is not shown any more.

    Args: wanted: "auto": only where TensorBoard is installed; True: RosaError where it is not; False: never.
    """

    def __init__(self, folder: Path | None, wanted: bool | Literal["auto"], step: int) -> None:
        self._writer: Any = None
        if wanted is False or folder is None:
            return
        if importlib.util.find_spec("tensorboard") is None:
            if wanted is True:
                raise RosaError('TrainConfig.tensorboard is True: pip install tensorboard, or use "auto"')
            return
        from torch.utils.tensorboard import SummaryWriter

        try:
            self._writer = SummaryWriter(str(folder), purge_step=step + 1)
        except OSError as error:
            raise RosaError(f"could not write {folder}: {error}; free space or set TrainConfig.tensorboard=False") from error

    def add(self, row: Mapping[str, Any]) -> None:
        """One row; figures that are null are left out."""
        if self._writer is None:
            return
        names = _SCALARS if row["event"] == "step" else {"loss": "loss/held_out"}
        for key, name in names.items():
            if row.get(key) is not None:
                self._writer.add_scalar(name, row[key], row["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
