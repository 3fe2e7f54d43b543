"""The state store returns what was written, adds gradients, and frees memory as backward proceeds.

On the device and in host memory alike: every test runs on both.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from chunkflow_cli.execution.precision import accumulation_dtype
from chunkflow_cli.execution.state import SequenceState, StateStore
from chunkflow_cli.execution.state_home import Home, OnDevice, host_home

HEADS, HEAD_DIM = 2, 4
TOKEN_BYTES = HEADS * HEAD_DIM * 4  # of one piece, in float32
CPU = torch.device("cpu")


def piece(tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, HEADS, HEAD_DIM, generator=generator).to(dtype)


@pytest.fixture(params=["device", "host"])
def home(request: pytest.FixtureRequest) -> Home:
    """Blocks of three tokens, which chunks of four straddle."""
    return OnDevice(3) if request.param == "device" else host_home(CPU, 3)


def read(state: SequenceState, past: int, name: str = "keys", layer: int = 0) -> Tensor:
    return torch.cat([block.values[name].clone() for block in state.past(layer, past)])


def add(state: SequenceState, past: int, *names: str, gradient: Tensor) -> None:
    """Add the last rows of a gradient of positions 0 to `past` to all blocks that are seen."""
    for block in state.past(0, past, with_gradients=True):
        rows = gradient[block.start : block.stop]
        block.add_gradient({name: rows if name in names else torch.zeros_like(rows) for name in block.values})


def sums(state: SequenceState, start: int, stop: int, name: str = "keys", layer: int = 0) -> Tensor:
    """Return the gradient of positions that later chunks see; 0 for the others."""
    total = torch.zeros(stop - start, HEADS, HEAD_DIM, dtype=torch.float64)
    for rows, gradients in state.own_gradients(layer, start, stop):
        total[rows] = gradients[name].double()
    return total


def window(size: int) -> Callable[[int], int]:
    return lambda past: max(0, past - size + 1)


def test_written_chunks_are_read_across_blocks(home: Home) -> None:
    """A later chunk reads all before it, or under a window from the middle of a chunk."""
    state, parts = SequenceState(12, home), [piece(4, seed) for seed in range(3)]
    for layer, sight in ((0, window(100)), (1, window(6))):
        for index, part in enumerate(parts):
            state.write(layer, 4 * index, {"keys": part, "values": -part}, sight)
    whole = torch.cat(parts)
    for past in (4, 8, 12):
        assert torch.equal(read(state, past), whole[:past])
        assert torch.equal(read(state, past, "values"), -whole[:past])
        assert torch.equal(read(state, past, layer=1), whole[max(0, past - 5) : past])
        assert next((block.start, block.stop) for block in state.past(0, past)) == (0, 3)


def test_layers_and_names_are_kept_apart(home: Home) -> None:
    """One buffer for all layers would give layer 1 the keys of layer 0."""
    state = SequenceState(4, home)
    state.write(0, 0, {"keys": piece(4, 1), "values": piece(4, 2)})
    state.write(1, 0, {"keys": piece(4, 3)})
    add(state, 4, "keys", gradient=piece(4, 4))
    assert torch.equal(read(state, 4), piece(4, 1))
    assert torch.equal(read(state, 4, "values"), piece(4, 2))
    assert torch.equal(read(state, 4, layer=1), piece(4, 3))
    assert torch.equal(sums(state, 0, 4), piece(4, 4).double())
    assert not sums(state, 0, 4, "values").any()
    assert not list(state.own_gradients(1, 0, 4))


def test_state_is_a_copy_without_graph(home: Home) -> None:
    """A view of the model's tensors would keep their whole chunk and its graph alive until the end."""
    state, source = SequenceState(3, home), piece(8).requires_grad_()
    state.write(0, 0, {"keys": (source * 2).detach()[:3]})
    assert not read(state, 3).requires_grad
    assert state.nbytes == 3 * TOKEN_BYTES


def test_a_recompute_changes_nothing(home: Home) -> None:
    """A recompute writes what the state pass of its chunk wrote: the store must not grow, and nothing must move."""
    state = SequenceState(8, home)
    for seed in (0, 1):
        state.write(0, 4 * seed, {"keys": piece(4, seed)})
    before = state.nbytes
    add(state, 8, "keys", gradient=piece(8, 5))
    state.write(0, 4, {"keys": piece(4, 1)})
    assert torch.equal(read(state, 8), torch.cat([piece(4, 0), piece(4, 1)]))
    assert state.nbytes == 2 * before
    assert torch.equal(sums(state, 0, 8), piece(8, 5).double())


@pytest.mark.parametrize("size", [100, 6, 5])
def test_gradients_of_several_chunks_add_up(home: Home, size: int) -> None:
    """Each later chunk adds gradient to all earlier positions, or to the last ones under a window.

    Those that it is the first to add to begin at zero, whatever the memory held before.
    """
    for step in range(2):  # the second time, buffers of the host hold the gradients of the first
        state = SequenceState(12, home)
        for start in (0, 4, 8):
            state.write(0, start, {"keys": piece(4)}, window(size))
        expected = torch.zeros(12, HEADS, HEAD_DIM, dtype=torch.float64)
        for past in (12, 8, 4):
            given, seen = piece(past, past + step), slice(max(0, past - size + 1), past)
            add(state, past, "keys", gradient=given)
            expected[seen] += given[seen].double()
            assert torch.allclose(sums(state, past - 4, past), expected[past - 4 : past], rtol=1e-6)
            state.release(0, past - 4)
        del state


