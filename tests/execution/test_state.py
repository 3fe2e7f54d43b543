"""The state store returns what was written, adds gradients, and frees memory as backward proceeds."""

from __future__ import annotations

import pytest
import torch

from chunkflow_cli.execution.precision import accumulation_dtype
from chunkflow_cli.execution.state import SHRINK_BELOW, SequenceState, StateStore

HEADS, HEAD_DIM = 2, 4
TOKEN_BYTES = HEADS * HEAD_DIM * 4  # of one piece, in float32


def piece(tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, HEADS, HEAD_DIM, generator=generator).to(dtype)


def test_written_chunks_are_read_in_any_piece() -> None:
    """A later chunk reads across chunk borders, or from the middle of one under a window."""
    state = SequenceState(12)
    parts = [piece(4, seed) for seed in range(3)]
    for index, part in enumerate(parts):
        state.write(0, 4 * index, {"keys": part, "values": -part})
    whole = torch.cat(parts)
    assert torch.equal(state.read(0, "keys", 0, 12), whole)
    assert torch.equal(state.read(0, "keys", 3, 9), whole[3:9])
    assert torch.equal(state.read(0, "values", 5, 6), -whole[5:6])


def test_layers_and_names_are_kept_apart() -> None:
    """One buffer for all layers would give layer 1 the keys of layer 0."""
    state = SequenceState(4)
    state.write(0, 0, {"keys": piece(4, 1), "values": piece(4, 2)})
    state.write(1, 0, {"keys": piece(4, 3)})
    state.add_gradient(0, "keys", 0, piece(4, 4))
    assert torch.equal(state.read(0, "keys", 0, 4), piece(4, 1))
    assert torch.equal(state.read(0, "values", 0, 4), piece(4, 2))
    assert torch.equal(state.read(1, "keys", 0, 4), piece(4, 3))
    assert state.gradient(0, "values", 0, 4) is None
    assert state.gradient(1, "keys", 0, 4) is None


def test_state_is_a_copy_without_graph() -> None:
    """A view of the model's tensors would keep their whole chunk and its graph alive until the end."""
    state = SequenceState(4)
    source = piece(8).requires_grad_()
    state.write(0, 0, {"keys": (source * 2).detach()[:4]})
    assert not state.read(0, "keys", 0, 4).requires_grad
    assert state.nbytes == 4 * TOKEN_BYTES


def test_recompute_writes_the_same_positions_again() -> None:
    """A recompute writes what the state pass of its chunk wrote: the store must not grow, and nothing must move."""
    state = SequenceState(8)
    for seed in (0, 1):
        state.write(0, 4 * seed, {"keys": piece(4, seed)})
    before = state.nbytes
    state.add_gradient(0, "keys", 0, piece(8, 5))
    state.write(0, 4, {"keys": piece(4, 1)})
    assert torch.equal(state.read(0, "keys", 0, 8), torch.cat([piece(4, 0), piece(4, 1)]))
    assert state.nbytes == 2 * before
    kept = state.gradient(0, "keys", 0, 8)
    assert kept is not None
    assert torch.equal(kept, piece(8, 5))


def test_gradients_of_several_chunks_add_up() -> None:
    """Each later chunk adds gradient to all earlier positions, or to the last ones under a window."""
    state = SequenceState(8)
    state.write(0, 0, {"keys": piece(8)})
    state.add_gradient(0, "keys", 0, piece(8, 1))
    state.add_gradient(0, "keys", 5, piece(3, 2))
    expected = piece(8, 1)
    expected[5:] += piece(3, 2)
    mine = state.gradient(0, "keys", 0, 8)
    assert mine is not None
    assert torch.equal(mine, expected)
    part = state.gradient(0, "keys", 4, 6)
    assert part is not None
    assert torch.equal(part, expected[4:6])


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_gradients_are_summed_in_float32_or_better(dtype: torch.dtype, expected: torch.dtype) -> None:
    """Hundreds of chunks add to the first one: in bfloat16 the small ones would vanish next to the sum."""
    assert accumulation_dtype(dtype) is expected
    state = SequenceState(1)
    state.write(0, 0, {"keys": piece(1, dtype=dtype)})
    one, small = torch.ones(1, HEADS, HEAD_DIM, dtype=dtype), torch.full((1, HEADS, HEAD_DIM), 2**-10, dtype=dtype)
    state.add_gradient(0, "keys", 0, one)
    for _ in range(1024):
        state.add_gradient(0, "keys", 0, small)
    total = state.gradient(0, "keys", 0, 1)
    assert total is not None
    assert total.dtype is expected
    assert torch.equal(total, torch.full_like(total, 2.0))


