"""What a chat template writes around the contents of a conversation, found once for each sequence of roles.

Rendering takes a fifth of the time that tokenising does, for a conversation is rendered up to its end and up to each
answer. But most templates write contents as they are: what stands around them follows from the roles alone. So a
conversation of marks in place of contents is rendered once, cut at the marks, and further ones are put together.

That is exact, not a guess, for a mark is a text that can be added to others and written, and nothing else. What the
template asks of it (is it empty, does it hold `</think>`, is there white space at its ends) is answered as for a
usual text and noted; a conversation in which any answer differs is rendered as ever, and so are all of a template
that does more with contents. Ways in which a text could be looked at unseen (filters, macros, `~`) are found in the
template's syntax tree, and then there is no skeleton either.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Self

MOST_TURNS = 64
"""Of a conversation that is put together: every prefix of it has a skeleton of its own."""
MARK = re.compile('\x02([0-9]+)"\\\\<\x03')
"""A content while the skeleton is made. JSON would write it otherwise."""
NOT_A_MARK = re.compile("[\x02\x03]|u000[23]")
"""What is left of one that was not written as it is."""

Question = tuple[str, str | None]
USUAL = {
    "is not empty": lambda content, _: bool(content),
    "contains": lambda content, text: text not in content,
    "startswith": lambda content, text: not content.startswith(text),
    "endswith": lambda content, text: not content.endswith(text),
    "equals": lambda content, text: content != text,
    "strip": lambda content, characters: content.strip(characters) == content,
    "lstrip": lambda content, characters: content.lstrip(characters) == content,
    "rstrip": lambda content, characters: content.rstrip(characters) == content,
}
"""Whether a content is what a mark is taken for, by the question that was asked."""


class _PeekedError(BaseException):
    """The template looks into a content. No `Exception`: Jinja answers some of those itself."""


class _Written(str):
    """Text with a mark in it. All that `str` can do besides raises `_PeekedError` (see below the class)."""

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> _Written:
        return _Written(str.__add__(self, other))

    def __radd__(self, other: str) -> _Written:
        return _Written(str.__add__(other, self))


def _peek(*_: object, **__: object) -> Any:
    raise _PeekedError


for _name in set(dir(str)) - set(dir(object)) - set(vars(_Written)) | {"__hash__", "__format__", "__repr__"}:
    setattr(_Written, _name, _peek)
for _name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"):
    setattr(_Written, _name, _peek)


class _Mark(_Written):
    """A content of which nothing is known. It notes what is asked."""

    asked: set[Question]

    @classmethod
    def of(cls, index: int) -> Self:
        mark = cls(f'\x02{index}"\\<\x03')
        mark.asked = set()
        return mark

    def _note(self, question: str, *arguments: object) -> None:
        if len(arguments) > 1 or any(type(argument) is not str for argument in arguments):
            raise _PeekedError
        self.asked.add((question, str(arguments[0]) if arguments else None))

    def __bool__(self) -> bool:
        self._note("is not empty")
        return True

    def __contains__(self, text: object) -> bool:
        self._note("contains", text)
        return False

    def startswith(self, *texts: object) -> bool:  # type: ignore[override]
        self._note("startswith", *texts)
        return False

    def endswith(self, *texts: object) -> bool:  # type: ignore[override]
        self._note("endswith", *texts)
        return False

    def __eq__(self, other: object) -> bool:
        self._note("equals", other)
        return False

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = _peek  # type: ignore[assignment]

    def strip(self, characters: str | None = None) -> Self:  # type: ignore[override]
        self._note("strip", *(() if characters is None else (characters,)))
        return self

    def lstrip(self, characters: str | None = None) -> Self:  # type: ignore[override]
        self._note("lstrip", *(() if characters is None else (characters,)))
        return self

    def rstrip(self, characters: str | None = None) -> Self:  # type: ignore[override]
        self._note("rstrip", *(() if characters is None else (characters,)))
        return self


@dataclass(frozen=True, slots=True)
class Skeleton:
    """The text of all conversations with the same roles, but for their contents."""

    pieces: tuple[str, ...]
    """Texts; empty where a content comes."""
    places: tuple[tuple[int, int], ...]
    """Indices into `pieces`, and the turn whose content belongs there."""
    questions: tuple[tuple[int, Question], ...]
    """Turns and what the template asks of their contents."""

    def text(self, contents: Sequence[str]) -> str | None:
        """None: a content is not what the template's questions were answered for."""
        for turn, (question, argument) in self.questions:
            if not USUAL[question](contents[turn], argument):
                return None
        pieces = list(self.pieces)
        for place, turn in self.places:
            pieces[place] = contents[turn]
        return "".join(pieces)


