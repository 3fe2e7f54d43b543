"""`chunkflow tune-chunk-size`, from the command line to the overrides file that `train` reads."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from chunkflow_cli.cli.app import app
from chunkflow_cli.config.load import load
from chunkflow_cli.errors import UsageError
from chunkflow_cli.model.hf_config import load_config
from chunkflow_cli.planning.devices import DEVICES
from chunkflow_cli.training import tuning
from chunkflow_cli.training.setup import calibration_path, read_setup

pytestmark = pytest.mark.processes

SIZES = "tune.chunk_sizes=[64,128,256]"
PROFILE = "tune.device=h100"
CLUSTER = ["launch.processes=16", "cluster.pipelines=[4,1,2]"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")


def invoke(*words: str) -> Result:
    return CliRunner().invoke(app, ["tune-chunk-size", "recipe=tiny_random", *words])


def tuned(*words: str) -> dict[str, Any]:
    result = invoke(*words, "--json")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_json_has_its_keys_and_the_best_is_the_fastest_that_fits() -> None:
    found = tuned(PROFILE, SIZES)
    keys = {"chunk_size", "k", "step_seconds", "memory_bytes", "fits", "recompute_share", "bubble_ratio"}
    assert all(keys <= set(row) for row in found["candidates"])
    fitting = [row for row in found["candidates"] if row["fits"]]
    assert found["best"] == min(fitting, key=lambda row: row["step_seconds"])
    assert found["candidates"][0]["measured_step_seconds"] is None, "this machine has no H100"
    assert found["explanation"].count(".") >= 1


def test_train_reads_the_file_that_tune_writes() -> None:
    """Overrides on the command line win over those of the file."""
    found = tuned(PROFILE, SIZES, "--output", "mine/tuned.yaml")
    assert found["overrides_file"] == "mine/tuned.yaml"
    words = ["train", "recipe=tiny_random", "--overrides", "mine/tuned.yaml", "--cfg", "job"]
    chosen = CliRunner().invoke(app, words).stdout
    assert f"size: {found['best']['chunk_size']}" in chosen
    assert f"k: {found['best']['k']}" in chosen
    assert "  k: 7" in CliRunner().invoke(app, [*words, "chunk.k=7"]).stdout


def written_words(found: dict[str, Any]) -> list[str]:
    """Return the keys of the file of overrides as words of a command line."""
    tree = yaml.safe_load(Path(found["overrides_file"]).read_text())
    return [f"{section}.{name}={value}" for section, keys in tree.items() for name, value in keys.items()]


def test_by_default_the_file_is_in_the_outputs_of_the_recipe() -> None:
    found = tuned(PROFILE, SIZES)
    assert written_words(found) == [
        f"chunk.size={found['best']['chunk_size']}",
        f"chunk.k={found['best']['k']}",
    ]
    assert found["overrides_file"] == "outputs/tiny_random/tuned.yaml"


def test_candidates_above_the_memory_limit_are_listed_with_their_bytes() -> None:
    everything = tuned(PROFILE, SIZES)["candidates"]
    sizes = sorted(row["memory_bytes"] for row in everything)
    limit = sizes[len(sizes) // 2] / 2**30
    found = tuned(PROFILE, SIZES, f"tune.memory_gib={limit}")
    assert {row["fits"] for row in found["candidates"]} == {True, False}
    assert all(row["fits"] == (row["memory_bytes"] <= limit * 2**30) for row in found["candidates"])
    assert found["best"]["fits"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tune.memory_gib=0.000001", PROFILE, SIZES], "no pair fits into 0.0 GiB: the smallest, chunk.size="),
        (["tune.chunk_sizes=[]", PROFILE], "tune.chunk_sizes is empty"),
        (["tune.ks=[0]", PROFILE], "tune.ks=[0] must be at least 1"),
        (["cluster.network_gb_per_second=0", PROFILE], "cluster.network_gb_per_second=0.0 must be above 0"),
        (["tune.device=h900"], "tune.device=h900 must be one of"),
        (["data.path=", PROFILE], "data.path is not set"),
        (["data.path=nowhere.jsonl", PROFILE], "there is no such file"),
        (["launch.processes=2"], "launch.processes=2: only one process can be measured"),
        (["parallel.pipeline=2"], "parallel.pipeline=2: only one process can be measured"),
        (["cluster.pipelines=[1,2]", "launch.processes=1"], "name the device to predict for"),
        ([PROFILE, "--plot", "grid.txt"], "the name must end in .png"),
        ([PROFILE, "launch.processes=16", "cluster.pipelines=[3]"], "cannot be divided among pipelines of 3 stages"),
        ([PROFILE, "launch.processes=16", "cluster.pipelines=[1,8]"], "cluster.pipelines=8: the model has 4 layers"),
        (
            [PROFILE, *CLUSTER, "tune.memory_gib=0.00001"],
            "no pair fits into 0.0 GiB: the smallest, chunk.size=256 chunk.k=1 on 4 pipelines of 4 stages, needs",
        ),
    ],
)
def test_bad_input_is_a_clear_line_and_exit_2(words: list[str], message: str) -> None:
    result = invoke(*words)
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(("wanted", "seconds", "ran"), [
    (3, 2.0, ["64:1", "64:2"]), (2, 2.0, ["64:1", "64:2"]), (3, 9.0, None),  # half of the budget: 10 s
    (1, 9.0, ["64:1"]), (1, 11.0, None), (0, 1.0, []),
])  # fmt: skip
def test_the_best_pairs_run_or_a_line_says_why_not(
    wanted: int, seconds: float, ran: list[str] | None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def pretend(arguments: list[str], *_: Any) -> None:
        pairs = arguments[arguments.index("--pairs") + 1 : arguments.index("--step")]
        rows = [{"chunk_size": 64, "k": int(pair[-1]), "seconds": 0.5} for pair in pairs]
        Path(arguments[arguments.index("--out") + 1]).write_text(json.dumps(rows))

    monkeypatch.setattr(tuning, "_run_measurement", pretend)
    ranked: Any = [
        SimpleNamespace(chunk_size=size, k=k, step_seconds=seconds, memory_bytes=k, offload_state="none")
        for size, k in ((64, 1), (128, 1), (64, 2))  # the second one plans the same steps as the first
    ]
    facts: Any = SimpleNamespace(setup=SimpleNamespace(calibration=1), search=SimpleNamespace(steps=[0]))
    loaded = load(["recipe=tiny_random", f"tune.measure={wanted}", "tune.budget_seconds=20"])
    found = tuning.measure_best(loaded, None, ranked, facts)
    assert found == {(64, int(pair[-1]), "none"): 0.5 for pair in ran or []}
    assert ("Not measured: a step takes about" in capsys.readouterr().err) == (ran is None)


def test_a_file_without_overrides_is_refused(tmp_path: Path) -> None:
    def read(name: str) -> Any:
        return load(["recipe=tiny_random", f"overrides={tmp_path / name}"]).config

    with pytest.raises(UsageError, match=r"--overrides=.*no\.yaml is not a file"):
        read("no.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UsageError, match="holds no keys"):
        read("list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(UsageError, match="not valid YAML"):
        read("broken.yaml")
    (tmp_path / "nested.yaml").write_text("chunk: {size: 64}\ndata: {max_length: null}\n")
    assert (read("nested.yaml").chunk.size, read("nested.yaml").data.max_length) == (64, None)


def test_the_screen_fits_and_names_the_next_command() -> None:
    result = invoke(PROFILE, "--plot", "grid.png")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "Train with it:  chunkflow train recipe=tiny_random --overrides outputs/tiny_random/tuned.yaml" in lines
    assert lines[1].startswith("predicted for H100 SXM, from its data sheet; nothing was run")
    sentences = [line for line in lines if line.startswith(("A step is predicted", "Train with it"))]
    assert max(len(line) for line in lines if line not in sentences) <= 80
    assert "\x1b" not in result.stdout
    assert Path("grid.png").read_bytes().startswith(b"\x89PNG")


def test_the_printed_command_trains_what_was_searched_for() -> None:
    """It keeps the user's words, quoted, but not those of the search, nor those that would hide what it has found."""
    words = [PROFILE, SIZES, "chunk.k=3", "optim.lr=0.002", "train.output_dir='my run'"]
    command = shlex.split(tuned(*words)["command"])
    assert command[:2] == ["chunkflow", "train"]
    assert command[2:-2] == ["recipe=tiny_random", "optim.lr=0.002", "train.output_dir='my run'"]
    assert command[-2] == "--overrides"
    found = tuned(*words)["best"]
    config = CliRunner().invoke(app, [*command[1:], "--cfg", "job"]).stdout
    assert f"size: {found['chunk_size']}\n  k: {found['k']}\n" in config
    assert "output_dir: my run" in config


