"""Fingerprints of base weights: equal for equal values, and only for those."""

import pytest
import torch

from rosa_fx.fingerprint import as_text, fingerprint


def test_fingerprint_tells_values_and_not_storage() -> None:
    torch.manual_seed(0)
    weight = torch.randn(130, 70)
    text = as_text(fingerprint(weight))
    assert as_text(fingerprint(weight.double())) == text
    assert as_text(fingerprint(weight.T.contiguous().T)) == text
    assert as_text(fingerprint(weight.view(70, 130))) != text
    half, brain = weight.half(), weight.bfloat16()
    assert as_text(fingerprint(half)) == as_text(fingerprint(half.float()))
    assert as_text(fingerprint(brain)) == as_text(fingerprint(brain.float())) == as_text(fingerprint(brain.double()))
    assert len({as_text(fingerprint(w)) for w in (weight, half, brain, weight.double() + 1e-12)}) == 4
    assert as_text(fingerprint(torch.empty(3, 3, device="meta"))) is None
    # Fixed: a change of the definition would refuse every adapter saved before.
    assert as_text(fingerprint(torch.arange(5000.0).view(50, 100))) == "95397251fffed029ad2f6328afba6249"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_fingerprint_sees_every_single_value(dtype: torch.dtype) -> None:
    weight = torch.randn(3, 1500, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    seen = {as_text(fingerprint(weight))}
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.itemsize]
    for i in range(0, weight.numel(), 45):
        changed = weight.clone()
        changed.view(-1).view(integers)[i] ^= 1
        seen.add(as_text(fingerprint(changed)))
    assert len(seen) == 101
