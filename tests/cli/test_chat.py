"""`chat` says what plain transformers and peft generate, with the template and the stop tokens of the run."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chunkflow_cli.cli import chat, export
from chunkflow_cli.cli.finished_run import FinishedRun
from chunkflow_cli.config.schema import LoraConfig, ModelConfig
from chunkflow_cli.errors import RunError, UsageError
from chunkflow_cli.model.adapter_saving import adapter_card, save_adapters
from chunkflow_cli.model.adapters import add_lora
from chunkflow_cli.model.folder import CHECKSUMS, write_checksums
from chunkflow_cli.model.saving import save_generation
from support.hub import serve_hub
from support.tokenizers import CHATML, make_tokenizer

SYSTEM = "{% if mood %}{{ '<|im_start|>system\n' + mood + '<|im_end|>\n' }}{% endif %}" + CHATML
END = 257
"""The token at which answers of the run end; the base model stops at none."""


@pytest.fixture
def make_run(tiny_model: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """`make_run(template=..., lora=...)`: the folder of a finished run of a model with a token a byte."""

    def make(*, template: str | None = SYSTEM, lora: bool = False) -> Path:
        folder, base = tmp_path / "run", tmp_path / "base"
        model = tiny_model("llama", vocab_size=264, initializer_range=0.5)
        model.generation_config.eos_token_id = model.generation_config.bos_token_id = None
        model.save_pretrained(base)
        if lora:
            adapted = add_lora(AutoModelForCausalLM.from_pretrained(base), LoraConfig(enabled=True, r=4))
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
            weights = {name: value for name, value in adapted.state_dict().items() if "lora_" in name}
            save_adapters(adapted, folder / "final", weights, adapter_card(ModelConfig(path=str(base)), adapted))
        else:
            model.save_pretrained(folder / "final")
        model.generation_config.eos_token_id = [END]
        save_generation(folder / "final", model.generation_config)
        make_tokenizer(folder / "final", template=template)
        write_checksums(folder / "final")
        (folder / ".hydra").mkdir()
        config = {
            "model": {"path": str(base), "dtype": "float32"}, "train": {"seed": 0, "output_dir": str(folder)},
            "data": {"path": "/home/someone/secret/chats.jsonl", "template_arguments": {"mood": "calm"}},
        }  # fmt: skip
        (folder / ".hydra" / "config.yaml").write_text(json.dumps(config))
        return folder

    return make


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)


def plain(run: Path, text: str, tokens: int, *, lora: bool) -> str:
    """What transformers and peft say themselves."""
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    if lora:
        from peft import AutoPeftModelForCausalLM

        model = AutoPeftModelForCausalLM.from_pretrained(str(run / "final"))
    else:
        model = AutoModelForCausalLM.from_pretrained(run / "final")
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    out = model.eval().generate(**inputs, max_new_tokens=tokens, eos_token_id=END, pad_token_id=END)
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("lora", [False, True])
def test_one_answer_with_the_template_of_the_run(
    lora: bool, make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(lora=lora)
    written = "<|im_start|>system\ncalm<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    expected = plain(run, written, 12, lora=lora)
    assert expected
    capsys.readouterr()  # of libraries
    said = chat.run(str(run), prompt="Hi", max_tokens=12)
    assert said == {"prompt": "Hi", "answer": expected}
    assert capsys.readouterr().out == expected + "\n"
    assert chat.run(str(run), prompt="Hi", max_tokens=12, json_output=True) == said
    assert capsys.readouterr().out == ""


def test_a_model_without_a_template_completes_text(make_run: Callable[..., Path]) -> None:
    run = make_run(template=None)
    said = chat.run(str(run), prompt="Once upon", max_tokens=9)
    assert said == {"prompt": "Once upon", "answer": plain(run, "Once upon", 9, lora=False)}


def test_ctrl_c_ends_an_answer_and_ctrl_d_the_chat(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter(["Hi", KeyboardInterrupt, "  ", "And?", "x" * 99, "Hi", EOFError])
    asked: list[list[dict[str, str]]] = []

    def type_it(_: str) -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    def generate(talk: Any, streamer: Any, **_: Any) -> None:
        streamer.on_finalized_text("I am")
        if len(asked) == 1:
            raise KeyboardInterrupt
        streamer.on_finalized_text(" fine", stream_end=True)

    run = make_run()
    monkeypatch.setattr("builtins.input", type_it)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    model, tokenizer = chat.load(FinishedRun.at(str(run)))
    monkeypatch.setattr(type(model), "generate", generate)
    model.config.max_position_embeddings = 150
    written = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda messages, **more: (asked.append(messages), written(messages, **more))[1]
    chat.talk_until_the_end(chat.Talk(model, tokenizer, {}, 5))
    user, assistant = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "I am"})
    more = {"role": "user", "content": "And?"}
    fine = {"role": "assistant", "content": "I am fine"}
    assert asked[:2] == [[user], [user, assistant, more]]
    assert asked[2][:-1] == [user, assistant, more, fine]
    assert asked[3:] == [[user]], "too long: the chat starts over"
    printed = capsys.readouterr()
    assert printed.out == "I am …\nI am fine\nI am fine\n"
    assert "and the model takes at most 150; the chat starts over" in printed.err


def test_an_exported_model_answers_as_its_run(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run(template=CHATML, lora=True)
    export.run(str(run), output=str(tmp_path / "merged"), merge=True)
    said = [chat.run(str(folder), prompt="Hi", max_tokens=6, json_output=True) for folder in (run, tmp_path / "merged")]
    assert said[0] == said[1]
    export.run(str(run), output=str(tmp_path / "adapter"), merge=False)
    with pytest.raises(UsageError, match="it holds adapters without their run"):
        chat.run(str(tmp_path / "adapter"), prompt="Hi", max_tokens=6)


def test_what_cannot_chat_is_refused(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run()
    with pytest.raises(UsageError, match="--json prints one answer: add --prompt TEXT"):
        chat.run(str(run), prompt=None, max_tokens=9, json_output=True)
    settings = run / "final" / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"max_position_embeddings": 32}))
    with pytest.raises(UsageError, match=r"this is \d+ tokens, and the model takes at most 32"):
        chat.run(str(run), prompt="Hi", max_tokens=9)
    for file in (run / "final").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UsageError, match="has no tokenizer"):
        chat.run(str(run), prompt="Hi", max_tokens=9)
    with pytest.raises(UsageError, match="is not the folder of a finished run"):
        chat.run(str(tmp_path), prompt="Hi", max_tokens=9)


def test_what_is_no_run_or_damaged_is_said(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run()
    for folder, hint in (
        ("none", "no such folder"),
        ("run/final", "that it belongs to, .*run"),
        ("base", "name the"),
    ):
        with pytest.raises(UsageError, match=f"not the folder of a finished run.*\n.*{hint}"):
            FinishedRun.at(str(tmp_path / folder))
    with pytest.raises(UsageError, match="is inside of"):
        export.run(str(run), output=str(run / "final" / "x"), merge=False)
    with pytest.raises(UsageError, match="--prompt is not valid UTF-8"):
        chat.run(str(run), prompt="\udcff", max_tokens=1)
    flip_a_bit(run / "final" / "model.safetensors")
    with pytest.raises(RunError, match=r"is damaged: .*model.safetensors is damaged: its content is not what was"):
        FinishedRun.at(str(run))
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        (run / "final" / name).write_text("{")
        with pytest.raises(RunError, match=rf"the result of this run is damaged: .*{name}"):
            FinishedRun.at(str(run))
    (run / ".hydra" / "config.yaml").write_text("- a")
    with pytest.raises(UsageError, match=r"config.yaml is damaged: it is not the configuration of a run"):
        FinishedRun(run).config["model"]


def test_damage_in_the_numbers_of_an_adapter_is_found_after_an_export(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    export.run(str(make_run(lora=True)), output=str(tmp_path / "copy"), merge=False)
    flip_a_bit(tmp_path / "copy" / "adapter_model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(UsageError, match=r"model.lora.path=.*copy: adapter_model.safetensors is damaged"):
        add_lora(base, LoraConfig(enabled=True, path=str(tmp_path / "copy")))


def test_a_merge_stops_where_the_run_learnt_to(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run(lora=True)
    export.run(str(run), output=str(tmp_path / "merged"), merge=True)
    assert set(json.loads((tmp_path / "merged" / CHECKSUMS).read_text())) == {"model.safetensors", "tokenizer.json"}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.generation_config.eos_token_id == [END]
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "chats.jsonl" in card
    assert "secret" not in card
    assert str(tmp_path) not in card


def test_push_to_hub(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real library uploads to a server of this machine."""
    run, target = make_run(), tmp_path / "exported"
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)

    def push(repository: str = "me/mine", **more: Any) -> dict[str, Any]:
        return export.run(str(run), output=str(target), merge=False, push_to_hub=repository, **more)

    with pytest.raises(UsageError, match=r"--push-to-hub=me/mine: you are not logged in to the hub\n  hf auth login"):
        push()
    with pytest.raises(UsageError, match="--push-to-hub=a/b/c is not the name of a repository"):
        push("a/b/c")
    assert push(dry_run=True)["repository"] == "me/mine"
    said = capsys.readouterr().err
    assert (
        "Would upload it to https://huggingface.co/me/mine, a private repository if it is new\nLog in to the hub first"
        in said
    )
    assert "  model.safetensors  " in said
    assert not target.exists(), "a dry run writes nothing"
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # files over a protocol that is public
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with serve_hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        assert push()["url"] == f"{hub.address}/me/mine"
    assert hub.created == {"name": "mine", "organization": "me", "visibility": "private"}
    assert hub.tokens == {"Bearer hf_x"}
    assert hub.message == "Upload a model trained with chunkflow"
    assert hub.files == {
        str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()
    }
    assert hub.files["README.md"].startswith(b"---\nlibrary_name: transformers\n")
    target = tmp_path / "again"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        UsageError,
        match=r"the upload failed: .*Connection refused\n  the model is in \S+again; to try again: hf upload",
    ):
        push()


