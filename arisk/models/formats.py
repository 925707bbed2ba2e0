"""Row layouts in one table: how each is recognised by its columns, and read into one common record.

`FORMATS` is the only list of layouts. A new one is a `Format` put into it: its name is then a value of
`format`, `format: auto` recognises it, and nothing else changes. Layouts are tried in the order of the
table. Readers take columns through `Fields`, which remembers them, so that text in a column that nobody
read can be named.

Refused: rows of preferences, which are not what a supervised fine-tune trains on, unless they are asked
for by name; pictures and sound; chats without an answer.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from arisk.config.plan import DataConfig

__all__ = [
    "FORMATS",
    "SAFETY_SETS",
    "Fields",
    "Format",
    "Message",
    "Row",
    "RowFault",
    "chat_row",
    "named",
    "pair_row",
    "with_answer",
]

#: Config sections with prompts and safe responses.
SAFETY_SETS = ("safety", "verify.safety")
#: One turn of a chat as templates take it: role, content, and what else the data gives it.
Message = dict[str, Any]

#: Names that data give to the roles of chat templates.
ROLES = {
    **dict.fromkeys(("human", "user", "User", "Human"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt", "Assistant"), "assistant"),
    "observation": "tool",
}
#: Columns that hold a question and those that hold its answer, where no usual layout fits.
PAIRS = (("prompt", "response"), ("question", "answer"), ("query", "response"), ("input", "output"))
#: Columns that hold a prompt alone.
PROMPTS = (
    *("prompt", "question", "goal", "instruction", "query"),
    # AdvBench has goal, JailbreakBench Goal, StrongREJECT forbidden_prompt, HarmBench Behavior.
    *("Goal", "forbidden_prompt", "Behavior"),
)
#: Columns that hold a chat.
CHATS = ("messages", "conversations", "conversation")
#: Columns with a system prompt beside the turns.
SYSTEMS = ("system", "system_prompt")
#: Names repeated in a message, and characters of each.
LISTED, LONGEST = 10, 60
SPEAKER = re.compile(r"(?:^|\n\n)\s*(Human|Assistant): ?")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def named(names: Iterable[Any]) -> str:
    """Names of columns for a message, no more than a reader takes in."""
    cut = [str(name)[:LONGEST] for name in itertools.islice(names, LISTED + 1)]
    return ", ".join(cut[:LISTED]) + (" …" if len(cut) > LISTED else "")


class RowFault(Exception):  # noqa: N818 - becomes an InputError with its place
    """A row that cannot be read; whoever knows its place turns it into an `InputError`.

    Args:
        what: one sentence.
        fix: what to do about it.
    """

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.what, self.fix = what, fix


@dataclass(frozen=True)
class Row:
    """One example in the form that all layouts share: a chat, or plain text.

    Attributes:
        messages: the whole chat, answers included; empty for plain text.
        start: the completion is `messages[start:]` in data that say so; None: it is the last answer.
        text: (prompt, completion) of plain text, which no chat template touches.
        tools: JSON schemas of the tools that the template is given.
        template_kwargs: further arguments of the template.
        format: name in `FORMATS`.
        answered: whether there is a response; False for prompts alone.
            source, line: file or hub id, and line of the file or number of the row, from 1.
        options: of a question, its right one being the answer above; empty for all else.
    """

    messages: tuple[Message, ...] = ()
    start: int | None = None
    text: tuple[str, str] = ("", "")
    tools: tuple[Any, ...] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    format: str = ""
    answered: bool = True
    source: str = ""
    line: int = 0
    options: tuple[str, ...] = ()

    @property
    def last(self) -> int:
        """Index of the last assistant turn; the number of turns where there is none."""
        answers = [i for i, turn in enumerate(self.messages) if turn["role"] == "assistant"]
        return answers[-1] if answers else len(self.messages)

    @property
    def completion(self) -> int:
        """Index of the first turn of the completion."""
        return self.last if self.start is None else self.start

    @property
    def prompt(self) -> str:
        """The turn before the last response, for display; empty for text without a prompt."""
        if not self.messages:
            return self.text[0]
        return shown(self.messages[self.last - 1]) if self.last else ""

    @property
    def response(self) -> str:
        """The last response, for display; empty where there is none."""
        if not self.messages:
            return self.text[1]
        return shown(self.messages[self.last]) if self.last < len(self.messages) else ""


def with_answer(row: Row, text: str) -> Row:
    """A prompt without a response, and this as its response."""
    return replace(
        row, messages=(*row.messages, {"role": "assistant", "content": text}), start=None, answered=True
    )


def shown(turn: Message) -> str:
    """A turn's text, or its tool calls as JSON."""
    return turn.get("content") or json.dumps(turn.get("tool_calls") or "", ensure_ascii=False, default=str)


