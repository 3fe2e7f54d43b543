"""Step parameters whole, whichever ranks hold their parts: for optimizers that look at more than single numbers.

Muon orthogonalises a matrix, Adafactor keeps a factor for each of its rows and columns. DeepSpeed steps flat tensors
that hold parts of many parameters, in which neither can see a matrix. (DeepSpeed's own Muon works within the reduction
of gradients. It misses matrices under `zero.Init` and BF16_Optimizer, where it silently becomes SGD, and clips by the
norm of its updates.)

So each parameter has an owner among the ranks that hold its parts. At a step, the others send it their parts of weight
and gradient; it runs torch's own optimizer on the whole parameter, and sends the new weights back. Parameters of
different owners travel and run at the same time. What a rank already holds whole does not travel, so alone, and for
most parameters under ZeRO-1 and 2, nothing does. The states stay with the owner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed

MATRIX_DIMENSIONS = 2


@dataclass
class Whole:
    """A parameter that is stepped whole."""

    name: str
    """Name in the whole Hugging Face model."""
    shape: tuple[int, ...]
    held: tuple[tuple[int, int], ...]
    """Which numbers of the flattened parameter each rank holds: the first one's index, and how many."""
    owner: int
    """The rank that steps it."""
    stepped: Tensor
    """The tensor of this rank that DeepSpeed steps together with it, or that holds this rank's part."""
    offset: int
    """Index in `stepped`, flattened, of this rank's first number."""
    states: list[dict[str, Any]] = field(default_factory=list)
    """On the owner, the optimizer's states: one of the parameter, or one of each matrix in a stack."""

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())

    def part_of(self, tensor: Tensor, rank: int) -> Tensor:
        """Return a view (numbers,) of this rank's part in `tensor`, which is shaped like `stepped`."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.held[rank][1]]

    def is_whole_on(self, rank: int) -> bool:
        return self.held[rank][1] == self.numel


class WholeParameters(torch.optim.Optimizer):
    """Steps groups whose entry `whole` is true by an optimizer of whole parameters, and the others by AdamW."""

    def __init__(
        self, groups: list[dict[str, Any]], of_whole: torch.optim.Optimizer, *, rest: torch.optim.Optimizer
    ) -> None:
        super().__init__(groups, dict(rest.defaults))
        self._of_whole = of_whole
        self._rest = rest
        self._wholes: tuple[Whole, ...] | None = None
        self.rank = 0
        """This process's rank among those that hold the same layers."""
        self._group: distributed.ProcessGroup | None = None
        self._splits_stacks = isinstance(of_whole, torch.optim.Muon)

    @property
    def wholes(self) -> tuple[Whole, ...]:
        """The parameters that are stepped whole, in the same order on every rank."""
        assert self._wholes is not None, "no step before `place`"
        return self._wholes

    def place(self, wholes: Sequence[Whole], rank: int, group: distributed.ProcessGroup | None) -> None:
        """Tell where the parameters are, after DeepSpeed has divided them.

        Args:
            wholes: in the same order on every rank of the group.
            rank: this process's rank in the group.
            group: the ranks that hold the same layers; None for all.
        """
        self._wholes, self.rank, self._group = tuple(wholes), rank, group

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            if group["whole"]:
                stepped = {id(tensor) for tensor in group["params"]}
                self._step_whole(group, [whole for whole in self.wholes if id(whole.stepped) in stepped])
        self._rest.param_groups = [group for group in self.param_groups if not group["whole"]]
        self._rest.state = self.state
        self._rest.step()

    def _step_whole(self, group: dict[str, Any], wholes: Sequence[Whole]) -> None:
        for together in rounds(wholes):
            own = together.get(self.rank)
            if all(whole.is_whole_on(whole.owner) for whole in together.values()):
                values = self._own_values(own) if own is not None else None
            else:
                values = self._collect(together)
            if own is not None:
                assert values is not None
                self._step_one(group, own, *values)
            if len(own.held if own is not None else next(iter(together.values())).held) > 1:
                self._hand_out(together, None if values is None else values[0])

    def _own_values(self, whole: Whole) -> tuple[Tensor, Tensor]:
        """Return weight and gradient, flat, of a parameter that is whole on this rank: views."""
        return whole.part_of(whole.stepped, self.rank), whole.part_of(gradient_of(whole.stepped), self.rank)

    def _collect(self, together: Mapping[int, Whole]) -> tuple[Tensor, Tensor] | None:
        """Send this rank's parts to their owners; return the whole weight and gradient of its own parameter, flat."""
        some = next(iter(together.values()))
        ranks = range(len(some.held))
        sent = {owner: whole for owner, whole in together.items() if not whole.is_whole_on(owner)}
        parts = [
            whole.part_of(tensor, self.rank)
            for whole in sent.values()
            for tensor in (whole.stepped, gradient_of(whole.stepped))
        ]
        own = together.get(self.rank)
        is_received = own is not None and self.rank in sent
        received = self._exchange(
            parts, some.stepped,
            [2 * sent[rank].held[self.rank][1] if rank in sent else 0 for rank in ranks],
            [2 * own.held[rank][1] if own is not None and is_received else 0 for rank in ranks],
        )  # fmt: skip
        if own is None:
            return None
        if not is_received:
            return self._own_values(own)
        weight, gradient = torch.empty_like(received[: own.numel]), torch.empty_like(received[: own.numel])
        for piece, (start, count) in zip(received.split([2 * count for _, count in own.held]), own.held, strict=True):
            weight[start : start + count], gradient[start : start + count] = piece[:count], piece[count:]
        return weight, gradient

    def _hand_out(self, together: Mapping[int, Whole], weight: Tensor | None) -> None:
        """Send the new weights of this rank's own parameter to the ranks that hold parts, and take theirs."""
        some = next(iter(together.values()))
        ranks = range(len(some.held))
        own = together.get(self.rank)
        parts = []
        if own is not None:
            assert weight is not None
            parts = [weight[start : start + count] for rank, (start, count) in enumerate(own.held) if rank != own.owner]
            start, count = own.held[own.owner]
            own.part_of(own.stepped, self.rank).copy_(weight[start : start + count])
        to_others = [own.held[rank][1] if own is not None and rank != self.rank else 0 for rank in ranks]
        from_owners = [
            together[rank].held[self.rank][1] if rank in together and rank != self.rank else 0 for rank in ranks
        ]
        if self._is_nothing_sent(together):
            return
        received = self._exchange(parts, some.stepped, to_others, from_owners)
        for rank, piece in zip(ranks, received.split(from_owners), strict=True):
            if len(piece):
                whole = together[rank]
                whole.part_of(whole.stepped, self.rank).copy_(piece)

    @staticmethod
    def _is_nothing_sent(together: Mapping[int, Whole]) -> bool:
        """Return whether no rank but the owners holds a part; the same on all ranks."""
        return not any(
            count for whole in together.values() for rank, (_, count) in enumerate(whole.held) if rank != whole.owner
        )

    def _exchange(self, parts: list[Tensor], like: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send `sent` numbers to each rank, and return those that come from each, one after the other."""
        joined = torch.cat(parts) if parts else like.new_empty(0)
        into = like.detach().new_empty(sum(received))
        distributed.all_to_all_single(into, joined.contiguous(), received, sent, group=self._group)
        return into

    def _step_one(self, group: dict[str, Any], whole: Whole, weight: Tensor, gradient: Tensor) -> None:
        """Step a whole parameter in place: flat weight and gradient."""
        shape = whole.shape
        is_stack = self._splits_stacks and len(shape) > MATRIX_DIMENSIONS
        weights = weight.view(-1, *shape[-2:]).unbind(0) if is_stack else [weight.view(shape)]
        gradients = gradient.view(-1, *shape[-2:]).unbind(0) if is_stack else [gradient.view(shape)]
        if not whole.states:
            whole.states = [{} for _ in weights]
        leaves = []
        for own, grad in zip(weights, gradients, strict=True):
            leaf = own.detach()
            leaf.grad = grad
            leaves.append(leaf)
        inner = self._of_whole
        inner.param_groups[0] |= {"params": leaves, "lr": group["lr"], "weight_decay": group["weight_decay"]}
        inner.state.clear()
        inner.state.update(zip(leaves, whole.states, strict=True))
        inner.step()
        inner.state.clear()


def gradient_of(stepped: Tensor) -> Tensor:
    """Return the gradient of a tensor that is about to be stepped."""
    assert stepped.grad is not None, "every rank steps with a gradient, be it zero"
    return stepped.grad


def rounds(wholes: Sequence[Whole]) -> Iterator[dict[int, Whole]]:
    """Yield which parameters are stepped at the same time, by their owners: at most one of each."""
    waiting: dict[int, list[Whole]] = {}
    for whole in wholes:
        waiting.setdefault(whole.owner, []).append(whole)
    for turn in range(max(map(len, waiting.values()), default=0)):
        yield {owner: own[turn] for owner, own in sorted(waiting.items()) if turn < len(own)}


def choose_owners(held: Sequence[Sequence[int]], work: Sequence[float]) -> list[int]:
    """Return the owner of each parameter: of the ranks that hold most of it, the one with the least work so far.

    Args:
        held: for each parameter, how many of its numbers each rank holds.
        work: for each parameter, the work of stepping it.
    """
    load = [0.0] * len(held[0]) if held else []
    owners = []
    for counts, cost in zip(held, work, strict=True):
        candidates = [rank for rank, count in enumerate(counts) if 2 * count > max(counts)]
        owner = min(candidates, key=lambda rank: (load[rank], rank))
        load[owner] += cost
        owners.append(owner)
    return owners
