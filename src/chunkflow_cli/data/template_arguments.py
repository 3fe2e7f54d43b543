"""Variables for the chat template, from `data.template_arguments` and from rows.

They are what `apply_chat_template` takes as further keywords, such as `enable_thinking=False`. Names that it takes for
itself are refused, and so are names that the template never reads: a misspelled argument would have no effect.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self

from chunkflow_cli.data.notes import Remark
from chunkflow_cli.data.sample import BadRowError
from chunkflow_cli.errors import UsageError

if TYPE_CHECKING:
    from jinja2 import Template
    from transformers import PreTrainedTokenizerBase

KEY, ROW_KEY = "data.template_arguments", "chat_template_kwargs"


@dataclass(frozen=True, slots=True)
class TemplateArguments:
    """The arguments of the configuration, which a row's own add to and override."""

    values: Mapping[str, Any]
    reserved: frozenset[str]
    """Reserved names: the conversation, the special tokens, and options of `apply_chat_template`."""

    @classmethod
    def checked(cls, values: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Self:
        """Return the arguments of a configuration for a tokenizer with a chat template.

        Raises:
            UsageError: a name is reserved, or no template of the tokenizer reads it.
        """
        arguments = cls(values, _reserved(tokenizer))
        if not values:
            return arguments
        for name in values:
            if name in arguments.reserved:
                raise UsageError(
                    f"{KEY}.{name}: the name is reserved, chunkflow gives it a value itself\n  leave it out"
                )
        templates = tokenizer.chat_template
        texts = [templates] if isinstance(templates, str) else list(templates.values())
        read = frozenset().union(*map(names_read, texts))
        for name in values:
            if name not in read:
                raise UsageError(
                    f"{KEY}.{name}: the chat template never reads it\n  {_instead(name, texts, arguments)}"
                )
        return arguments

    def with_row(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments for a row, which may have its own.

        Raises:
            BadRowError: one of its names is reserved.
        """
        for name in own:
            if name in self.reserved:
                raise BadRowError(f"{ROW_KEY}.{name}: the name is reserved, chunkflow gives it a value itself")
        return {**self.values, **own}


def unread(arguments: Mapping[str, Any], template: str) -> Iterator[Remark]:
    """Yield a remark on each argument that a valid template never reads."""
    for name in arguments:
        if name not in names_read(template):
            yield Remark(f"the chat template never reads the argument {name}, which has no effect")


@lru_cache(maxsize=16)
def names_read(template: str) -> frozenset[str]:
    """Return the variables that a template may take from outside, the conversation included.

    A name that it sets before it reads it on some paths only is among them.

    Raises:
        UsageError: it is not a valid template.
    """
    from jinja2 import meta

    compiled = compiled_template(template, "the tokenizer's chat template")
    return frozenset(meta.find_undeclared_variables(compiled.environment.parse(template)))


def compiled_template(template: str, named: str) -> Template:
    """Return a template as transformers compiles it, in its sandbox.

    Raises:
        UsageError: it is not valid.
    """
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        compiled: Template = _compile_jinja_template(template)
    except TemplateSyntaxError as error:
        raise UsageError(f"{named} is not a valid chat template: line {error.lineno}: {error.message}") from error
    except MemoryError:  # of this machine
        raise
    except Exception as error:  # Python's own compiler has limits, too: on nested loops, on the depth of brackets
        raise UsageError(f"{named} is not a valid chat template: {str(error) or type(error).__name__}") from error
    return compiled


def _reserved(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    from transformers import PreTrainedTokenizerBase as Base
    from transformers.utils.chat_template_utils import render_jinja_template

    functions = (Base.apply_chat_template, render_jinja_template)
    options = {name for function in functions for name in inspect.signature(function).parameters}
    return frozenset(
        {*options, "messages", *Base.SPECIAL_TOKENS_ATTRIBUTES, *tokenizer.special_tokens_map} - {"documents", "kwargs"}
    )


def _instead(name: str, templates: list[str], arguments: TemplateArguments) -> str:
    """Return what to write instead of an argument that no template reads."""
    known = sorted(frozenset().union(*map(_settings, templates)) - arguments.reserved)
    near = get_close_matches(name, known, 1)
    if near:
        return f"did you mean {KEY}.{near[0]}?"
    return f"it reads: {', '.join(known)}" if known else "it reads none, so leave the key out"


def _settings(template: str) -> set[str]:
    """Return the variables that a template expects as arguments: it never sets them, or asks if they are defined.

    Others it may read from outside as well, if it sets them on some paths only.
    """
    from jinja2 import nodes

    tree = compiled_template(template, "the tokenizer's chat template").environment.parse(template)
    names = list(tree.find_all(nodes.Name))
    is_set = {name.name for name in names if name.ctx != "load"}
    asked = {
        test.node.name
        for test in tree.find_all(nodes.Test)
        if test.name in ("defined", "undefined") and isinstance(test.node, nodes.Name)
    }
    return {name for name in names_read(template) if name not in is_set or name in asked}