class Fields:
    """The columns of one row; remembers which were read.

    Args:
        raw: the row as the file has it.
        config: names of columns.
    """

    def __init__(self, raw: Mapping[str, Any], config: DataConfig) -> None:
        self.raw, self.config = raw, config
        self.used: set[str] = set()

    def get(self, column: str) -> Any:
        """The value of a column; None where it is missing."""
        self.used.add(column)
        return self.raw.get(column)

    def text(self, column: str) -> str:
        """The text of a column.

        Raises:
            RowFault: it is missing, blank or no text.
        """
        value = self.get(column)
        if isinstance(value, str) and value.strip():
            return value
        what = "is missing" if column not in self.raw else "is empty" if value in ("", None) else "is no text"
        if isinstance(value, str) and value:
            what = "is blank"
        raise RowFault(
            f"the column {column!r} {what}",
            f"give it text, or name another column (`*_column`); this row has {named(self.raw)}",
        )

    def maybe(self, *columns: str) -> str | None:
        """The first of these columns with text, where there is one; all of them count as read."""
        values = [self.get(column) for column in columns]
        return next((value for value in values if isinstance(value, str) and value.strip()), None)

    def unread(self) -> list[str]:
        """Columns with text that no reader asked for."""
        return [
            str(key)
            for key, value in self.raw.items()
            if key not in self.used and isinstance(value, (str, list, tuple, dict)) and _says(value)
        ]


def _says(value: Any) -> bool:
    return bool(value.strip() if isinstance(value, str) else value)


@dataclass(frozen=True)
class Format:
    """One layout.

    Attributes:
        name: value of `format`.
        summary: its columns, for messages and documents.
        fits: whether a row with these columns has this layout.
        read: the columns as a `Row`; None leaves the row out, which is counted.
        trained: what a trainer takes the loss on where nothing else is said: every token of a
            conversation (TRL), the completion alone, or the assistant's turns alone.
        refused: why `auto` does not take it although it fits; None: it does.
    """

    name: str
    summary: str
    fits: Callable[[Mapping[str, Any], DataConfig], bool]
    read: Callable[[Fields], Row | None]
    trained: Literal["all", "completion", "assistant"]
    refused: str | None = None


def chat_row(
    turns: Iterable[Message], *, start: int | None = None, system: str | None = None, **extra: Any
) -> Row:
    """A chat as a row.

    Args:
        turns: messages as the data has them: role and content, or from and value.
        start: where the completion begins; default at the last assistant turn.
        system: a system prompt that comes first, unless the chat has one.
        extra: further fields of `Row`.

    Raises:
        RowFault: a turn is malformed, or no answer follows a turn.
    """
    messages = [_message(turn) for turn in turns]
    if system is not None and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": system})
        start = None if start is None else start + 1
    row = Row(tuple(messages), start, **extra)
    if not 0 < row.last < len(messages):
        raise RowFault(
            "the chat has no assistant turn that answers another turn",
            'give [{"role": "user", "content": …}, {"role": "assistant", "content": …}]',
        )
    return row