def test_only_differences_are_explained() -> None:
    """Where samples are shorter than all chunk sizes tried, none of these is faster."""
    found = tuned(PROFILE, "tune.chunk_sizes=[2048,4096,8192]", "tune.ks=[1]")
    assert found["explanation"].count("as long") == 1
    assert "1.00 times" not in found["explanation"]


# Layouts of a cluster


def test_every_layout_is_ranked_and_the_fullest_stage_holds_less_with_more_stages() -> None:
    found = tuned(PROFILE, SIZES, "tune.ks=[1,2]", *CLUSTER)
    assert found["processes"] == 16
    assert found["device"] == "H100 SXM"
    assert [(row["stages"], row["data_parallel"]) for row in found["layouts"]] == [(1, 16), (2, 8), (4, 4)]
    bytes_of: dict[tuple[int, int], list[int]] = {}
    for row in sorted(found["candidates"], key=lambda row: row["stages"]):
        if row["cuts"] == "tokens":
            bytes_of.setdefault((row["chunk_size"], row["k"]), []).append(row["memory_bytes"])
    assert len(bytes_of) == 6
    for one, two, four in bytes_of.values():
        assert one > two > four
    assert found["best"] == min(found["candidates"], key=lambda row: row["step_seconds"])
    for row in found["layouts"]:
        same = [each["step_seconds"] for each in found["candidates"] if each["stages"] == row["stages"]]
        assert row["step_seconds"] == min(same)


