"""`chunkflow chat`: talk to the model of a run, or another whole model, in the terminal."""

from __future__ import annotations

import readline  # noqa: F401  # gives input() a history and an editor
import signal
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, TextStreamer

from chunkflow_cli.cli.finished_run import FinishedRun
from chunkflow_cli.console import counted, stderr_console, working
from chunkflow_cli.data.tokenizer import load_tokenizer
from chunkflow_cli.errors import UsageError
from chunkflow_cli.model.device import training_device
from chunkflow_cli.model.hf_config import position_limit
from chunkflow_cli.model.loading import quiet_deepspeed
from chunkflow_cli.model.saving import loader_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def run(run_folder: str, *, prompt: str | None, max_tokens: int, json_output: bool = False) -> dict[str, Any] | None:
    """Answer `prompt`. Without a prompt, answer what the user types until Ctrl-D.

    Returns:
        Prompt and answer; None after a chat.

    Raises:
        UsageError: it is no finished run and no model, it has no tokenizer, `--json` has no prompt, or the prompt is
            too long.
    """
    if prompt is not None and not _is_text(prompt):
        raise UsageError("--prompt is not valid UTF-8: type it again, or set the terminal to UTF-8")
    if json_output and prompt is None:
        raise UsageError("--json prints one answer: add --prompt TEXT")
    finished = FinishedRun.or_model_at(run_folder)
    if not finished.has_tokenizer:
        raise UsageError(f"{finished.final} has no tokenizer, so it cannot read text")
    with working(stderr_console(), "loading the model"):
        talk = Talk(*load(finished), finished.config.get("data", {}).get("template_arguments") or {}, max_tokens)
    if prompt is not None:
        answer = talk.answer(prompt, show=not json_output)
        return {"prompt": prompt, "answer": answer}
    talk_until_the_end(talk)
    return None


def _is_text(words: str) -> bool:
    """Return False for what the command line holds of bytes that are not UTF-8."""
    try:
        words.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


@dataclass
class Talk:
    """A model and the conversation so far."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template_arguments: dict[str, Any]
    """The arguments that the run used, because the model learned the text that the template writes with them."""
    max_tokens: int
    """Maximum number of tokens in an answer."""
    said: list[dict[str, str]] = field(default_factory=list)

    @property
    def is_chat(self) -> bool:
        """True if the model has a chat template; otherwise it completes text."""
        return self.tokenizer.chat_template is not None

    def answer(self, text: str, *, show: bool = True) -> str:
        """Return the answer, printed as it is made with `show`. Ctrl-C ends it.

        Raises:
            UsageError: the text, with all that was said before, fills the positions of the model.
        """
        inputs = self._inputs(text)
        length = inputs["input_ids"].shape[1]
        limit = position_limit(self.model.config) or sys.maxsize
        if length >= limit:
            raise UsageError(f"this is {counted(length, 'token')}, and the model takes at most {limit:,}")
        streamer = _Printer(self.tokenizer, show=show)
        is_whole = True
        try:
            with torch.inference_mode():
                self.model.generate(
                    **inputs, streamer=streamer, max_new_tokens=min(self.max_tokens, limit - length),
                    pad_token_id=self._padding,
                )  # fmt: skip
        except KeyboardInterrupt:
            is_whole = False
            streamer.end()
        if show:
            print("" if is_whole else " …", flush=True)
        if self.is_chat:
            self.said += [_message("user", text), _message("assistant", streamer.text)]
        return streamer.text

    def _inputs(self, text: str) -> Any:
        if self.is_chat:
            inputs = self.tokenizer.apply_chat_template(
                [*self.said, _message("user", text)], add_generation_prompt=True, return_tensors="pt",
                return_dict=True, **self.template_arguments,
            )  # fmt: skip
        else:
            inputs = self.tokenizer(text, return_tensors="pt")
        return {name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")}

    @property
    def _padding(self) -> int | None:
        """A padding token. Nothing is padded, but transformers prints a warning if there is none."""
        ends: int | list[int] | None = self.model.generation_config.eos_token_id
        return ends[0] if isinstance(ends, list) else ends


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def talk_until_the_end(talk: Talk) -> None:
    """Answer what the user types until Ctrl-D. Ctrl-C stops an answer."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # only Ctrl-C means an answer
        signal.signal(number, signal.SIG_DFL)
    what = "Chat" if talk.is_chat else "The model has no chat template and completes what you type"
    print(f"{what}. Ctrl-C ends an answer, Ctrl-D the chat.", file=sys.stderr)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except KeyboardInterrupt:  # of a line that is being typed
            print(file=sys.stderr)
            continue
        except EOFError:
            print(file=sys.stderr)
            return
        if not text.strip() or not _is_text(text):
            continue
        try:
            talk.answer(text)
        except UsageError as error:
            print(f"{error}; the chat starts over", file=sys.stderr)
            talk.said.clear()


def load(run: FinishedRun) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model of a run, with its adapters, and its tokenizer."""
    quiet_deepspeed()
    remote = bool(run.config["model"].get("trust_remote_code"))
    tokenizer = load_tokenizer(str(run.final), trust_remote_code=remote, named=str(run.final))
    if run.has_adapters:
        from peft import PeftModel

        model = PeftModel.from_pretrained(run.load_base(), str(run.final))
        if (run.final / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(str(run.final))
            model.get_base_model().generation_config = model.generation_config
    else:
        import transformers

        loader = getattr(transformers, loader_of(run.final)[1])
        model = loader.from_pretrained(str(run.final), dtype="auto", trust_remote_code=remote)
    return model.to(training_device()).eval(), tokenizer


class _Printer(TextStreamer):
    """Collects the text of an answer, and prints it while it is generated."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, show: bool) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text, self._show = "", show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Receive text that no later token changes."""
        self.text += text
        if self._show:
            print(text, end="", flush=True)
