"""Identify a run: the samples it trains on, their order, and the model that it starts from.

A run can resume only with the same identity, because otherwise its position in the data means nothing. The identity is
kept in its folder (identity.json) and in each checkpoint (state.json), and compared before the first step.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from chunkflow_cli.config.keys import as_written
from chunkflow_cli.config.schema import Config, Task
from chunkflow_cli.data.tokenized import TokenizedData
from chunkflow_cli.errors import RunError
from chunkflow_cli.model.identity import adapter_files, changed_files, model_files
from chunkflow_cli.training.inputs import RunData

SHOWN = 5
"""Maximum number of files that a refusal lists."""


@dataclass(frozen=True)
class FileShare:
    """The samples of one file of the data."""

    file: str
    samples: int
    tokens: int
    content: str
    """Hash of their tokens and targets, in order."""

    def __str__(self) -> str:
        return f"{self.samples:,} samples, {self.tokens:,} tokens (fingerprint {self.content[:8]})"


@dataclass(frozen=True)
class RunIdentity:
    """The facts that must stay the same from the first step of a run to its last."""

    trained_on: tuple[FileShare, ...]
    held_out: tuple[FileShare, ...]
    order: dict[str, Any]
    """The keys that decide which samples a step takes, and their values."""
    ingredients: dict[str, str | None]
    """Hashes of the data's bytes and of the tokenizer: they explain a difference, and are not compared themselves."""
    model: dict[str, str]
    """File of the model -> its size and hash; of weights, a part is hashed."""
    adapter: dict[str, str] = field(default_factory=dict)
    """The same of the adapter in `model.lora.path`. Runs of earlier versions have none."""

    @property
    def samples(self) -> int:
        """Number of samples to train on in an epoch."""
        return sum(share.samples for share in self.trained_on)

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any, file: Path) -> RunIdentity:
        """Return the identity that was written to a file.

        Raises:
            RunError: it is damaged; names the file.
        """
        try:
            shares = {name: tuple(FileShare(**share) for share in value[name]) for name in ("trained_on", "held_out")}
            return cls(**{**value, **shares})
        except (TypeError, KeyError) as error:
            raise RunError(f"{file} is damaged: it does not hold the identity of a run") from error


def identify(config: Config, data: RunData) -> RunIdentity:
    """Return the identity of the run with this configuration over this data."""
    train = config.train
    order: dict[str, Any] = {"train.global_batch_size": train.global_batch_size, "train.shuffle": train.shuffle}
    if train.global_batch_tokens is not None:
        order["train.global_batch_tokens"] = train.global_batch_tokens
    for source in config.data.sources:
        if source.weight is not None:
            order[f"data.sources[{source.name}].weight"] = source.weight
    if train.shuffle:
        order["train.seed"] = train.seed
    if train.task is not Task.sft:  # what is learned, too: the reference stays that of the first step
        learnt = asdict(config.preference)
        del learnt["share_prompts"]  # it changes rounding only
        order |= {"train.task": train.task.value, "preference": as_written(learnt)}
    return RunIdentity(
        order=order,
        ingredients=_ingredients(data.read),
        trained_on=_shares(data.train),
        held_out=_shares(data.evaluation),
        model=model_files(config.model),
        adapter=adapter_files(config.model),
    )


def differences(was: RunIdentity, now: RunIdentity) -> list[str]:
    """Return what differs between the run that began and the one that is to go on, a line each with both values.

    A continuation may hold out samples where the run before did not.
    """
    lines = [
        f"{key} was {was.order.get(key)} and is {now.order.get(key)}"
        for key in sorted(was.order.keys() | now.order.keys())
        if was.order.get(key) != now.order.get(key)
    ]
    changed = list(_changed(was.trained_on, now.trained_on))
    if changed:
        lines += [f"the data has changed: {_reason(was, now)}", *_at_most(changed)]
    if was.held_out and (changed := list(_changed(was.held_out, now.held_out))):
        lines += ["the held-out data has changed", *_at_most(changed)]
    lines += [f"model.path has changed: {line}" for line in changed_files(was.model, now.model)]
    if was.adapter:
        lines += [f"model.lora.path has changed: {line}" for line in changed_files(was.adapter, now.adapter)]
    return lines


def _shares(data: TokenizedData) -> tuple[FileShare, ...]:
    """Return the samples of each file, in the order in which they are read."""
    return tuple(share for number in range(len(data.wholes)) for share in _shares_of_source(data, number))


def _shares_of_source(data: TokenizedData, number: int) -> Iterator[FileShare]:
    samples, whole = data.samples_of(number), data.wholes[number]
    if not len(samples):
        return
    indices, own_lengths = data.indices[samples], data.lengths[samples]
    files, digests = whole.entry.files[indices], np.asarray(whole.entry.digests[indices])
    starts = [0, *(np.flatnonzero(np.diff(files)) + 1).tolist(), len(files)]
    for start, stop in itertools.pairwise(starts):
        lengths = np.ascontiguousarray(own_lengths[start:stop], np.int64)
        content = hashlib.blake2b(np.ascontiguousarray(digests[start:stop]).tobytes(), digest_size=8)
        content.update(lengths.tobytes())
        file = whole.location(int(indices[start])).file
        # Two sources may read the same file.
        name = file if whole.name is None else f"{whole.name}: {file}"
        yield FileShare(name, stop - start, int(lengths.sum()), content.hexdigest())


def _ingredients(data: TokenizedData) -> dict[str, str | None]:
    metas = [json.loads((whole.entry.folder / "meta.json").read_text(encoding="utf-8")) for whole in data.wholes]
    if len(metas) == 1:
        return {name: metas[0].get(name) for name in ("source", "tokenizer")}
    return {name: " ".join(str(meta.get(name)) for meta in metas) for name in ("source", "tokenizer")}


def _reason(was: RunIdentity, now: RunIdentity) -> str:
    """Say why the samples differ, as far as the hashes of what they were made from tell."""
    same = {name for name, value in now.ingredients.items() if was.ingredients.get(name) == value}
    if "source" not in same:
        return "its files hold something else"
    if "tokenizer" not in same:
        return "its files are the same, the tokenizer or its chat template is not"
    return "its files and the tokenizer are the same, the tokens are not (other data.* keys, or a template with a date)"


def _changed(was: Sequence[FileShare], now: Sequence[FileShare]) -> Iterator[str]:
    if [share.content for share in was] == [share.content for share in now]:
        return  # files may have been renamed or moved
    before, after = ({share.file: share for share in shares} for shares in (was, now))
    found = False
    for file in [*before, *(file for file in after if file not in before)]:
        old, new = before.get(file), after.get(file)
        if old is None or new is None or old.content != new.content:
            found = True
            yield f"  {file}: was {old or 'not there'}, is {new or 'not there'}"
    if not found:
        yield f"  its files are read in another order: {', '.join(after)}"


def _at_most(lines: list[str]) -> list[str]:
    return lines if len(lines) <= SHOWN else [*lines[:SHOWN], f"  and {len(lines) - SHOWN} more files"]
