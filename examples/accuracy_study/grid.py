"""Which runs a study makes, in which order: learning rates first, then more seeds at the best of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from accuracy_study.methods import BUDGETS, METHODS
from accuracy_study.results import Results, Row

LEARNING_RATES: dict[str, tuple[float, ...]] = {
    # The same number of trials for each. An entry of W moves by about the rate per step, an entry of B A by far less; entries
    # that gradients chose bear less than random ones.
    "full": (6e-5, 2e-5, 2e-4, 6e-4),
    "low-rank": (3e-3, 1e-3, 1e-2, 3e-4),
    "sparse, random mask": (3e-3, 1e-3, 3e-4, 1e-2),
    "sparse": (3e-4, 1e-3, 3e-3, 1e-4),
    "rosa": (3e-3, 1e-3, 1e-2, 3e-4),
}
SPARSE_SHARE = 0.3
"""The sparse values' rate over the low-rank factors', near the paper's 2e-4 over 7e-4 (arXiv 2401.04679, appendix)."""


@dataclass(frozen=True)
class Cell:
    """One row of the table: a method at a budget over a base, and the variant of the recipe, by its name there."""

    method: str
    budget: str
    base: str
    variant: str = ""

    def key(self, lr: float, seed: int, setting: Row) -> Row:
        share = SPARSE_SHARE if self.method.startswith("rosa") else 1.0
        key: Row = {"method": self.method, "budget": self.budget, "base": self.base, "lr": lr, "seed": seed}
        return {**key, "setting": setting, "sparse_share": share, **({"variant": self.variant} if self.variant else {})}

    @property
    def learning_rates(self) -> tuple[float, ...]:
        return next(rates for name, rates in LEARNING_RATES.items() if self.method.startswith(name))


def cells(methods: Sequence[str], budgets: Sequence[str], bases: Sequence[str], variant: str = "") -> list[Cell]:
    """In the order in which they are run. Full fine-tuning has neither a budget nor a frozen base: it is run once."""
    names = methods or [method.name for method in METHODS]
    unknown = {*names} - {method.name for method in METHODS} | {*budgets} - BUDGETS.keys()
    if unknown:
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; methods: {', '.join(m.name for m in METHODS)}")
    found = [
        Cell(name, "all", "keep") if name == "full" else Cell(name, budget, base, variant)
        for base in bases
        for budget in budgets
        for name in names
    ]
    return list(dict.fromkeys(found))


def next_runs(results: Results, wanted: Sequence[Cell], seeds: int, setting: Row) -> Iterator[Row]:
    """Runs that are still to be made, given those that are done; call again when they are.

    Cell by cell: runs of one cell share compiled graphs, and an interrupted study has whole cells.
    """
    for cell in wanted:
        if not cell.variant:
            yield from results.missing(cell.key(lr, 0, setting) for lr in cell.learning_rates)
        # A variant of the recipe is run at the rate that is best for the recipe itself.
        rate = best_rate(results, replace(cell, variant=""), setting)
        if rate is not None:
            yield from results.missing(cell.key(rate, seed, setting) for seed in range(seeds))


def trials(results: Results, cell: Cell, setting: Row) -> list[Row]:
    """Finished runs with seed 0."""
    keys = [cell.key(lr, 0, setting) for lr in cell.learning_rates]
    return [row for row in results.rows if row["key"] in keys]


def best_rate(results: Results, cell: Cell, setting: Row) -> float | None:
    """The learning rate of least held-out loss with seed 0; None until all have been tried."""
    tried = trials(results, cell, setting)
    if len(tried) < len(cell.learning_rates):
        return None
    return float(min(tried, key=lambda row: row["loss"])["key"]["lr"])
