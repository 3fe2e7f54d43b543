"""The cache of tokenized data: keys, concurrent builds, damage."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chunkflow_cli.config.schema import BadRows, DataFormat, Overlong, TrainOn
from chunkflow_cli.data import cache as token_cache
from chunkflow_cli.data import parallel
from chunkflow_cli.errors import UsageError
from support.tokenized import bracketed, chat, load, only, start_python, write_rows
from support.tokenizers import CHATML, make_tokenizer


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("chatml"))


def entries(data: Path) -> list[Path]:
    return sorted(path for path in (data.parent / "cache" / "tokens").iterdir() if not path.name.startswith("."))


def forbid_building(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chunkflow_cli.data.dataset.build_entry", lambda *_, **__: pytest.fail("tokenized again"))


def test_policies_do_not_tokenise_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizing a large data set takes an hour. Another maximum length must not repeat it."""
    rows = [{"input_ids": [1, 2, 3]}, {"input_ids": []}, {"input_ids": [1, 2, 3, 4, 5]}]
    data = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(UsageError, match="1 of 3 rows"):
        load(data, vocab=10)
    forbid_building(monkeypatch)
    assert load(data, vocab=10, bad_rows=BadRows.skip).lengths.tolist() == [3, 5]
    assert load(data, vocab=10, bad_rows=BadRows.skip, max_length=4, overlong=Overlong.drop).lengths.tolist() == [3]
    assert load(data, vocab=10, bad_rows=BadRows.skip, format=DataFormat.tokens, num_workers=7).lengths.tolist() == [
        3,
        5,
    ]
    (entry,) = entries(data)
    meta = json.loads((entry / "meta.json").read_text())
    assert (meta["format"], meta["files"], meta["samples"], meta["rejected"]) == ("tokens", [str(data)], 2, 1)


def test_what_changes_the_tokens_changes_the_key(chatml: Path, tmp_path: Path) -> None:
    """A stale cache would train on other data than the user sees."""
    data = write_rows(tmp_path / "a.jsonl", [{"messages": chat("Q", "A")}])
    load(data, chatml)
    load(data, chatml, train_on=TrainOn.all)
    other = make_tokenizer(tmp_path / "model", template=CHATML + "{# a comment changes the template #}")
    assert bracketed(load(data, other)[0], other) == bracketed(load(data, chatml)[0], chatml)
    assert len(entries(data)) == 3
    write_rows(data, [{"messages": chat("Q", "B")}])
    assert "[B<|im_end|>]" in only(load(data, chatml), chatml)
    assert len(entries(data)) == 4
    ids = write_rows(tmp_path / "ids.jsonl", [{"input_ids": [1, 2, 3]}])
    load(ids, vocab=10)
    with pytest.raises(UsageError, match=r"input_ids\[2\] is 3"):
        load(ids, vocab=3)


def test_renamed_files_are_reported_under_their_new_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is found by content, but a location with the old path would name a file that no longer exists."""
    rows = [{"input_ids": [1, 2]}, {"input_ids": []}]
    for name in ("1.jsonl", "2.jsonl"):
        write_rows(tmp_path / "old" / name, rows)
    shared = {"cache_dir": str(tmp_path / "cache"), "bad_rows": BadRows.skip}
    load(tmp_path / "old", **shared)
    (tmp_path / "old").rename(tmp_path / "new")
    (tmp_path / "new" / "2.jsonl").rename(tmp_path / "new" / "3.jsonl")
    forbid_building(monkeypatch)
    data = load(tmp_path / "new", **shared)
    assert [str(data.location(n)) for n in (0, 1)] == [f"{tmp_path}/new/1.jsonl:1", f"{tmp_path}/new/3.jsonl:1"]
    assert [str(where) for where, _ in data.rejected] == [f"{tmp_path}/new/1.jsonl:2", f"{tmp_path}/new/3.jsonl:2"]


@pytest.mark.processes
def test_any_number_of_workers_gives_the_same_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Order and content must not depend on which process was faster."""
    rows = [{"input_ids": list(range(1, 2 + n % 9))} for n in range(4000)]
    data = write_rows(tmp_path / "a.jsonl", rows)
    monkeypatch.setattr(parallel, "BYTES_PER_WORKER", 1)
    for workers in (1, 3):
        load(data, vocab=9, num_workers=workers, bad_rows=BadRows.skip, cache_dir=str(tmp_path / str(workers)))
    (one,), (three,) = ((tmp_path / name / "tokens").iterdir() for name in ("1", "3"))
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in three.iterdir())
    assert len(names) == len(token_cache.ARRAYS) + 3
    for name in names:
        assert (one / name).read_bytes() == (three / name).read_bytes(), name
    assert np.load(three / "offsets.npy").shape == (1 + sum(n % 9 > 0 and n % 9 < 8 for n in range(4000)),)


