"""The command line in processes of its own: exit codes, stdout and stderr."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from chunkflow_cli.cli import train
from chunkflow_cli.cli.app import app
from chunkflow_cli.cli.main import main
from chunkflow_cli.errors import RunError
from chunkflow_cli.execution.loss import LogitTransform

pytestmark = pytest.mark.processes


def chunkflow(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "chunkflow_cli", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_help_imports_nothing_heavy() -> None:
    """`--help` must be fast; importing torch alone takes two seconds."""
    code = (
        "import sys; from chunkflow_cli.cli.app import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'hydra', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_the_printed_configuration_is_a_recipe_that_gives_the_same_one(tmp_path: Path) -> None:
    run = chunkflow("train", "recipe=tiny_random", "chunk.size=64", "--cfg", "job", "--resolve", cwd=tmp_path)
    assert run.returncode == 0
    (tmp_path / "again.yaml").write_text(run.stdout)
    again = chunkflow("train", "recipe=again.yaml", "--cfg", "job", "--resolve", cwd=tmp_path)
    assert again.stdout == run.stdout
    assert "size: 64" in run.stdout


def test_wrong_key_exits_2_in_a_few_lines(tmp_path: Path) -> None:
    run = chunkflow("train", "recipe=tiny_random", "chunk.sise=4", cwd=tmp_path)
    assert run.returncode == 2
    assert run.stdout == ""
    assert "did you mean chunk.size?" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "outputs").exists()


def test_a_terminal_without_a_size_gets_all_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some set COLUMNS=0, in which rich prints nothing."""
    monkeypatch.setenv("COLUMNS", "0")
    assert "tiny_random" in chunkflow("recipes", "list", cwd=tmp_path).stdout


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    assert "Traceback" in chunkflow("train", "chunk.sise=4", "--debug", cwd=tmp_path).stderr


def test_missing_model_and_data_are_named_together(tmp_path: Path) -> None:
    """All missing values are reported at once, not one after the other."""
    run = chunkflow("train", "recipe=qwen7b", "model.path=./weights", cwd=tmp_path)
    assert run.returncode == 2
    assert "model.path=./weights" in run.stderr
    assert "data.path is not set" in run.stderr
    assert len(run.stderr.splitlines()) <= 8


def test_what_is_missing_is_told_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "A document."}\n')
    for words in (["model.path=no/such-model", "data.path=rows.jsonl"], ["data.path=rows.jsonl"]):
        code = (
            "import sys; from chunkflow_cli.cli.app import app\n"
            f"try: app({['train', *words]!r})\n"
            "except SystemExit as end: assert end.code == 2\n"
            "heavy = {'torch', 'transformers', 'deepspeed'} & set(sys.modules)\n"
            "assert not heavy, heavy"
        )
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        assert "error: model.path" in run.stderr


@pytest.mark.parametrize("words", [[], ["recipes"]])
def test_a_command_without_words_prints_its_help_once(words: list[str], tmp_path: Path) -> None:
    run = chunkflow(*words, cwd=tmp_path)
    assert run.returncode == 2
    assert run.stdout.count("Usage:") == 1
    assert run.stderr == ""


def test_verify_prints_one_json_object_and_nothing_else(tmp_path: Path) -> None:
    run = chunkflow("verify", "recipe=tiny_random", "chunk.size=64", "chunk.k=2", "model.dtype=bfloat16",
                    "verify.length=150", "verify.dtype=float32", "--json", cwd=tmp_path)  # fmt: skip
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["length"] == 150
    assert result["passed"] is True
    assert result["grad_rel_error"] <= 2e-6
    assert (result["chunk_size"], result["k"], result["dtype"]) == (64, 2, "float32")
    promised = {"passed", "loss_whole", "loss_chunked", "loss_rel_error", "grad_rel_error"}
    assert promised | {"grad_max_rel_error_parameter", "dtype", "tolerance", "chunk_size", "k", "length"} <= set(result)