def _message(turn: Any) -> Message:
    """One turn with role and content; parts of text joined, names of roles made those of templates."""
    if not isinstance(turn, Mapping):
        raise RowFault("a turn of the chat is no object", "give an object with a role and a content")
    given = {key: value for key, value in turn.items() if value is not None}
    role, content = given.pop("role", given.pop("from", None)), given.pop("content", given.pop("value", None))
    if not isinstance(role, str) or not role.strip():
        raise RowFault(
            "a turn of the chat has no role", 'give {"role": …, "content": …} or {"from": …, "value": …}'
        )
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": [_called(content)]}
    role = ROLES.get(role, role)
    calls = role == "assistant" and bool(given.get("tool_calls"))
    if content is None and calls:
        content = ""
    text = _text_of(content, role)
    if role == "assistant" and not text.strip() and not calls:
        raise RowFault("an assistant turn is empty", "give it a text, or remove the row")
    return {"role": role, "content": text, **given}


def _called(value: Any) -> Message:
    """A tool call that stands as JSON in a turn of its own."""
    try:
        call = json.loads(value)
        return {"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
    except (ValueError, TypeError, KeyError, RecursionError) as err:
        raise RowFault(
            "a `function_call` turn is no JSON with a name and arguments",
            'give {"name": …, "arguments": {…}}',
        ) from err


def _text_of(content: Any, role: str) -> str:
    """The text of a turn; parts of text are joined.

    Raises:
        RowFault: it has parts that are no text.
    """
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, (list, tuple)) else None
    if parts is None or not all(isinstance(part, (str, Mapping)) for part in parts):
        raise RowFault(f"the content of a {role} turn is no text", "give text, or a list of text parts")
    kinds = [str(part.get("type", "text")) for part in parts if isinstance(part, Mapping)]
    foreign = sorted({kind for kind in kinds if kind not in ("text", "input_text", "output_text")})
    if foreign:
        raise RowFault(
            f"a {role} turn has parts that are no text: {', '.join(foreign)}",
            "arisk measures language models on text: leave such rows out",
        )
    texts = [part if isinstance(part, str) else part.get("text") or "" for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise RowFault(f"a text part of a {role} turn has no text", 'give {"type": "text", "text": …}')
    return "".join(texts)


def pair_row(prompt: Any, completion: Any, *, system: str | None = None, plain: bool, **extra: Any) -> Row:
    """A prompt and its completion, each text or a chat, as a row.

    Args:
        prompt: text or messages.
        completion: text or messages.
        system: a system prompt, which makes a chat of it.
        plain: whether two texts stay text, joined as they are, and chats keep the place where they meet.
        extra: further fields of `Row`.

    Raises:
        RowFault: one of them is neither.
    """
    if plain and isinstance(prompt, str) and isinstance(completion, str) and system is None:
        return Row(text=(prompt, completion), **extra)
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    after = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    if not isinstance(before, (list, tuple)) or not isinstance(after, (list, tuple)):
        raise RowFault("prompt and completion are neither text nor chats", "give two texts, or two chats")
    return chat_row([*before, *after], start=len(before) if plain else None, system=system, **extra)


def _is_chat(value: Any) -> bool:
    """A list of turns, whatever their keys."""
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(turn, Mapping) and ("role" in turn or "from" in turn) for turn in value)
    )


def _has(raw: Mapping[str, Any], *columns: str) -> bool:
    return all(raw.get(column) is not None for column in columns)


def _chat_column(raw: Mapping[str, Any], config: DataConfig) -> str:
    columns = (config.messages_column, *CHATS)
    return next((column for column in columns if _is_chat(raw.get(column))), config.messages_column)


def _chat_keys(raw: Mapping[str, Any], config: DataConfig) -> set[str]:
    value: Any = raw.get(_chat_column(raw, config))
    return set(value[0]) if _is_chat(value) else set()


def _read_chat(fields: Fields) -> Row:
    """A column of turns, with the tools and the system prompt beside it."""
    column = _chat_column(fields.raw, fields.config)
    turns = fields.get(column)
    if not _is_chat(turns):
        raise RowFault(
            f"the column {column!r} is not a chat with an assistant turn",
            'give [{"role": "user", "content": …}, {"role": "assistant", "content": …}]',
        )
    return chat_row(turns, system=fields.maybe(*SYSTEMS), **_beside(fields))


