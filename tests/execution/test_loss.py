"""Head and loss in tiles against plain cross entropy on all logits."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from chunkflow_cli.execution.cpu_quirks import LinearThroughFloat32
from chunkflow_cli.execution.loss import LogitTransform, SharedHeadGradient, tile_rows, weighted_cross_entropy
from chunkflow_cli.planning.memory_parts import HEAD_TILE_BYTES

ROWS, HIDDEN, VOCABULARY, TOKENS = 37, 16, 51, 43
TRANSFORMS = {
    "plain": LogitTransform(),
    "scale": LogitTransform(scale=1 / 8),
    "softcap": LogitTransform(softcap=2.0),
    "scale and softcap": LogitTransform(scale=3.0, softcap=1.5),
    "unused rows": LogitTransform(softcap=2.0, tokens=TOKENS),
}


class OtherHead(nn.Module):
    """A head of another class, as LoRA makes of it: no short cut to its weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.out_features = linear.out_features

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.linear(hidden)
        return logits


PATHS: dict[str, tuple[Callable[[nn.Linear], nn.Module], bool]] = {
    "fused": (lambda linear: linear, True),
    "retained": (lambda linear: linear, False),
    "other head": (OtherHead, True),
}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 5 rows: 37 rows make seven and a rest of 2."""
    monkeypatch.setitem(HEAD_TILE_BYTES, "cpu", 5 * 4 * VOCABULARY)


def inputs(dtype: torch.dtype, *, bias: bool = True, rows: int = ROWS) -> tuple[Tensor, nn.Linear, Tensor, Tensor]:
    """Hidden states, head, targets and weights; weights differ from row to row, one is zero."""
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=bias)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.7, generator=generator)
    hidden = torch.randn(rows, HIDDEN, generator=generator)
    targets = torch.randint(0, TOKENS, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator)
    if rows:
        weights[0] = 0
    weight_dtype = torch.promote_types(dtype, torch.float32)
    return hidden.to(dtype).requires_grad_(), head.to(dtype), targets, weights.to(weight_dtype)


def plain_loss(hidden: Tensor, head: nn.Module, targets: Tensor, weights: Tensor, transform: LogitTransform) -> Tensor:
    """All logits at once, torch's cross entropy, autograd."""
    logits = head(hidden)[:, : transform.tokens] * transform.scale
    if transform.softcap is not None:
        logits = torch.tanh(logits / transform.softcap) * transform.softcap
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (nn.functional.cross_entropy(logits, targets, reduction="none") * weights.to(logits.dtype)).sum()


def gradients(total: Tensor, hidden: Tensor, head: Any) -> dict[str, Tensor]:
    hidden.grad = None
    for parameter in head.parameters():
        parameter.grad = None
    total.backward()
    found = {"hidden": hidden.grad, "weight": head.weight.grad, "bias": None if head.bias is None else head.bias.grad}
    return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


