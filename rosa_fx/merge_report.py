"""What `merge(into="same")` says of every weight."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class MergedWeight:
    """error: ‖T - T'‖ / ‖T‖ of the merged weight T = D(Q) + ΔW and what stands for it now, T'; lost: ‖T - T'‖ / ‖ΔW‖,
    above 1 where quantising hides the whole update. Frobenius norms. rank: of the refitted term."""

    name: str
    base: str
    error: float
    lost: float
    rank: int


@dataclass(frozen=True)
class MergeReport:
    """The merged `model`, and how near each weight is to the exact sum."""

    model: nn.Module
    weights: tuple[MergedWeight, ...]

    @property
    def error(self) -> float:
        """The largest `error` of all weights."""
        return max((weight.error for weight in self.weights), default=0.0)

    @property
    def lost(self) -> float:
        """The largest `lost` of all weights."""
        return max((weight.lost for weight in self.weights), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"weights": [asdict(weight) for weight in self.weights], "error": self.error, "lost": self.lost}

    def __str__(self) -> str:
        width = max([6, *(len(weight.name) for weight in self.weights)])
        lines = [f"{'weight':{width}}  base   rank  error of W  error of ΔW"]
        for w in self.weights:
            lines.append(f"{w.name:{width}}  {w.base:5}  {w.rank:4}  {w.error:10.2e}  {w.lost:11.2e}")
        return "\n".join(lines)
