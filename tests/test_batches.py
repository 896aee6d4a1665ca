"""Micro-batches: their order, their repetition when a position is sought, their counts, and random streams."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rosa_fx import RosaError
from rosa_fx.training.batches import END, BatchSource, count_tokens, target_counter
from rosa_fx.training.rng import Stream, capture, restore, seed_all, untouched


def test_sequences_are_shuffled_from_seed_and_epoch() -> None:
    def epoch(source: BatchSource) -> list[int]:
        return list(iter(source.take, END))

    source = BatchSource(list(range(20)), seed=5)
    first = epoch(source)
    assert source.next_epoch()
    second = epoch(source)
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second != list(range(20))
    again = BatchSource(list(range(20)), seed=5)
    again.seek(1, 7)
    assert epoch(again) == second[7:]
    assert epoch(BatchSource(list(range(20)), seed=6)) != first


@pytest.mark.parametrize("own_generator", [False, True])
def test_loader_is_repeatable_and_leaves_the_random_state_alone(own_generator: bool) -> None:
    def loader() -> DataLoader:
        generator = torch.Generator() if own_generator else None
        return DataLoader(TensorDataset(torch.arange(12)), batch_size=2, shuffle=True, generator=generator)

    def rest(source: BatchSource) -> list[list[int]]:
        return [batch[0].tolist() for batch in iter(source.take, END)]

    before = torch.get_rng_state()
    source = BatchSource(loader(), seed=1)
    first = rest(source)
    source.next_epoch()
    second = rest(source)
    assert torch.equal(before, torch.get_rng_state())
    assert first != second
    torch.rand(3)
    again = BatchSource(loader(), seed=1)
    again.seek(1, 4)
    assert rest(again) == second[4:]


def test_an_iterator_is_one_pass_and_is_skipped_on_seek() -> None:
    source = BatchSource(iter(range(5)), seed=0)
    source.seek(0, 2)
    assert source.take() == 2
    assert not source.next_epoch()
    with pytest.raises(RosaError, match="cannot go back"):
        source.seek(0, 0)
    with pytest.raises(RosaError, match="pass the same data"):
        BatchSource(iter(range(3)), seed=0).seek(0, 4)


def test_random_augmentation_repeats_when_a_position_is_sought() -> None:
    class Noisy:
        def __iter__(self) -> Iterator[tuple[float, float, float]]:
            for _ in range(4):
                yield random.random(), float(np.random.rand()), float(torch.rand(()))

    source = BatchSource(Noisy(), seed=2)
    drawn = list(iter(source.take, END))
    torch.rand(5)
    again = BatchSource(Noisy(), seed=2)
    again.seek(0, 2)
    assert list(iter(again.take, END)) == drawn[2:]


@pytest.mark.parametrize(("batches", "message"), [([], "empty"), ({"a": 1}, "dict"), (torch.ones(2), "Tensor"), (3, "int")])
def test_unusable_batches(batches: Any, message: str) -> None:
    with pytest.raises(RosaError, match=message):
        BatchSource(batches, seed=0)


def test_target_and_token_counts() -> None:
    class TinyForCausalLM(nn.Module):
        loss_type = "ForCausalLM"

    labels = torch.tensor([[1, 2, -100], [-100, 4, 5]])
    assert target_counter(nn.Linear(1, 1))({"labels": labels}) == 4
    assert target_counter(TinyForCausalLM())({"labels": labels}) == 3
    assert target_counter(TinyForCausalLM())({"labels": torch.tensor([0, -100, 2])}) == 2
    assert target_counter(nn.Linear(1, 1))({"labels": torch.rand(3, 4)}) == 3
    assert target_counter(nn.Linear(1, 1))((labels, labels)) == 1
    assert count_tokens({"input_ids": labels, "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}) == 5
    assert count_tokens({"input_ids": labels}) == 6
    assert count_tokens((labels,)) is None


def test_random_streams() -> None:
    seed_all(1)
    python, numpy, tensor = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    kept = capture()
    with untouched():
        random.random(), np.random.rand(), torch.rand(1)
    stream = Stream(7)
    with stream.use():
        first = random.random(), np.random.randn(), float(torch.rand(()))
    assert random.getstate() == python
    assert np.random.get_state()[1].tolist() == numpy
    assert torch.equal(torch.get_rng_state(), tensor)
    random.gauss(0, 1), np.random.randn()  # both keep a second number back
    restore(*kept)
    assert random.getstate() == python
    with stream.use():
        second = random.random(), np.random.randn(), float(torch.rand(()))
    with Stream(7).use():
        assert (random.random(), np.random.randn(), float(torch.rand(()))) == first
    assert first != second
