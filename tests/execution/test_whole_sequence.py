"""The truth that parity compares with is torch's cross entropy."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from chunkflow_cli.data.sample import IGNORED, TokenizedSample
from chunkflow_cli.execution.whole_sequence import cross_entropies


class _Model:
    config = SimpleNamespace(model_type="llama", get_text_config=lambda: SimpleNamespace())

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def __call__(self, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits[None])


def test_rows_are_torchs_cross_entropies_and_so_are_their_gradients() -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(40, 500, dtype=torch.float64) + 8).requires_grad_()
    targets = np.random.default_rng(0).integers(0, 500, 40).astype(np.int32)
    targets[::3] = IGNORED
    found = cross_entropies(_Model(logits), TokenizedSample(np.zeros(40, np.int32), targets), torch.device("cpu"))
    (gradient,) = torch.autograd.grad(found.sum(), logits)

    labels = torch.as_tensor(targets, dtype=torch.int64)
    expected = nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    (truth,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, truth)
