"""What ordinary training computes for a sample, in one forward: the truth that `parity` compares chunks with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from chunkflow_cli.data.sample import IGNORED, TokenizedSample
from chunkflow_cli.execution.precision import accumulation_dtype
from chunkflow_cli.model.language_part import text_only


def cross_entropies(model: Any, sample: TokenizedSample, device: torch.device) -> Tensor:
    """Return the cross entropy of each token's target, (tokens,) in float64, 0 where there is none, with its graph.

    By `logsumexp`: torch's float32 `cross_entropy` on a CPU adds a row's exponentials with an error of one sign, which
    moves gradients over a vocabulary of 49,152 by 6e-5 (benchmarks/LOG.md).
    """
    ids = torch.as_tensor(sample.input_ids, dtype=torch.int64, device=device)[None]
    targets = torch.as_tensor(sample.targets, dtype=torch.int64, device=device)
    logits: Tensor = model(input_ids=ids, use_cache=False, **text_only(model, ids)).logits[0]
    logits = logits.to(accumulation_dtype(logits.dtype))
    picked = logits.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    return (logits.logsumexp(dim=-1) - picked).double().masked_fill(targets == IGNORED, 0)