def test_release_keeps_what_earlier_chunks_need() -> None:
    """The buffer shrinks, but gradients and values of earlier positions must keep their positions."""
    state = SequenceState(16)
    state.write(0, 0, {"keys": piece(16)})
    state.add_gradient(0, "keys", 0, piece(16, 1))
    state.release(0, 4)
    assert torch.equal(state.read(0, "keys", 0, 4), piece(16)[:4])
    kept = state.gradient(0, "keys", 0, 4)
    assert kept is not None
    assert torch.equal(kept, piece(16, 1)[:4])
    assert state.nbytes == 2 * 4 * TOKEN_BYTES
    state.add_gradient(0, "keys", 2, piece(2, 2))
    assert torch.equal(
        kept := state.gradient(0, "keys", 0, 4), piece(16, 1)[:4] + torch.cat([0 * piece(2), piece(2, 2)])
    )


def test_release_before_the_last_chunk_keeps_everything() -> None:
    """The last chunk stores nothing: after its backward, everything in the store is still needed."""
    state = SequenceState(8)
    state.write(0, 0, {"keys": piece(8)})
    state.release(0, 8)
    assert torch.equal(state.read(0, "keys", 0, 8), piece(8))


def test_release_of_a_layer_without_state() -> None:
    """The backward of a sequence's only chunk releases state that was never written."""
    state = SequenceState(8)
    state.release(3, 0)
    assert state.nbytes == 0


@pytest.mark.parametrize("chunks", [2, 3, 8, 33])
def test_bytes_fall_to_zero_as_backward_goes(chunks: int) -> None:
    """Kept until the end, the state of a long sequence would double the memory of every backward."""
    size = 4
    state = SequenceState((chunks - 1) * size)
    for index in range(chunks - 1):
        state.write(0, index * size, {"keys": piece(size), "values": piece(size)})
    forward_bytes = state.nbytes
    assert forward_bytes == 2 * (chunks - 1) * size * TOKEN_BYTES
    sizes = []
    for index in reversed(range(chunks)):
        if index:
            for name in ("keys", "values"):
                state.add_gradient(0, name, 0, piece(index * size))
        sizes.append(state.nbytes)
        state.release(0, index * size)
        needed = 2 * 2 * index * size * TOKEN_BYTES
        assert needed <= state.nbytes <= needed / SHRINK_BELOW
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) == 2 * forward_bytes
    assert state.nbytes == 0


def test_copies_of_shrinking_stay_few() -> None:
    """A copy at every release would move bytes with the square of the length: minutes at 256K tokens."""
    state = SequenceState(1000)
    state.write(0, 0, {"keys": piece(1000)})
    moved, address = 0, state.read(0, "keys", 0, 1).data_ptr()
    for start in range(999, 0, -1):
        state.release(0, start)
        now = state.read(0, "keys", 0, 1).data_ptr()
        moved, address = moved + (start if now != address else 0), now
    assert moved <= 3.1 * 1000


def test_store_keeps_sequences_apart() -> None:
    """`open` returns the state that the first chunk created, and never that of another sequence."""
    store = StateStore()
    first, second = store.open(7, 8), store.open(9, 4)
    assert store.open(7, 8) is first
    assert first is not second
    first.write(0, 0, {"keys": piece(8)})
    second.write(0, 0, {"keys": piece(4)})
    assert store.nbytes == 12 * TOKEN_BYTES
    assert len(store) == 2
    store.close(7)
    assert store.nbytes == 4 * TOKEN_BYTES
    assert len(store) == 1
    assert store.open(7, 8) is not first
    store.close(7)
    store.close(9)
    assert len(store) == 0
    assert store.nbytes == 0