def test_the_card_tells_what_was_trained(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run()
    report = {
        "samples_read": 1000, "samples_held_out": 100, "samples_rejected": 0, "samples_trained": 1800,
        "tokens_trained": 123456, "target_tokens_trained": 23456, "longest_sample": 9999, "steps": 90, "epochs": 2.0,
        "loss_first": 2.5, "loss_last": 1.25, "eval_loss_start": None, "eval_loss_end": None, "chunks": 40,
        "recomputed_chunks": 10, "chunk_size": 512, "k": 1, "processes": 2, "device": "A | B", "train_seconds": 60.0,
        "peak_memory_bytes": 2**30, "environment": {"torch": "2.13.0"},
    }  # fmt: skip
    (run / "report.json").write_text(json.dumps(report))
    config = json.loads((run / ".hydra" / "config.yaml").read_text())
    config["train"] |= {"global_batch_size": None, "global_batch_tokens": 2000, "task": "dpo"}
    config["data"]["path"] = "<script>.jsonl"
    config["optim"] = {"name": "adamw", "lr": 1e-5, "schedule": "cosine"}
    (run / ".hydra" / "config.yaml").write_text(json.dumps(config))
    export.run(str(run), output=str(tmp_path / "out"), merge=False)
    card = (tmp_path / "out" / "README.md").read_text()
    for line in (
        "| samples | 1,000 read; 1,800 passes; 100 held out |", "| tokens | 123,456, 23,456 of them targets (as planned) |",
        "| steps | 90 of up to 2,000 tokens, 2 epochs |", "| training loss | 2.5000 in the first step, 1.2500 in the last |",
        "| optimizer | adamw, peak learning rate 1e-05, cosine |", r"| hardware | 2 x A \| B, 1 min 0 s |",
        "| data | &lt;script&gt;.jsonl |", "\n- dpo\n",
    ):  # fmt: skip
        assert line in card
    assert "held-out loss" not in card