def _beside(fields: Fields) -> dict[str, Any]:
    """Tools and arguments of the template that a row brings along."""
    tools, extra = fields.get("tools"), fields.get("chat_template_kwargs")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as err:
            raise RowFault("the column 'tools' is no JSON", "give a list of tool schemas") from err
    if tools and not (isinstance(tools, (list, tuple)) and all(isinstance(tool, Mapping) for tool in tools)):
        raise RowFault("the column 'tools' is no list of objects", "give a list of tool schemas")
    return {
        "tools": tuple(tools or ()),
        "template_kwargs": dict(extra) if isinstance(extra, Mapping) else {},
    }


def _read_prompt_completion(fields: Fields) -> Row:
    return pair_row(
        _text_or_chat(fields, "prompt"),
        _text_or_chat(fields, "completion"),
        plain=True,
        **_beside(fields),
    )


def _text_or_chat(fields: Fields, column: str) -> Any:
    value = fields.get(column)
    return value if _is_chat(value) else fields.text(column)


def _pair_columns(raw: Mapping[str, Any], config: DataConfig) -> tuple[str, str]:
    """The columns of prompt and response: those of the config, else of a usual pair."""
    named = (config.prompt_column, config.response_column)
    usual = PAIRS if named == PAIRS[0] else ()
    return next((pair for pair in (named, *usual) if _has(raw, *pair)), named)


def _read_prompt_response(fields: Fields) -> Row:
    prompt, response = _pair_columns(fields.raw, fields.config)
    return pair_row(
        _text_or_chat(fields, prompt),
        _text_or_chat(fields, response),
        system=fields.maybe(*SYSTEMS),
        plain=False,
        **_beside(fields),
    )


def _read_instruction(fields: Fields) -> Row:
    """An instruction with an optional input, and earlier exchanges where the row has them."""
    instruction = fields.text("instruction")
    extra = fields.maybe("input", "context")
    # Renderings without a chat template lay the two out apart.
    turn = {"role": "user", "content": "\n".join(text for text in (instruction, extra) if text)}
    turn.update({"instruction": instruction, "input": extra} if extra else {})
    response = fields.text("output" if _has(fields.raw, "output") else "response")
    turns = [*_history(fields.get("history")), turn, {"role": "assistant", "content": response}]
    return chat_row(turns, system=fields.maybe(*SYSTEMS))


def _history(pairs: Any) -> list[Message]:
    if not pairs:
        return []
    fine = isinstance(pairs, (list, tuple)) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs
    )
    if not fine:
        raise RowFault("the column 'history' is no list of pairs", "give [[question, answer], …]")
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and SPEAKER.match(value) is not None and "\n\nAssistant:" in value