def test_the_configured_cluster_is_planned_for() -> None:
    """Slow links between nodes slow down pipelines and gradients; slow links within a node slow down groups."""
    words = [PROFILE, "tune.chunk_sizes=[128]", "tune.ks=[1]", "launch.processes=8", "cluster.pipelines=[1,4]",
             "cluster.sequences=[1,4]", "tune.cuts=[tokens]"]  # fmt: skip

    def seconds(*described: str) -> dict[tuple[int, int], float]:
        rows = tuned(*words, *described)["candidates"]
        return {(row["sequence"], row["stages"]): row["step_seconds"] for row in rows}

    sheet, network, node = (
        seconds(),
        seconds("cluster.network_gb_per_second=0.01"),
        seconds("cluster.node_gb_per_second=0.01"),
    )
    assert all(network[layout] > sheet[layout] for layout in sheet), "gradients are reduced over all ranks"
    assert {layout for layout in sheet if node[layout] > sheet[layout]} == {(4, 1)}
    across = seconds("cluster.gpus_per_node=2")
    assert {layout for layout in sheet if across[layout] > sheet[layout]} == {(4, 1)}
    assert seconds("cluster.network_gb_per_second=50", "cluster.node_gb_per_second=450") == sheet


def test_the_file_sets_the_stages_if_they_differ_from_the_recipe() -> None:
    found = tuned(PROFILE, "tune.chunk_sizes=[128]", "tune.ks=[1]", "launch.processes=16", "cluster.pipelines=[4]")
    assert "parallel.pipeline=4" in written_words(found)
    back = ["launch.processes=16", "parallel.pipeline=2", "cluster.pipelines=[1]"]
    found = tuned(PROFILE, "tune.chunk_sizes=[128]", "tune.ks=[1]", *back)
    assert "parallel.pipeline=1" in written_words(found)


def test_the_screen_of_a_cluster_fits_and_its_sentences_compare_the_layouts() -> None:
    result = invoke(PROFILE, SIZES, *CLUSTER)
    assert result.exit_code == 0, result.stderr
    assert max(len(line) for line in result.stdout.splitlines() if not line.startswith("Train with it")) <= 80
    words = " ".join(result.stdout.split())
    assert "…" not in invoke(PROFILE, SIZES, *CLUSTER, "cluster.sequences=[1,2]").stdout, (
        "a cut-off column says nothing"
    )
    assert "stages ranks group cuts chunk.size K predicted memory waiting 1 16 1 tokens" in words
    sentences = tuned(PROFILE, SIZES, *CLUSTER)["explanation"]
    number, waits = r"[0-9.e+-]+", "with the wait for the slowest rank, devices are idle"
    assert re.match(
        rf"A step is predicted to take {number} m?s, of which .* % .*; {waits} \d+ % of the time\. ", sentences
    )
    assert re.search(
        rf"\d (ranks without a pipeline|pipelines of \d stages) would take {number} times as long \(", sentences
    )


def test_the_explained_optimizer_step_is_that_of_the_best_layout() -> None:
    """With a profile its time depends on the layout, not on the costs of operations."""
    found = tuned(PROFILE, SIZES, *CLUSTER)
    seconds = {row["stages"]: row["optimizer_seconds"] for row in found["candidates"]}
    assert seconds[1] > seconds[2] > seconds[4] > 0, "fewer weights on a stage"
    share = 100 * found["best"]["optimizer_seconds"] / found["best"]["step_seconds"]
    assert f"{share:.0f} % is the optimizer step" in found["explanation"]


def test_memory_of_a_pipeline_includes_the_longest_sample_even_if_its_step_is_not_sampled(
    tmp_path: Path,
) -> None:
    rows = [{"input_ids": [3] * length} for length in [40, 50, 60, 70, 30, 20, 900, 800]]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "data.path=rows.jsonl", "data.eval_fraction=0", "train.shuffle=false", "train.global_batch_size=2", PROFILE,
        "tune.chunk_sizes=[128]", "tune.ks=[1,2]", "launch.processes=2", "cluster.pipelines=[2]",
    ]  # fmt: skip
    some, everything = tuned(*words, "tune.samples=2"), tuned(*words, "tune.samples=8")
    assert (some["steps_planned"], everything["steps_planned"]) == (1, 4)
    bytes_of = [[row["memory_bytes"] for row in found["candidates"]] for found in (some, everything)]
    assert bytes_of[0] == bytes_of[1]


