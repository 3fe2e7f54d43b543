"""Where each process of a run stands: its data-parallel rank, its sequence-parallel rank, its pipeline stage.

    rank = (stage * data + data_rank) * sequence + sequence_rank

So the processes of a sequence-parallel group are neighbours (on one node, where links are fastest), and the stages of a
pipeline are farthest apart: they exchange the least. It is also the order of DeepSpeed's pipeline grid, whose "data"
axis is ours of data and sequence together: gradients are summed over both.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """The coordinates of one process."""

    stage: int
    data_rank: int
    sequence_rank: int


@dataclass(frozen=True)
class Topology:
    """How many processes there are along each axis."""

    data: int = 1
    sequence: int = 1
    pipeline: int = 1

    def __post_init__(self) -> None:
        for name in ("data", "sequence", "pipeline"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @classmethod
    def of(cls, processes: int, *, sequence: int = 1, pipeline: int = 1) -> Topology:
        """All processes that sequence and pipeline parallelism leave over are data-parallel.

        Raises:
            ValueError: `processes` is not a multiple of `sequence` x `pipeline`.
        """
        if processes % (sequence * pipeline):
            raise ValueError(f"{processes} processes cannot be divided into groups of {sequence} x {pipeline}")
        return cls(processes // (sequence * pipeline), sequence, pipeline)

    @property
    def processes(self) -> int:
        return self.data * self.sequence * self.pipeline

    @property
    def replicas(self) -> int:
        """Processes that hold the same stage; their gradients are summed."""
        return self.data * self.sequence

    def rank_of(self, place: Place) -> int:
        return (place.stage * self.data + place.data_rank) * self.sequence + place.sequence_rank

    def place_of(self, rank: int) -> Place:
        """
        Raises:
            ValueError: there is no such rank.
        """
        if not 0 <= rank < self.processes:
            raise ValueError(f"rank {rank}: there are only {self.processes} processes")
        replica, sequence_rank = divmod(rank, self.sequence)
        return Place(*divmod(replica, self.data), sequence_rank)

    def sequence_group(self, rank: int) -> list[int]:
        """The ranks that share the tokens of each chunk with this one, in the order of the tokens."""
        place = self.place_of(rank)
        return [self.rank_of(Place(place.stage, place.data_rank, other)) for other in range(self.sequence)]

    def pipeline_group(self, rank: int) -> list[int]:
        """The ranks of all stages of this rank's pipeline, in order."""
        place = self.place_of(rank)
        return [self.rank_of(Place(stage, place.data_rank, place.sequence_rank)) for stage in range(self.pipeline)]

    def replica_group(self, rank: int) -> list[int]:
        """The ranks that hold the same stage as this one."""
        first = self.place_of(rank).stage * self.replicas
        return list(range(first, first + self.replicas))

    def __str__(self) -> str:
        axes = (("data", self.data), ("sequence", self.sequence), ("pipeline", self.pipeline))
        return " x ".join(f"{name} {size}" for name, size in axes if size > 1) or "one process"


def key_value_copies(attention_heads: int, kv_heads: int, sequence: int) -> int:
    """How many ranks of a sequence-parallel group hold each key and value head, when its heads are divided among them.

    1 where each rank has heads of its own. Fewer heads than ranks are repeated, as DeepSpeed-Ulysses does for grouped
    queries; each rank then holds one.

    Raises:
        ValueError: the heads cannot be divided among so many ranks; says among how many they can.
    """
    if attention_heads % sequence == 0 and kv_heads % sequence == 0:
        return 1
    if attention_heads % sequence == 0 and sequence % kv_heads == 0:
        return sequence // kv_heads
    sizes = [size for size in range(1, attention_heads + 1) if attention_heads % size == 0]
    possible = [size for size in sizes if kv_heads % size == 0 or size % kv_heads == 0]
    raise ValueError(
        f"{attention_heads} attention heads and {kv_heads} key and value heads cannot be divided among {sequence} "
        f"ranks, but among {', '.join(map(str, possible))}"
    )