@dataclass(slots=True)
class Skeletons:
    """Of one tokenizer; made when they are needed."""

    special_tokens: Mapping[str, Any]
    _made: dict[tuple[str, bool, tuple[str, ...]], Skeleton | None] = field(default_factory=dict)

    def text(self, template: str, messages: Sequence[Mapping[str, Any]], *, ask: bool) -> str | None:
        """What the template writes of these messages, or None where it has to be asked itself.

        Args:
            messages: of `role` and `content` at least; tools are none.
            ask: end with the generation prompt.
        """
        if len(messages) > MOST_TURNS or any(len(turn) != 2 for turn in messages):
            return None
        key = (template, ask, tuple([turn["role"] for turn in messages]))
        if key not in self._made:
            self._made[key] = _make(*key, self.special_tokens)
        skeleton = self._made[key]
        return None if skeleton is None else skeleton.text([turn["content"] for turn in messages])


def _make(template: str, ask: bool, roles: Sequence[str], special_tokens: Mapping[str, Any]) -> Skeleton | None:
    compiled = _compiled(template)
    if compiled is None:
        return None
    marks = [_Mark.of(turn) for turn in range(len(roles))]
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    try:
        text = compiled.render(
            messages=messages, tools=None, documents=None, add_generation_prompt=ask, **special_tokens
        )
    except (Exception, _PeekedError):  # refused, for these roles or because of the marks: asking itself tells
        return None
    pieces = MARK.split(text)
    places = tuple((place, int(pieces[place])) for place in range(1, len(pieces), 2))
    if {turn for _, turn in places} != set(range(len(roles))) or any(map(NOT_A_MARK.search, pieces)):
        return None
    for place, _ in places:
        pieces[place] = ""
    questions = tuple((turn, question) for turn, mark in enumerate(marks) for question in sorted(mark.asked, key=str))
    return Skeleton(tuple(pieces), places, questions)


@lru_cache(maxsize=16)
def _compiled(template: str) -> Any | None:
    """As transformers compiles it; None if contents could be looked at unseen, or transformers has changed."""
    try:
        from transformers.utils.chat_template_utils import _compile_jinja_template
    except ImportError:  # a private name
        return None
    from jinja2 import TemplateError

    try:
        compiled: Any = _compile_jinja_template(template)
        syntax = compiled.environment.parse(template)
    except TemplateError:
        return None
    return compiled if all(_is_open(node) for node in _nodes(syntax)) else None


def _nodes(node: Any) -> Iterator[Any]:
    yield node
    for child in node.iter_child_nodes():
        yield from _nodes(child)


NODES = frozenset(
    """Template Output TemplateData If For Assign Name NSRef Const List Tuple Dict Pair Getitem Getattr Slice Compare
    Operand And Or Not Neg Add Sub Mod Test Filter Call Keyword CondExpr Break Continue""".split()
)
FILTERS = frozenset("trim string length count list first last reverse default d tojson".split())
FUNCTIONS = frozenset("raise_exception strftime_now namespace range".split())


def _is_open(node: Any) -> bool:
    """Whether all that this part of a template does to a content is seen by `_Written`."""
    from jinja2 import nodes

    kind = type(node).__name__
    if kind not in NODES:
        return False
    if isinstance(node, nodes.Filter):
        return node.name in FILTERS
    if isinstance(node, nodes.Test):
        return node.name != "in"
    if isinstance(node, nodes.Call):
        if isinstance(node.node, nodes.Name):
            return node.node.name in FUNCTIONS
        return all(isinstance(argument, nodes.Const) for argument in node.args) and not node.kwargs
    if isinstance(node, nodes.Mod):  # the text before % would take in a content
        return not isinstance(node.left, nodes.Const) and not isinstance(node.right, nodes.Tuple)
    if isinstance(node, nodes.Compare):  # a content within another text
        left = [node.expr, *(operand.expr for operand in node.ops)]
        return all(
            operand.op not in ("in", "notin")
            or isinstance(before, nodes.Const)
            or isinstance(operand.expr, nodes.List | nodes.Tuple)
            for before, operand in zip(left, node.ops, strict=False)
        )
    return True
