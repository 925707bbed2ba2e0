"""Chats as text, by the model's own template, and the characters of it that carry loss.

The whole chat is rendered once. What is trained in it is found by rendering its beginnings: the turn
`messages[i]` begins where the rendering of `messages[:i]` with the generation prompt ends, and it ends
where the template has written all that belongs to it (the end-of-turn token, a newline). Templates that
mark the assistant's words themselves (`{% generation %}`) are believed, as TRL does.

Templates are programs from elsewhere: they run in a child under limits of time and memory, and each of
their faults becomes one `InputError` that names the row.
"""

from __future__ import annotations

import importlib
import math
import mmap
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from arisk.base.errors import InputError
from arisk.base.processes import LimitReachedError, bounded
from arisk.models.formats import Message, Row

__all__ = ["PLAIN_TEMPLATE", "LaidOut", "LossOn", "lay_out", "marks_answers"]

LossOn = Literal["all", "completion", "assistant", "last"]
#: A place in a text: its first characters by number, or another text whose beginning they share.
Place = int | str

#: Layout of chats for models without a template.
PLAIN_TEMPLATE = (
    "{% for turn in messages %}"
    "{% if turn['role'] == 'assistant' %}"
    "{{ '### Response:\n' + turn['content'] + (eos_token or '') + ('' if loop.last else '\n\n') }}"
    "{% elif turn['role'] == 'system' %}{{ turn['content'] + '\n\n' }}"
    "{% elif turn['role'] == 'user' and turn['input'] %}"
    "{{ '### Instruction:\n' + turn['instruction'] + '\n\n### Input:\n' + turn['input'] + '\n\n' }}"
    "{% elif turn['role'] == 'user' %}{{ '### Instruction:\n' + turn['content'] + '\n\n' }}"
    "{% else %}{{ raise_exception('without a chat template there is no layout for this role') }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
#: Rows rendered by one child, and characters in them.
ROWS_AT_ONCE, CHARACTERS_AT_ONCE = 5000, 20_000_000
#: Processor seconds of a child; and for each rendering, per turn and per character in it, many times what
#: ordinary templates take.
SECONDS, PER_RENDERING, PER_TURN, PER_CHARACTER = 5, 2e-3, 5e-4, 2e-7
#: Roles that are tried when a template refuses a row.
ROLES = ("system", "user", "assistant", "tool")
#: What a template may raise besides jinja's own errors.
FAULTS = (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError)
#: Characters of a foreign message that are repeated.
REPEATED = 200


class _NoPrefix(Exception):  # noqa: N818 - told with the row
    """The rendering of a chat's beginning is no beginning of the chat's rendering."""


@dataclass(frozen=True)
class LaidOut:
    """A row as text.

    Attributes:
        text: all of it.
        spans: (start, end) of each part that is trained.
        special: whether the tokenizer adds its own tokens, as it does to text that no template wrote.
    """

    text: str
    spans: tuple[tuple[Place, Place], ...]
    special: bool = False


def marks_answers(template: str) -> bool:
    """Whether a template itself marks what the assistant says."""
    return MARKED.search(template) is not None


def lay_out(
    rows: Sequence[Row], modes: Sequence[LossOn], tokenizer: Any, *, plain: bool, section: str
) -> list[LaidOut]:
    """Every row as text with its trained parts.

    Args:
        rows: chats or plain text.
        modes: what is trained of each row.
        tokenizer: a Hugging Face tokenizer.
        plain: lay chats out by `PLAIN_TEMPLATE`, whatever the tokenizer has.
        section: name of the config section, for messages.

    Raises:
        InputError: the template fails, refuses a role, does not end, or rewrites the beginning of a chat;
            the row is named.
    """
    importlib.import_module("jinja2")
    template = PLAIN_TEMPLATE if plain else None
    found: list[LaidOut] = []
    chats = [i for i, row in enumerate(rows) if row.messages]
    laid: dict[int, LaidOut] = {}
    for numbers in _portions(chats, rows):
        answers = _rendered([(rows[i], modes[i]) for i in numbers], tokenizer, template, section)
        for i, (text, spans) in zip(numbers, answers, strict=True):
            laid[i] = LaidOut(text, tuple((first, last) for first, last in spans), special=plain)
    for i, row in enumerate(rows):
        found.append(laid[i] if i in laid else _plain_text(row, modes[i], tokenizer))
    return found


def _portions(chats: Sequence[int], rows: Sequence[Row]) -> Iterator[list[int]]:
    """Numbers of the chats that one child renders."""
    part: list[int] = []
    characters = 0
    for number in chats:
        if part and (len(part) == ROWS_AT_ONCE or characters > CHARACTERS_AT_ONCE):
            yield part
            part, characters = [], 0
        part.append(number)
        characters += _characters(rows[number])
    if part:
        yield part


def _characters(row: Row) -> int:
    return sum(len(turn["content"]) for turn in row.messages)


def _allowed(part: Sequence[tuple[Row, LossOn]]) -> int:
    """Processor seconds for these rows."""
    seconds = float(SECONDS)
    for row, mode in part:
        turns = len(row.messages)
        renderings = 2 * turns + 1 if mode == "assistant" else 4
        seconds += renderings * (PER_RENDERING + PER_TURN * turns + PER_CHARACTER * _characters(row))
    return math.ceil(seconds)


def _plain_text(row: Row, mode: LossOn, tokenizer: Any) -> LaidOut:
    """Prompt and completion as they stand, and the end token, as TRL puts it."""
    prompt, completion = row.text
    end = getattr(tokenizer, "eos_token", None) or ""
    text = prompt + completion + ("" if end and completion.endswith(end) else end)
    return LaidOut(text, ((0 if mode == "all" else len(prompt), len(text)),), special=True)


def _rendered(
    part: Sequence[tuple[Row, LossOn]], tokenizer: Any, template: str | None, section: str
) -> list[tuple[str, list[Any]]]:
    """Text and spans of some chats, from a child."""
    # Memory that the child shares says which row it was at when its time ran out.
    with mmap.mmap(-1, 8) as place:
        try:
            done, fault = bounded(
                lambda: _render_all(part, tokenizer, template, place),
                seconds=_allowed(part),
            )
        except (LimitReachedError, RuntimeError) as err:
            row = part[int.from_bytes(place[:], "big")][0]
            raise InputError(
                f"the chat template cannot be rendered: {_short(err)}",
                where=f"{row.source}, line {row.line}",
                fix=f"correct the template of the tokenizer, or set `{section}.chat_template: false`",
            ) from err
    if fault is not None:
        row = part[len(done)][0]
        raise InputError(fault["what"], where=f"{row.source}, line {row.line}", fix=fault["fix"])
    return done


def _render_all(
    part: Sequence[tuple[Row, LossOn]], tokenizer: Any, template: str | None, place: mmap.mmap
) -> tuple[list[tuple[str, list[tuple[Place, Place]]]], dict[str, str] | None]:
    """Renderings up to the first row that fails, and what is wrong with that one."""
    import jinja2

    done: list[tuple[str, list[tuple[Place, Place]]]] = []
    for number, (row, mode) in enumerate(part):
        place[:] = number.to_bytes(8, "big")
        page = _Page(row, tokenizer, template)
        try:
            done.append((page.text, page.spans(mode)))
        except jinja2.TemplateSyntaxError as err:
            return done, {
                "what": f"the chat template is not valid: {_short(err)} (line {err.lineno} of the template)",
                "fix": "correct the template of the tokenizer, or set `chat_template: false`",
            }
        except _NoPrefix as err:
            return done, {
                "what": f"the chat template rewrites the beginning of a chat, so {err} cannot be told apart",
                "fix": "use `loss_on: all`, or a template that writes the turns one after the other",
            }
        except (jinja2.TemplateError, *FAULTS) as err:
            return done, _refusal(row, err, tokenizer, template)
    return done, None


def _short(err: Exception) -> str:
    text = " ".join(str(err).split())
    return text[:REPEATED] if text else type(err).__name__


def _refusal(row: Row, err: Exception, tokenizer: Any, template: str | None) -> dict[str, str]:
    """Why a template fails on a row: a role that it does not know, or something else."""
    known = [role for role in ROLES if _knows(role, tokenizer, template)]
    foreign = sorted({turn["role"] for turn in row.messages} - set(known))
    roles = [turn["role"] for turn in row.messages]
    if known and foreign:
        return {
            "what": f"the chat template refuses the role {', '.join(map(repr, foreign))}: {_short(err)}",
            "fix": f"it knows the roles {', '.join(known)}: rename or remove the other turns",
        }
    return {
        "what": f"the chat template fails on this row: {_short(err)}",
        "fix": f"its turns are {', '.join(roles[:12])}: change the row, or set `chat_template: false`",
    }


def _knows(role: str, tokenizer: Any, template: str | None) -> bool:
    """Whether a template renders a short chat with this role in its usual place."""
    import jinja2

    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    odd = {"role": role, "content": "c"}
    chat = [odd, user, assistant] if role == "system" else [user, assistant]
    chat = [user, assistant, odd, assistant] if role == "tool" else chat
    try:
        tokenizer.apply_chat_template(chat, tokenize=False, chat_template=template)
    except (jinja2.TemplateError, *FAULTS):
        return False
    return True


class _Page:
    """One chat and the renderings of it."""

    def __init__(self, row: Row, tokenizer: Any, template: str | None) -> None:
        self.row, self.tokenizer, self.template = row, tokenizer, template
        self._text: str | None = None

    def render(self, messages: Sequence[Message], *, open_turn: bool = False) -> str:
        """These turns as text; `open_turn` begins an answer after them."""
        return self.tokenizer.apply_chat_template(
            list(messages),
            tools=list(self.row.tools) or None,
            tokenize=False,
            add_generation_prompt=open_turn,
            chat_template=self.template,
            **self.row.template_kwargs,
        )

    @property
    def text(self) -> str:
        """The whole chat; without an answer, up to where one begins."""
        if self._text is None:
            self._text = self.render(self.row.messages, open_turn=not self.row.answered)
        return self._text

    def spans(self, mode: LossOn) -> list[tuple[Place, Place]]:
        """Where the trained parts of the text begin and end."""
        row, whole = self.row, len(self.text)
        if not row.answered:
            return [(whole, whole)]
        if mode == "all":
            return [(0, whole)]
        if mode == "completion":
            return [(self.start_of(row.completion), whole)]
        if mode == "last":
            return [(self.start_of(row.last), self.end_of(row.last))]
        weights = [turn.get("weight", turn.get("train")) for turn in row.messages]
        source = self.template or self.tokenizer.get_chat_template(None, list(row.tools) or None)
        if marks_answers(source) and set(weights) == {None}:
            return self._marked(source)
        answers = [
            i
            for i, (turn, weight) in enumerate(zip(row.messages, weights, strict=True))
            if turn["role"] == "assistant" and i >= (row.start or 0) and (weight is None or weight)
        ]
        return [(self.start_of(i), self.end_of(i)) for i in answers]

    def _marked(self, source: str) -> list[tuple[Place, Place]]:
        """The parts that the template marks; those before the completion are not trained."""
        module = importlib.import_module("transformers.utils.chat_template_utils")
        kwargs = {**self.tokenizer.special_tokens_map, **self.row.template_kwargs}
        _, marks = module.render_jinja_template(
            conversations=[list(self.row.messages)],
            tools=list(self.row.tools) or None,
            chat_template=source,
            return_assistant_tokens_mask=True,
            **kwargs,
        )
        first = 0
        if self.row.start is not None:
            first = _shared(self.render(self.row.messages[: self.row.start], open_turn=True), self.text)
        return [(int(begin), int(end)) for begin, end in marks[0] if end > first]

    def start_of(self, turn: int) -> Place:
        """Where an answer begins: after its generation prompt."""
        before = self.row.messages[:turn]
        prefix = self.render(before, open_turn=True)
        shared = _shared(prefix, self.text)
        if shared == len(prefix):
            return shared
        # Some templates close the generation prompt otherwise than the answer; what was asked must stay.
        if _core(before[-1]) not in prefix[:shared]:
            raise _NoPrefix(f"turn {turn + 1} and what comes before it")
        return prefix

    def end_of(self, turn: int) -> Place:
        """Where an answer ends, with all that the template writes after its words."""
        if turn == len(self.row.messages) - 1:
            return len(self.text)
        alone = self.render(self.row.messages[: turn + 1])
        shared = _shared(alone, self.text)
        if shared == len(alone):
            return shared
        # The template writes an answer that is not the last one otherwise: what follows its words counts.
        begin = self.start_of(turn)
        first = begin if isinstance(begin, int) else _shared(begin, self.text)
        core = _core(self.row.messages[turn])
        here, there = self.text.find(core, first), alone.find(core, min(first, len(alone)))
        if not core or here < 0 or there < 0:
            if shared > first:
                return shared
            raise _NoPrefix(f"the end of turn {turn + 1}")
        here, there = here + len(core), there + len(core)
        return here + _shared(alone[there:], self.text[here:])


def _core(turn: Message) -> str:
    return str(turn.get("content") or "").strip()


def _shared(one: str, other: str) -> int:
    """Characters that two texts have in common from their beginnings."""
    if other.startswith(one):
        return len(one)
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