def _transcript(text: str) -> list[Message]:
    """Turns of a text in which `Human:` and `Assistant:` take turns, each after a blank line."""
    parts = SPEAKER.split(text)[1:]
    return [
        {"role": SPEAKERS[who], "content": said.strip()}
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def _transcript_column(raw: Mapping[str, Any], config: DataConfig) -> str:
    columns = (config.text_column, "text", "chosen", "transcript")
    return next((name for name in columns if _is_transcript(raw.get(name))), config.text_column)


def _read_transcript(fields: Fields) -> Row:
    column = _transcript_column(fields.raw, fields.config)
    text = fields.text(column)
    if not _is_transcript(text):
        raise RowFault(
            f"the column {column!r} is no transcript",
            "give a text in which `Human:` and `Assistant:` take turns, each after a blank line",
        )
    return chat_row(_transcript(text))


def _read_preference(fields: Fields) -> Row:
    """The preferred answer, with the prompt before it."""
    chosen, prompt = fields.get("chosen"), fields.raw.get("prompt")
    if _is_transcript(chosen):
        return chat_row(_transcript(fields.text("chosen")))
    if _is_chat(chosen):
        # Some data repeat the prompt in the answer's chat.
        whole = any(ROLES.get(str(turn.get("role", turn.get("from")))) == "user" for turn in chosen)
        fields.get("prompt")
        return chat_row(chosen) if whole else pair_row(_text_or_chat(fields, "prompt"), chosen, plain=False)
    if prompt is None:
        return Row(text=("", fields.text("chosen")))
    return pair_row(_text_or_chat(fields, "prompt"), fields.text("chosen"), plain=True)


def _read_kto(fields: Fields) -> Row | None:
    """The completion of a row that is labelled as wanted; others are left out."""
    return _read_prompt_completion(fields) if fields.get("label") is True else None


def _read_text(fields: Fields) -> Row:
    return Row(text=("", fields.text(fields.config.text_column)))


def _read_prompts(fields: Fields) -> Row:
    """A prompt without a response: the model's own answer becomes it."""
    columns = (fields.config.prompt_column, *PROMPTS)
    column = next((name for name in columns if _has(fields.raw, name)), fields.config.prompt_column)
    prompt = _text_or_chat(fields, column)
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages = tuple(_message(turn) for turn in turns)
    return Row(messages, answered=False)


def _fits_chat(keys: str) -> Callable[[Mapping[str, Any], DataConfig], bool]:
    return lambda raw, config: keys in _chat_keys(raw, config)


def _fits_columns(*columns: str) -> Callable[[Mapping[str, Any], DataConfig], bool]:
    return lambda raw, _config: _has(raw, *columns)


_PREFERENCE = (
    "these are rows of preferences, and a preference plan (DPO, ORPO, KTO) needs the loss of both answers "
    "under the trained and the reference model, which arisk does not train"
)

_TABLE: Sequence[Format] = (
    Format(
        "preference",
        "`chosen` and `rejected`, with or without `prompt`; the chosen answer is trained",
        _fits_columns("chosen", "rejected"),
        _read_preference,
        "completion",
        _PREFERENCE,
    ),
    Format(
        "kto",
        "`prompt`, `completion` and a true or false `label`; the completions labelled true are trained",
        lambda raw, _config: _has(raw, "prompt", "completion") and isinstance(raw.get("label"), bool),
        _read_kto,
        "completion",
        _PREFERENCE,
    ),
    Format(
        "messages",
        "`messages`: a chat of role and content, with `tools` where there are any",
        _fits_chat("role"),
        _read_chat,
        "all",
    ),
    Format("sharegpt", "`conversations`: a chat of from and value", _fits_chat("from"), _read_chat, "all"),
    Format(
        "prompt_completion",
        "`prompt` and `completion`: texts that are joined without a chat template, or chats",
        _fits_columns("prompt", "completion"),
        _read_prompt_completion,
        "completion",
    ),
    Format(
        "alpaca",
        "`instruction`, `output`, and where there are any `input`, `system`, `history`",
        _fits_columns("instruction", "output"),
        _read_instruction,
        "completion",
    ),
    Format(
        "dolly",
        "`instruction`, `response`, and `context` where there is any",
        _fits_columns("instruction", "response"),
        _read_instruction,
        "completion",
    ),
    Format(
        "prompt_response",
        "a column with the prompt and one with the response, made a chat of two turns",
        lambda raw, config: _has(raw, *_pair_columns(raw, config)),
        _read_prompt_response,
        "completion",
    ),
    Format(
        "transcript",
        "a text in which `Human:` and `Assistant:` take turns",
        lambda raw, config: _is_transcript(raw.get(_transcript_column(raw, config))),
        _read_transcript,
        "assistant",
    ),
    Format(
        "text",
        "`text`: plain text, of which every token is trained",
        lambda raw, config: _has(raw, config.text_column),
        _read_text,
        "all",
    ),
    Format(
        "prompts",
        "prompts without a response",
        lambda raw, config: any(_has(raw, name) for name in (config.prompt_column, *PROMPTS)),
        _read_prompts,
        "completion",
    ),
)

#: Every layout by its name, in the order in which `format: auto` tries them.
FORMATS: dict[str, Format] = {layout.name: layout for layout in _TABLE}
