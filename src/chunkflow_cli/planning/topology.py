"""Place each process of a run: its data-parallel rank, its sequence-parallel rank and its pipeline stage.

    rank = (stage * data + data_rank) * sequence + sequence_rank

The processes of a sequence-parallel group are neighbors (on one node, where links are fastest), and the stages of a
pipeline are farthest apart, because they exchange the least. DeepSpeed's pipeline grid has the same order. Its "data"
axis is data and sequence together, because gradients are summed over both.
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
    """The number of processes along each axis."""

    data: int = 1
    sequence: int = 1
    pipeline: int = 1

    def __post_init__(self) -> None:
        for name in ("data", "sequence", "pipeline"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @classmethod
    def of(cls, processes: int, *, sequence: int = 1, pipeline: int = 1) -> Topology:
        """Return the topology in which data parallelism takes the processes that the other axes leave over.

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
        """Number of processes that hold the same stage; their gradients are summed."""
        return self.data * self.sequence

    def rank_of(self, place: Place) -> int:
        """Return the rank with these coordinates."""
        return (place.stage * self.data + place.data_rank) * self.sequence + place.sequence_rank

    def place_of(self, rank: int) -> Place:
        """Return the coordinates of a rank.

        Raises:
            ValueError: there is no such rank.
        """
        if not 0 <= rank < self.processes:
            raise ValueError(f"rank {rank}: there are only {self.processes} processes")
        replica, sequence_rank = divmod(rank, self.sequence)
        return Place(*divmod(replica, self.data), sequence_rank)

    def sequence_group(self, rank: int) -> list[int]:
        """Return the ranks that share the tokens of each chunk with this one, in the order of the tokens."""
        first = rank - self.place_of(rank).sequence_rank
        return list(range(first, first + self.sequence))

    def pipeline_group(self, rank: int) -> list[int]:
        """Return the ranks of all stages of this rank's pipeline, in order."""
        return list(range(rank % self.replicas, self.processes, self.replicas))

    def __str__(self) -> str:
        axes = (("data", self.data), ("sequence", self.sequence), ("pipeline", self.pipeline))
        return " x ".join(f"{name} {size}" for name, size in axes if size > 1) or "one process"


def key_value_copies(attention_heads: int, kv_heads: int, sequence: int) -> int:
    """Return how many ranks of a sequence-parallel group hold each key and value head, when they divide the heads.

    1 if each rank has heads of its own. Fewer heads than ranks are repeated, as DeepSpeed-Ulysses does for grouped
    queries; each rank then holds one.

    Raises:
        ValueError: the heads cannot be divided among that many ranks; names the numbers that work.
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