def difference(mine: Tensor, truth: Tensor) -> float:
    mine, truth = mine.detach().double(), truth.detach().double()
    return float((mine - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("path", PATHS)
def test_loss_and_gradients(path: str, bias: bool, transform: LogitTransform, dtype: torch.dtype) -> None:
    """Tiles, weights, scale and soft cap, on each path, against the plain loss: value and every gradient."""
    wrap, keep = PATHS[path]
    hidden, linear, targets, weights = inputs(dtype, bias=bias)
    head = wrap(linear)
    tolerance = 1e-13 if dtype is torch.float64 else 1e-6
    total = weighted_cross_entropy(
        hidden, head, targets, weights, transform, shared=None if keep else SharedHeadGradient()
    )
    assert total.dtype is dtype
    assert total.shape == ()
    mine = gradients(total, hidden, head)
    exact_hidden, exact_head = hidden.detach().double().requires_grad_(), inputs(dtype, bias=bias)[1].double()
    plain = plain_loss(exact_hidden, exact_head, targets, weights.double(), transform)
    truth = gradients(plain, exact_hidden, exact_head)
    assert difference(total, plain) <= tolerance
    assert mine.keys() == truth.keys() == ({"hidden", "weight", "bias"} if bias else {"hidden", "weight"})
    for name in truth:
        assert difference(mine[name], truth[name]) <= tolerance, name


@pytest.mark.parametrize("rows", [1, 4, 5, 6, 10])
@pytest.mark.parametrize("path", PATHS)
def test_rows_around_a_tile(path: str, rows: int) -> None:
    """Fewer rows than a tile, just one tile, one row more: a rest that is dropped or doubled changes the loss."""
    wrap, keep = PATHS[path]
    hidden, linear, targets, weights = inputs(torch.float64, rows=rows)
    weights = weights + 1
    head = wrap(linear)
    mine = weighted_cross_entropy(
        hidden, head, targets, weights, LogitTransform(), shared=None if keep else SharedHeadGradient()
    )
    assert difference(mine, plain_loss(hidden, head, targets, weights, LogitTransform())) <= 1e-13


@pytest.mark.parametrize("path", PATHS)
def test_gradient_of_the_loss_is_passed_on(path: str) -> None:
    """Engines scale the loss before backward; a fused gradient formed in forward must be scaled then."""
    wrap, keep = PATHS[path]
    hidden, linear, targets, weights = inputs(torch.float64)
    head = wrap(linear)
    found = []
    for factor in (1.0, 0.25):
        total = weighted_cross_entropy(
            hidden, head, targets, weights, LogitTransform(), shared=None if keep else SharedHeadGradient()
        )
        found.append(gradients(total * factor, hidden, head))
    for name in found[0]:
        assert difference(found[1][name], found[0][name] * 0.25) <= 1e-14


@pytest.mark.parametrize(
    "trained", [{"hidden"}, {"weight"}, {"bias"}, {"hidden", "bias"}], ids=lambda t: "+".join(sorted(t))
)
@pytest.mark.parametrize("path", PATHS)
def test_only_what_is_trained_gets_gradient(path: str, trained: set[str]) -> None:
    """A frozen head (LoRA) costs no gradient of its size, and a parameter that is trained alone gets its gradient."""
    wrap, keep = PATHS[path]
    hidden, linear, targets, weights = inputs(torch.float64)
    hidden = hidden.detach().requires_grad_("hidden" in trained)
    linear.weight.requires_grad_("weight" in trained)
    linear.bias.requires_grad_("bias" in trained)
    head = wrap(linear)
    mine = gradients(
        weighted_cross_entropy(
            hidden, head, targets, weights, LogitTransform(), shared=None if keep else SharedHeadGradient()
        ),
        hidden,
        head,
    )
    truth = gradients(plain_loss(hidden, head, targets, weights, LogitTransform()), hidden, head)
    assert mine.keys() == truth.keys() == trained
    for name in trained:
        assert difference(mine[name], truth[name]) <= 1e-13


@pytest.mark.parametrize("path", PATHS)
def test_without_gradient(path: str) -> None:
    """Evaluation: the same value, no graph."""
    wrap, keep = PATHS[path]
    hidden, linear, targets, weights = inputs(torch.float64)
    head = wrap(linear)
    with torch.no_grad():
        total = weighted_cross_entropy(
            hidden, head, targets, weights, LogitTransform(), shared=None if keep else SharedHeadGradient()
        )
    assert not total.requires_grad
    assert difference(total, plain_loss(hidden, head, targets, weights, LogitTransform())) <= 1e-13


@pytest.mark.parametrize("path", PATHS)
def test_large_logits_do_not_overflow(path: str) -> None:
    """exp of a logit of 1000 is infinite: the softmax must be shifted."""
    wrap, keep = PATHS[path]
    hidden, linear, targets, weights = inputs(torch.float32)
    hidden = (hidden.detach() * 300).requires_grad_()
    head = wrap(linear)
    total = weighted_cross_entropy(
        hidden, head, targets, weights, LogitTransform(), shared=None if keep else SharedHeadGradient()
    )
    assert difference(total, plain_loss(hidden, head, targets, weights, LogitTransform())) <= 1e-6
    assert all(gradient.isfinite().all() for gradient in gradients(total, hidden, head).values())


@pytest.mark.parametrize("path", PATHS)
def test_infinite_hidden_states_give_a_loss_that_is_not_finite(path: str) -> None:
    """A run that diverges must be noticed: a NaN must not turn into a number on the way."""
    wrap, keep = PATHS[path]
    hidden, linear, targets, weights = inputs(torch.float32)
    broken = hidden.detach().clone()
    broken[20, 3] = float("nan")
    total = weighted_cross_entropy(
        broken.requires_grad_(),
        wrap(linear),
        targets,
        weights,
        LogitTransform(),
        shared=None if keep else SharedHeadGradient(),
    )
    assert not total.isfinite()


@pytest.mark.parametrize("native", [True, False], ids=["native bfloat16", "through float32"])
@pytest.mark.parametrize("head_class", [nn.Linear, LinearThroughFloat32])
@pytest.mark.parametrize("keep", [True, False], ids=["fused", "retained"])
def test_bfloat16_is_not_worse_than_plain_bfloat16(
    monkeypatch: pytest.MonkeyPatch, keep: bool, head_class: type[nn.Linear], native: bool
) -> None:
    """Ten tiles must not cost accuracy: loss and gradients are as accurate as those of plain bfloat16.

    One thing may cost a little: a native product rounds the head's gradient of each tile before the sum in float32.
    """
    monkeypatch.setitem(HEAD_TILE_BYTES, "cpu", 40 * 4 * VOCABULARY)
    allowed = {"hidden": 1.001, "weight": 1.2, "bias": 1.001}
    monkeypatch.setattr("chunkflow_cli.execution.cpu_quirks.cpu_has_bfloat16", lambda: native)
    hidden, head, targets, weights = inputs(torch.bfloat16, rows=400)
    head.__class__ = head_class
    exact_hidden, exact_head = hidden.detach().double().requires_grad_(), nn.Linear(HIDDEN, VOCABULARY).double()
    exact_head.load_state_dict(head.state_dict())
    truth_total = plain_loss(exact_hidden, exact_head, targets, weights, LogitTransform())
    truth = gradients(truth_total, exact_hidden, exact_head)
    plain_head = nn.Linear(HIDDEN, VOCABULARY).bfloat16()
    plain_head.load_state_dict(head.state_dict())
    plain_total = plain_loss(hidden, plain_head, targets, weights, LogitTransform())
    plain = gradients(plain_total, hidden, plain_head)
    total = weighted_cross_entropy(
        hidden, head, targets, weights, LogitTransform(), shared=None if keep else SharedHeadGradient()
    )
    assert total.dtype is torch.float32
    mine = gradients(total, hidden, head)
    assert difference(total, truth_total) <= 1e-3
    for name in truth:
        assert mine[name].dtype is torch.bfloat16
        assert difference(mine[name], truth[name]) <= allowed[name] * difference(plain[name], truth[name]), name


def test_sum_over_many_tiles_is_in_float32() -> None:
    """The head's gradient is a sum over all tiles: in bfloat16 the small ones would be lost next to the sum."""
    rows = 2000
    hidden, head, targets, weights = inputs(torch.bfloat16, rows=rows)
    exact_hidden, exact_head = hidden.detach().double().requires_grad_(), inputs(torch.bfloat16, rows=rows)[1].double()
    mine = gradients(
        weighted_cross_entropy(hidden, head, targets, weights, LogitTransform(), shared=None), hidden, head
    )
    truth = gradients(
        plain_loss(exact_hidden, exact_head, targets, weights, LogitTransform()), exact_hidden, exact_head
    )
    assert difference(mine["weight"], truth["weight"]) <= 5e-3
    assert difference(mine["bias"], truth["bias"]) <= 5e-3


class LargestTensor(TorchDispatchMode):
    """Records the most elements of any tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("path", PATHS)
def test_logits_of_all_rows_never_exist(path: str) -> None:
    """The reason for tiles: with 152K words, the logits of a chunk would take more memory than the model."""
    wrap, keep = PATHS[path]
    rows = 300
    hidden, linear, targets, weights = inputs(torch.float32, rows=rows)
    head = wrap(linear)
    with LargestTensor() as plain:
        plain_loss(hidden, head, targets, weights, TRANSFORMS["scale and softcap"]).backward()
    assert plain.elements == rows * VOCABULARY, "the recorder sees what it is there for"
    with LargestTensor() as largest:
        weighted_cross_entropy(
            hidden,
            head,
            targets,
            weights,
            TRANSFORMS["scale and softcap"],
            shared=None if keep else SharedHeadGradient(),
        ).backward()
    tile, states = tile_rows(VOCABULARY, hidden.device) * VOCABULARY, rows * HIDDEN
    assert largest.elements <= max(tile, states, VOCABULARY * HIDDEN) < rows * VOCABULARY / 3


@pytest.mark.parametrize("retained", [False, True], ids=["alone", "retained"])
def test_fused_path_computes_the_logits_once(monkeypatch: pytest.MonkeyPatch, retained: bool) -> None:
    """The head is a fifth of a small model: computing its product again in backward would slow down the step."""
    calls = []
    linear_ = nn.functional.linear

    def counted(*args: Any) -> Tensor:
        calls.append(len(args[0]))
        return linear_(*args)

    monkeypatch.setattr(nn.functional, "linear", counted)
    hidden, head, targets, weights = inputs(torch.float32)
    shared = SharedHeadGradient() if retained else None
    weighted_cross_entropy(hidden, head, targets, weights, LogitTransform(), shared=shared).backward()
    assert sum(calls) == ROWS


def test_retained_chunks_share_one_gradient_of_the_head() -> None:
    """Otherwise each would keep a tensor of the head's size. The sum must reach autograd once, at the last backward."""
    hidden, head, targets, weights = inputs(torch.float64)
    plain = gradients(plain_loss(hidden, head, targets, weights, LogitTransform()), hidden, head)
    hidden.grad = None
    head.zero_grad()
    shared = SharedHeadGradient()
    cuts = (0, 7, 20, ROWS)
    parts = [slice(start, stop) for start, stop in itertools.pairwise(cuts)]
    totals = [
        weighted_cross_entropy(hidden[part], head, targets[part], weights[part], LogitTransform(), shared=shared)
        for part in parts
    ]
    kept = shared.sums["weight"]
    for index, total in enumerate(reversed(totals)):
        assert head.weight.grad is None, index
        assert shared.sums["weight"] is kept, index
        total.backward()
    assert not shared.sums
    assert hidden.grad is not None
    assert head.weight.grad is not None
    assert difference(hidden.grad, plain["hidden"]) <= 1e-14
    assert difference(head.weight.grad, plain["weight"]) <= 1e-14


def test_tile_rows() -> None:
    """As many rows as fit the bytes of the device, and at least one for any vocabulary."""
    assert tile_rows(VOCABULARY, torch.device("cpu")) == 5
    assert tile_rows(10**9, torch.device("cpu")) == 1
    assert tile_rows(2**17, torch.device("cuda")) == HEAD_TILE_BYTES["cuda"] // (4 * 2**17)
    assert tile_rows(2**17, torch.device("meta")) == tile_rows(2**17, torch.device("cuda"))