def test_this_machine_is_measured_once_and_the_best_pairs_run_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure real operations in processes of their own.

    The second search finds the calibration, and so do the ranks of a run, which have fewer threads.
    """
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    words = [SIZES, "tune.ks=[1,2]", "tune.measure=2", "data.num_workers=1"]
    plan = ["plan", "recipe=tiny_random", "data.num_workers=1", "plan.cost_model=measured", "--json"]
    refused = CliRunner().invoke(app, plan)
    assert refused.exit_code == 2
    assert "chunkflow tune-chunk-size with the same recipe and keys" in refused.stderr
    first = tuned(*words)
    assert first["cost_model"].startswith("measured on")
    measured = [row for row in first["candidates"] if row["measured_step_seconds"] is not None]
    assert len(measured) == 2
    assert first["best"]["measured_step_seconds"] == min(row["measured_step_seconds"] for row in measured)
    assert list(Path("cache/chunkflow/calibrations").glob("*.json"))
    result = invoke(*words, "tune.measure=0", "--json")
    assert "Timing chunks" not in result.stderr
    again = json.loads(result.stdout)
    predicted = [row["step_seconds"] for row in again["candidates"]]
    assert predicted == [row["step_seconds"] for row in first["candidates"]]
    costs = json.loads(CliRunner().invoke(app, plan).stdout)["cost_model"]
    assert costs == first["cost_model"], "plan uses what tune-chunk-size has timed"
    train = ["train", *plan[1:-1], "launch.processes=2", "train.steps=1", "train.guard=false", "train.output_dir=run"]
    ranks = subprocess.run([sys.executable, "-m", "chunkflow_cli", *train], capture_output=True, text=True, check=False)
    assert ranks.returncode == 0, ranks.stderr
    other_model = CliRunner().invoke(app, [*plan, "model.dtype=bfloat16"])
    assert other_model.exit_code == 2, "timings of another dtype do not count for this model"


def test_half_a_calibration_is_measured_again() -> None:
    """A full disk may have cut it: it must not stop every later search."""
    config = load(["recipe=tiny_random"]).config
    hf_config, device = load_config(config.model), DEVICES["cpu"]
    path = calibration_path(config, hf_config, device)
    path.parent.mkdir(parents=True)
    path.write_text('{"version": 3, "costs": {"sou')
    measured = []
    with pytest.raises(UsageError, match="has not been measured"):  # the function under test measures with this one
        read_setup(config, hf_config, device, measure=measured.append)
    assert measured == [path]


def test_groups_and_pipelines_are_tried_together_and_the_file_names_both() -> None:
    """Sizes that do not divide the processes together are left out; the others are planned as `train` would."""
    found = tuned(PROFILE, "tune.chunk_sizes=[64]", "tune.ks=[1]", "launch.processes=8", "cluster.sequences=[1,2,4]",
                  "cluster.pipelines=[1,4]")  # fmt: skip
    layouts = [(row["sequence"], row["stages"], row["data_parallel"]) for row in found["layouts"]]
    assert layouts == [(1, 1, 8), (1, 4, 2), (2, 1, 8), (2, 4, 2), (4, 1, 8)]
    words = ["launch.processes=8", "cluster.sequences=[2]", "cluster.pipelines=[4]", "tune.cuts=[time]"]
    found = tuned(PROFILE, "tune.chunk_sizes=[64]", "tune.ks=[1]", *words)
    written = written_words(found)
    assert {"parallel.sequence=2", "parallel.pipeline=4", "chunk.cuts=time"} <= set(written)
    plan = CliRunner().invoke(app, ["plan", "recipe=tiny_random", "launch.processes=8", PROFILE, *written, "--json"])
    planned = json.loads(plan.stdout)
    assert (planned["ranks"], planned["sequence"], planned["pipeline"]["stages"]) == (2, 2, 4)


def test_larger_groups_leave_less_state_and_activations_per_rank() -> None:
    """Without ZeRO, whose buffers at the step are larger than all else of so small a model."""
    words = [PROFILE, "tune.chunk_sizes=[64]", "tune.ks=[1]", "launch.processes=8", "cluster.sequences=[1,2]"]
    words.append("engine.zero_stage=0")
    for pipelines in ("cluster.pipelines=[1]", "cluster.pipelines=[4]"):
        found = tuned(*words, pipelines, "tune.cuts=[tokens]")
        alone, grouped = sorted(found["candidates"], key=lambda row: row["sequence"])
        assert grouped["memory_bytes"] < alone["memory_bytes"]
