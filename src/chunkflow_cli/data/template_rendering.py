"""Render chat templates with Jinja, as transformers does.

**Today's date.** For a template that writes it (`strftime_now`), today is `TEMPLATE_DATE`, the date that Llama 3.1's
own template writes by default. With the real date, the same data would have other tokens every day, so no cache could
keep them, and a run could not resume on the next day.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from types import FrameType
from typing import Any

from chunkflow_cli.data.sample import BadRowError
from chunkflow_cli.data.template_input import MessageForm, in_form, template_traits
from chunkflow_cli.errors import UsageError

TEMPLATE_DATE = datetime(2024, 7, 26)
LONGEST_SECONDS = 10
"""CPU time that a template may take for a conversation; usual ones take microseconds."""


class Renderer:
    """Renders templates, and gives each the form of messages that it takes.

    Args:
        special_tokens: variables of every template, such as `bos_token`.
        arguments: `data.template_arguments`, with which that form is found.
    """

    def __init__(self, special_tokens: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
        self._special_tokens, self._arguments = special_tokens, arguments
        self._forms: dict[str, MessageForm] = {}

    def render(
        self, template: str, conversations: list[list[dict[str, Any]]], tools: list[Any] | None, **options: Any
    ) -> tuple[list[str], Any]:
        """Return the texts, and the ranges of each that `{% generation %}` marks. One call for several is faster.

        `apply_chat_template` calls this too, but maps characters to tokens by trimmed offsets: an answer that begins
        with a space loses its mask, and so do all later turns.

        Raises:
            BadRowError: the template fails.
            UsageError: it does not end.
        """
        form = self._form(template)
        if form.parts or form.json_arguments:
            conversations = [[in_form(turn, form) for turn in turns] for turns in conversations]
        return self._jinja(template, conversations, tools, **options)

    def _form(self, template: str) -> MessageForm:
        """Return the form of messages that the template takes, found by rendering some."""
        if template not in self._forms:
            turns: list[dict[str, Any]] = [
                {"role": role, "content": f"({role[::-1]})"} for role in ("user", "assistant")
            ]
            parts = self._takes_only(template, turns, MessageForm(parts=True), MessageForm())
            json_arguments = False
            if template_traits(template).names_tool_calls:
                function = {"name": "(eman)", "arguments": {"(yek)": "(eulav)"}}
                call = {"id": "123456789", "type": "function", "function": function}
                calls: list[dict[str, Any]] = [turns[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
                json_arguments = self._takes_only(
                    template, calls, MessageForm(parts, json_arguments=True), MessageForm(parts)
                )
            self._forms[template] = MessageForm(parts, json_arguments)
        return self._forms[template]

    def _takes_only(self, template: str, turns: list[dict[str, Any]], form: MessageForm, other: MessageForm) -> bool:
        """Return True if the template writes all words of turns in a form, and in the other rejects or drops them."""
        texts = []
        for tried in (form, other):
            try:
                filled = [in_form(turn, tried) for turn in turns]
                texts.append(self._jinja(template, [filled], None, **self._arguments)[0][0])
            except BadRowError:
                texts.append("")
        words = re.findall(r"\(\w+\)", str(turns))
        # A template that does not know parts may write them as Python does.
        return all(word in texts[0] for word in words) and "{'" not in texts[0] and words[-1] not in texts[1]

    def _jinja(
        self, template: str, conversations: list[list[dict[str, Any]]], tools: list[Any] | None, **options: Any
    ) -> tuple[list[str], Any]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            with _fixed_date(template), _ending():
                rendered: tuple[list[str], Any] = render_jinja_template(
                    conversations=conversations, tools=tools, chat_template=template, **options, **self._special_tokens
                )
        except (MemoryError, ImportError, UsageError):  # of this machine, or of the template itself
            raise
        except Exception as error:  # a template is a program, and may fail in any way: 1 / 0, a macro without an end
            raise BadRowError(
                f"the chat template rejects the conversation: {str(error) or type(error).__name__}"
            ) from error
        return rendered


@contextmanager
def _ending() -> Iterator[None]:
    """Stop the block once it has computed for `LONGEST_SECONDS`: loops within loops of a template may never end.

    Only the main thread can be stopped so. All rendering of this program is there, in this process or in a worker.

    Raises:
        UsageError: it was stopped.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise UsageError(
            f"the chat template has computed for {LONGEST_SECONDS} seconds on one conversation: it may never end\n"
            "  name another template with data.chat_template"
        )

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, LONGEST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def _fixed_date(template: str) -> Iterator[None]:
    """Let `strftime_now` return `TEMPLATE_DATE` within the block."""
    if not template_traits(template).writes_date:
        yield
        return
    from transformers.utils.chat_template_utils import _compile_jinja_template

    # transformers compiles a template once, with a clock of its own. Arguments cannot replace it: they are plain data.
    names = _compile_jinja_template(template).globals
    clock = names["strftime_now"]
    names["strftime_now"] = TEMPLATE_DATE.strftime
    try:
        yield
    finally:
        names["strftime_now"] = clock
