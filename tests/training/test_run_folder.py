"""The folder of a run, and which run it continues."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from chunkflow_cli.config.load import load
from chunkflow_cli.errors import UsageError
from chunkflow_cli.training.run_folder import CONFIG, open_run_folder


def test_a_run_that_an_earlier_version_began_goes_on(tmp_path: Path) -> None:
    """Its configuration holds keys that are gone; they never changed what is computed."""
    words = ["recipe=tiny_random", f"train.output_dir={tmp_path}"]
    open_run_folder(load(words)).close()
    old = OmegaConf.to_container(OmegaConf.load(tmp_path / CONFIG))
    assert isinstance(old, dict)
    del old["cluster"]
    old["chunk"]["k_per"] = "sequence"
    old["parallel"] |= {"schedule": "interleaved", "parts": 2}
    old["tune"] |= {"k_per": ["run", "sequence"], "pipelines": [1, 2], "sequences": [], "gpus_per_node": 8}
    OmegaConf.save(OmegaConf.create(old), tmp_path / CONFIG)
    open_run_folder(load([*words, "cluster.pipelines=[1,2]", "chunk.k=2"])).close()
    with pytest.raises(UsageError, match=r"different: train\.seed"):
        open_run_folder(load([*words, "train.seed=7"]))
