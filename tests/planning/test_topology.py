"""Ranks and groups, against the definition and against DeepSpeed's own grid."""

from __future__ import annotations

import itertools

import pytest

from chunkflow_cli.planning.topology import Place, Topology


@pytest.mark.parametrize(("data", "sequence", "pipeline"), list(itertools.product([1, 2, 3], repeat=3)))
def test_places_and_ranks_are_inverse_and_groups_partition_the_processes(
    data: int, sequence: int, pipeline: int
) -> None:
    topology = Topology(data, sequence, pipeline)
    ranks = range(topology.processes)
    assert [topology.rank_of(topology.place_of(rank)) for rank in ranks] == list(ranks)
    for group_of in (topology.sequence_group, topology.pipeline_group):
        groups = {tuple(group_of(rank)) for rank in ranks}
        assert sorted(itertools.chain(*groups)) == list(ranks)
        assert all(rank in group_of(rank) for rank in ranks)


@pytest.mark.torch
def test_the_grid_is_deepspeeds() -> None:
    """The pipeline engine takes its neighbors from DeepSpeed's grid; ours must name the same ones."""
    from chunkflow_cli.engine import import_deepspeed

    import_deepspeed()
    from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

    ours, theirs = Topology(data=2, sequence=2, pipeline=3), PipeDataParallelTopology(num_pp=3, num_dp=4)
    for rank in range(12):
        place = ours.place_of(rank)
        coordinates = theirs.get_coord(rank)
        assert (coordinates.pipe, coordinates.data) == (place.stage, place.data_rank * 2 + place.sequence_rank)


def test_of_divides_processes() -> None:
    assert Topology.of(8, sequence=2, pipeline=2) == Topology(2, 2, 2)
    assert str(Topology(2, 1, 4)) == "data 2 x pipeline 4"
    assert str(Topology()) == "one process"
    with pytest.raises(ValueError, match="6 processes cannot be divided into groups of 2 x 2"):
        Topology.of(6, sequence=2, pipeline=2)
    with pytest.raises(ValueError, match="rank 4: there are only 4"):
        Topology(4).place_of(4)
    with pytest.raises(ValueError, match="data=0 must be at least 1"):
        Topology(0)
    assert Topology(2, 2, 2).place_of(5) == Place(stage=1, data_rank=0, sequence_rank=1)