@pytest.mark.processes
def test_workers_use_the_tokenizer(chatml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"messages": chat("Q", f"answer {n}")} for n in range(600)]
    data = write_rows(tmp_path / "a.jsonl", rows)
    monkeypatch.setattr(parallel, "BYTES_PER_WORKER", 1)
    found = load(data, chatml, num_workers=2)
    assert len(found) == 600
    assert bracketed(found[599], chatml).endswith("<|im_start|>assistant\n[answer 599<|im_end|>]\n")


BUILD = """
    import os, signal, time
    from pathlib import Path
    from chunkflow_cli.config.schema import DataConfig
    from chunkflow_cli.data import cache
    from chunkflow_cli.data.dataset import tokenize
    root = Path({cache!r}) / "tokens"
    rename = cache._rename_unless_taken
    def meddle(building, folder):
        {meddle}
        rename(building, folder)
    cache._rename_unless_taken = meddle
    config = DataConfig(path={data!r}, cache_dir={cache!r})
    data = tokenize(config, model_path="none", model_limit=None, vocab_size=10, trust_remote_code=False)
    print(len(data), data[7].input_ids.tolist())
"""


@pytest.mark.processes
def test_two_processes_that_build_the_same_entry(tmp_path: Path) -> None:
    """Ranks and parallel runs start together: both have a complete entry when the first one renames."""
    data = write_rows(tmp_path / "a.jsonl", [{"input_ids": [n % 9, n % 7]} for n in range(50)])
    wait = "(building / 'ready').touch()\n" + textwrap.indent(
        "while len(list(root.glob('.*/ready'))) < 2 and not folder.exists():\n    time.sleep(0.01)", " " * 8
    )
    code = BUILD.format(cache=str(tmp_path / "cache"), data=str(data), meddle=wait)
    processes = [start_python(code), start_python(code)]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, "50 [7, 0]\n"), err
    assert len(entries(data)) == 1
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1, "the second process cleans up"


@pytest.mark.processes
def test_an_entry_of_a_killed_process_is_never_read(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "a.jsonl", [{"input_ids": [n % 9, n % 7]} for n in range(50)])
    code = BUILD.format(cache=str(tmp_path / "cache"), data=str(data), meddle="os.kill(os.getpid(), signal.SIGKILL)")
    killed = start_python(code)
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert entries(data) == []
    left = {path.name for path in (tmp_path / "cache" / "tokens").iterdir()}
    assert all(name.startswith(".") for name in left), "an incomplete entry is left under a temporary name"
    again = start_python(BUILD.format(cache=str(tmp_path / "cache"), data=str(data), meddle="pass"))
    assert again.communicate(timeout=120)[0] == "50 [7, 0]\n"
    assert [path.name[0] for path in (tmp_path / "cache" / "tokens").iterdir()] != ["."]
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1, "the next process removes it"
    assert load(data, vocab=10).lengths.tolist() == [2] * 50


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    write_rows(tmp_path / "d" / "1.jsonl", [{"input_ids": [1, 2]}] * 200)
    (tmp_path / "d" / "2.json").write_text('[{"input_ids": [1, 2]}, oops]')
    with pytest.raises(UsageError, match=r"2\.json:1: invalid JSON in the array"):
        load(tmp_path / "d", vocab=10)
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


def test_a_damaged_entry_is_an_error(tmp_path: Path) -> None:
    """One flipped bit is another token, which would be trained on without a word."""
    data = write_rows(tmp_path / "a.jsonl", [{"input_ids": [1, 2, 3]}] * 3 + [{"input_ids": []}])
    load(data, vocab=10, bad_rows=BadRows.skip)
    (entry,) = entries(data)
    for file in sorted(entry.iterdir()):
        good = file.read_bytes()
        flipped = good[:-5] + bytes([good[-5] ^ 1]) + good[-4:] if good else b"x"  # no notes: an empty file
        for damaged in (flipped, good[:-1] or b"x", good + b"\n", bytes(max(1, len(good))), None):
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            is_harmless = file.name == "meta.json" and damaged == good + b"\n"
            if not is_harmless:
                with pytest.raises(UsageError, match=r"is damaged: .*\n  delete that folder"):
                    load(data, vocab=10, bad_rows=BadRows.skip)
            file.write_bytes(good)
    assert len(load(data, vocab=10, bad_rows=BadRows.skip)) == 3
    meta = entry / "meta.json"
    meta.write_text(meta.read_text().replace('"largest_id": 3', '"largest_id": 2'))
    with pytest.raises(UsageError, match=r"is damaged: meta\.json is not what was written"):
        load(data, vocab=10)
    shutil.rmtree(entry)
    assert len(load(data, vocab=10, bad_rows=BadRows.skip)) == 3