def test_verify_in_float64_with_adapters(tmp_path: Path) -> None:
    run = chunkflow(
        "verify", "recipe=tiny_random", "chunk.size=50", "model.dtype=float64", "model.attention=reference",
        "model.lora.enabled=true", "model.activation_checkpointing=full", "--json", cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["grad_rel_error"] <= 1e-12
    assert "lora_" in result["grad_max_rel_error_parameter"]


def test_verify_lets_float64_decide_if_float32_rounds_too_much(tmp_path: Path) -> None:
    """Weights this large saturate the scores of attention: rounding alone then moves the gradient."""
    asset = Path(__file__).parents[2] / "src/chunkflow_cli/assets/tiny_random/config.json"
    (tmp_path / "config.json").write_text(json.dumps({**json.loads(asset.read_text()), "initializer_range": 1.0}))
    words = ["verify", "recipe=tiny_random", f"model.path={tmp_path}", "chunk.size=50", "--json"]
    decided = CliRunner().invoke(app, words)
    assert "comparing again in float64" in decided.stderr
    assert decided.exit_code == 0
    assert json.loads(decided.stdout)["dtype"] == "float64"
    asked = CliRunner().invoke(app, [*words, "verify.dtype=float32"])
    assert asked.exit_code == 1
    assert json.loads(asked.stdout)["grad_rel_error"] > 1e-5


def test_verify_of_a_model_that_chunks_cannot_follow_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The exit code is 1 if chunked training is not exact. Here chunks forget what the scale of the logits is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("chunkflow_cli.execution.chunk_model.logit_transform", lambda _: LogitTransform(2.0, None))
    monkeypatch.setattr(sys, "argv", ["chunkflow", "verify", "recipe=tiny_random", "chunk.size=50"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    assert "failed: chunked training of this model differs" in capfd.readouterr().out


def test_train_in_any_directory_with_json(tmp_path: Path) -> None:
    """One JSON object on stdout, no color codes or noise on stderr, and the promised files."""
    run = chunkflow("train", "recipe=tiny_random", "train.steps=2", "train.output_dir=run", "--json", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report == json.loads((tmp_path / "run" / "report.json").read_text())
    assert "\x1b[" not in run.stderr
    for name in (".hydra/config.yaml", ".hydra/overrides.yaml", "metrics.jsonl", "final/model.safetensors"):
        assert (tmp_path / "run" / name).is_file()
    noise = [
        line for line in run.stderr.splitlines() if "WARN" in line or "deepspeed" in line.lower() or "it/s" in line
    ]
    assert not noise


def test_multirun_runs_each_combination(tmp_path: Path) -> None:
    run = chunkflow(
        "train", "recipe=tiny_random", "-m", "chunk.size=64,128", "train.steps=1", "train.guard=false",
        "train.output_dir=sweep", cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    table = [line.split() for line in run.stdout.splitlines()[-3:]]
    assert table[0] == ["run", "with", "loss", "held-out"]
    assert [row[:2] for row in table[1:]] == [["sweep/0", "chunk.size=64"], ["sweep/1", "chunk.size=128"]]
    assert all(float(loss) > 0 for row in table[1:] for loss in row[2:])
    losses = [json.loads((tmp_path / "sweep" / n / "metrics.jsonl").read_text())["loss"] for n in ("0", "1")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_multirun_reports_every_run_also_if_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = iter([0, 1])

    def run_job(words: list[str], number: int, *, show_output: bool) -> int:
        code = next(codes)
        if code == 0:
            Path(f"sweep/{number}").mkdir(parents=True, exist_ok=True)
            Path(f"sweep/{number}/report.json").write_text('{"loss_last": 1.5, "eval_loss_end": null}')
        return code

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "_run_job", run_job)
    words = ["recipe=tiny_random", "chunk.size=64,128", "train.output_dir=sweep"]
    with pytest.raises(RunError, match="1 of 2 runs failed: sweep/1"):
        train.run_sweep(words, config_dir=None, json_output=False)
    one, two = capsys.readouterr().out.splitlines()[1:]
    assert one.split() == ["sweep/0", "chunk.size=64", "1.5000"]
    assert two.split() == ["sweep/1", "chunk.size=128", "failed,", "exit", "code", "1"]
    codes = iter([0])
    found = train.run_sweep([*words[:1], "chunk.size=32", "train.output_dir=sweep2"], config_dir=None, json_output=True)
    assert capsys.readouterr().out == ""
    assert [run["overrides"][1] for run in found["runs"]] == ["chunk.size=32"]
    assert found["runs"][0]["exit_code"] == 0


def test_a_finished_run_is_neither_run_again_nor_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands that do not train run in this process."""
    monkeypatch.chdir(tmp_path)
    words = ["train", "recipe=tiny_random", "train.steps=1", "train.output_dir=run", "train.guard=false"]
    assert chunkflow(*words, cwd=tmp_path).returncode == 0
    start = time.time()
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 0
    assert "finished already" in again.stderr
    assert Path("run/metrics.jsonl").stat().st_mtime < start
    other = CliRunner().invoke(app, [*words, "optim.lr=0.5"])
    assert other.exit_code == 2
    assert "optim.lr was 0.001 and is 0.5" in other.stderr
    assert chunkflow(*words, "optim.lr=0.5", "checkpoint.resume=never", cwd=tmp_path).returncode == 0
    assert len(list(tmp_path.glob("run.before-*/final"))) == 1


def test_train_names_what_it_trains_and_checks_the_data_before_torch(tmp_path: Path) -> None:
    """The import of torch takes seconds. Here it fails, and is not missed; stdout stays for the result."""
    code = (
        "import sys; sys.modules['torch'] = None; from chunkflow_cli.cli.main import main\n"
        "sys.argv = ['chunkflow', 'train', 'recipe=tiny_random', 'model.path=a [b]', *sys.argv[1:]]; main()"
    )
    (tmp_path / "my [bold]chats.jsonl").write_text('{"input_ids": [5, 6]}\n{"input_ids"\n')
    words = ["data.path=my [bold]chats.jsonl", "data.format=tokens", "--json"]
    run = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout) == (2, "")
    said, error, place, remedy = run.stderr.splitlines()
    assert said == "recipe tiny_random: training a [b] on my [bold]chats.jsonl"
    assert error == "error: data.path=my [bold]chats.jsonl: 1 of 2 rows cannot be trained on"
    assert place.startswith("  my [bold]chats.jsonl:2: not valid JSON")
    assert "data.bad_rows=skip" in remedy
    assert [path.name for path in tmp_path.iterdir()] == ["my [bold]chats.jsonl"]