def test_what_a_window_hides_is_dropped(home: Home) -> None:
    """Of chunks longer than the window only the ends are kept; of blocks that end with a chunk, nothing."""
    state = SequenceState(30, home)
    for start in (0, 10, 20):
        state.write(0, start, {"keys": piece(10, start)}, window(4))
        state.write(1, start, {"keys": piece(10, start)}, lambda past: past - past % 5)
        state.write(2, start, {"keys": piece(10, start)}, lambda past: past - past % 8)
    assert state.nbytes == TOKEN_BYTES * (3 * 3 + 0 + 2 + 4 + 6)
    for past in (10, 20, 30):
        assert torch.equal(read(state, past), piece(10, past - 10)[7:])
        assert torch.equal(read(state, past, layer=2), piece(10, past - 10)[10 - past % 8 :])
        assert not list(state.past(1, past))


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
def test_gradients_are_summed_in_float32_or_better(home: Home, dtype: torch.dtype, expected: torch.dtype) -> None:
    """Hundreds of chunks add to the first one: in bfloat16 the small ones would vanish next to the sum."""
    assert accumulation_dtype(dtype) is expected
    state = SequenceState(1, home)
    state.write(0, 0, {"keys": piece(1, dtype=dtype)})
    one, small = torch.ones(1, HEADS, HEAD_DIM, dtype=dtype), torch.full((1, HEADS, HEAD_DIM), 2**-10, dtype=dtype)
    for gradient in (one, *[small] * 1024):
        add(state, 1, "keys", gradient=gradient)
    ((_, total),) = state.own_gradients(0, 0, 1)
    assert total["keys"].dtype is expected
    assert torch.equal(total["keys"], torch.full_like(total["keys"], 2.0))


def test_release_keeps_what_earlier_chunks_need(home: Home) -> None:
    """Whole blocks are freed, and what is left keeps its positions."""
    state = SequenceState(15, home)
    state.write(0, 0, {"keys": piece(15)})
    add(state, 15, "keys", gradient=piece(15, 1))
    state.release(0, 4)
    assert state.nbytes == 2 * 6 * TOKEN_BYTES
    assert torch.equal(read(state, 4), piece(15)[:4])
    add(state, 4, "keys", gradient=piece(4, 2))
    assert torch.equal(sums(state, 0, 4), (piece(15, 1)[:4] + piece(4, 2)).double())


def test_release_of_nothing(home: Home) -> None:
    """The last chunk stores nothing, and the backward of a sequence's only chunk releases what was never written."""
    state = SequenceState(8, home)
    state.release(3, 0)
    assert state.nbytes == 0
    state.write(0, 0, {"keys": piece(8)})
    state.release(0, 8)
    assert torch.equal(read(state, 8), piece(8))


@pytest.mark.parametrize("chunks", [2, 3, 8, 33])
def test_bytes_fall_to_zero_as_backward_goes(home: Home, chunks: int) -> None:
    """Kept until the end, the state of a long sequence would double the memory of every backward."""
    size = 4
    state = SequenceState((chunks - 1) * size, home)
    for index in range(chunks - 1):
        state.write(0, index * size, {"keys": piece(size), "values": piece(size)})
    forward_bytes, sizes = state.nbytes, []
    spare = (
        0 if isinstance(home, OnDevice) else 2 * 2 * TOKEN_BYTES
    )  # the last block of the host may be empty but for one
    assert 0 <= forward_bytes - 2 * (chunks - 1) * size * TOKEN_BYTES <= spare
    for index in reversed(range(chunks)):
        if index:
            add(state, index * size, "keys", "values", gradient=piece(index * size))
        sizes.append(state.nbytes)
        state.release(0, index * size)
        assert 0 <= state.nbytes - 2 * 2 * index * size * TOKEN_BYTES <= 2 * 2 * 2 * TOKEN_BYTES  # of a block
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) == 2 * forward_bytes
    assert state.nbytes == 0


def test_store_keeps_sequences_apart(home: Home) -> None:
    """`open` returns the state that the first chunk created, and never that of another sequence."""
    store = StateStore(home)
    first, second = store.open(7, 9), store.open(9, 3)
    assert store.open(7, 9) is first
    assert first is not second
    first.write(0, 0, {"keys": piece(9)})
    second.write(0, 0, {"keys": piece(3)})
    assert store.nbytes == 12 * TOKEN_BYTES
    assert len(store) == 2
    store.close(7)
    assert store.nbytes == 3 * TOKEN_BYTES
    assert len(store) == 1
    assert store.open(7, 9) is not first
    store.close(7)
    store.close(9)
    assert len(store) == 0
    assert store.nbytes == 0


def test_host_memory_is_used_again() -> None:
    """Pinning takes long: the second sequence gets the buffers of the first one."""
    home = host_home(CPU, 3)
    used = set()
    for _ in range(3):
        store = StateStore(home)
        state = store.open(0, 8)
        for start in (0, 4):
            state.write(0, start, {"keys": piece(4), "values": piece(4)})
        add(state, 8, "keys", gradient=piece(8))
        store.close(0)
        del state
        used.add((home.host_bytes, home.page_lock_seconds))
    assert len(used) == 1
    assert home.page_lock_seconds > 0