def test_data_that_changes_while_it_is_tokenised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tokens under the key of the first content would be found there for good."""
    data = write_rows(tmp_path / "a.jsonl", [{"input_ids": [1, 2, 3] * 300}] * 800)  # more than a buffer
    original = data.read_bytes()

    def encode(*args: Any, **settings: Any) -> Any:
        for number, batch in enumerate(parallel.encode_source(*args, **settings)):
            if number == 0:
                data.write_bytes(original[:-5] + b"9" + original[-4:])
            yield batch

    monkeypatch.setattr("chunkflow_cli.data.dataset.encode_source", encode)
    with pytest.raises(UsageError, match=r"a\.jsonl changed while it was read\n"):
        load(data, vocab=10)
    assert entries(data) == []
    monkeypatch.undo()
    data.write_bytes(original)
    again = load(data, vocab=10)
    assert again[799].input_ids[-3:].tolist() == [1, 2, 3]
    assert again.whole.key == again.select([0]).whole.key == entries(data)[0].name


def test_cache_location(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert token_cache.cache_root(None) == tmp_path / "xdg" / "chunkflow" / "tokens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert token_cache.cache_root(None) == Path.home() / ".cache" / "chunkflow" / "tokens"
    (tmp_path / "file").write_text("")
    data = write_rows(tmp_path / "a.jsonl", [{"input_ids": [1, 2]}])
    with pytest.raises(UsageError, match=r"cannot be written to(.|\n)*set data\.cache_dir"):
        load(data, cache_dir=str(tmp_path / "file"))


def test_a_user_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container: no HOME and no entry of the user; an empty HOME; a HOME that is not there."""

    def nameless(_: int) -> None:
        raise KeyError("uid not found")

    data = write_rows(tmp_path / "a.jsonl", [{"input_ids": [1, 2]}])
    monkeypatch.setattr("pwd.getpwuid", nameless)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    for home in (None, ""):
        if home is not None:
            monkeypatch.setenv("HOME", home)
        with pytest.raises(
            UsageError, match=r"HOME is not set, and this user (.|\n)*  set data\.cache_dir=DIR, or HOME$"
        ):
            load(data, cache_dir=None)
    monkeypatch.setenv("HOME", "/proc/nobody")
    with pytest.raises(UsageError, match=r"/proc/nobody/\.cache/chunkflow/tokens: (.|\n)*set data\.cache_dir"):
        load(data, cache_dir=None)
    assert len(load(data)) == 1, "with data.cache_dir there is no need of a home"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_or_read_only_disk_is_told_by_its_key(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the disk says, once, and the key to set. Nothing half written is left, and an entry that is there is read."""
    rows = [{"input_ids": [1, 2, 3]}] * 4
    data = write_rows(tmp_path / "a.jsonl", rows)
    append = token_cache._ArrayFiles.append

    def refuse(files: Any, name: str, values: Any) -> None:
        if files.counts["lines"]:
            raise OSError(number, os.strerror(number))
        append(files, name, values)

    with monkeypatch.context() as patched:
        patched.setattr(token_cache._ArrayFiles, "append", refuse)
        with pytest.raises(UsageError) as error:
            load(write_rows(tmp_path / "b.jsonl", rows * 300), vocab=10)
    assert str(error.value) == (
        f"tokenized data cannot be written to {tmp_path}/cache/tokens: {os.strerror(number)}\n"
        "  set data.cache_dir to a writable folder with enough space"
    )
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []
    load(data)
    with monkeypatch.context() as patched:
        patched.setattr(token_cache._ArrayFiles, "append", refuse)
        assert len(load(data)) == 4


def test_samples_stay_on_disk(tmp_path: Path) -> None:
    """A data set larger than memory must be usable: samples are views of memory-mapped files."""
    data = load(write_rows(tmp_path / "a.jsonl", [{"input_ids": [1, 2, 3]}] * 3), vocab=10)
    for array in (data[1].input_ids, data[1].targets):
        while not isinstance(array, np.memmap):
            assert array.base is not None
            array = array.base
