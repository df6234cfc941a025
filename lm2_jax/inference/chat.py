"""Conversations: the chat template of a checkpoint, and a memory that takes the turns as they come.

A template is a program in the Jinja language that comes with a checkpoint. It runs in Jinja's sandbox, which keeps it
from files, modules and attributes; it can only make text.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from etils import epath

from lm2_jax.data.tokenizer_base import FileTokenizer
from lm2_jax.errors import UserError
from lm2_jax.inference.engine import Engine, Piece, Request
from lm2_jax.inference.reading import Reader
from lm2_jax.inference.sampling import Sampling
from lm2_jax.inference.snapshot import MemorySnapshot, Source, empty_memory

if TYPE_CHECKING:
    from lm2_jax.runs import Run

TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
_MOST_CHARACTERS = 1 << 20  # of a template
# Characters of Unicode's private area stand for a message while the template is run.
_MESSAGE = re.compile("\ue000(\\d+)\ue001")


class Message(NamedTuple):
    """One message of a conversation."""

    role: str  # user, assistant, system
    tokens: Sequence[int]


class ChatTemplate:
    """How a checkpoint writes a conversation.

    What a person writes is never read as markup: the template is run with a mark in the place of each message, and the
    message's own tokens replace the mark.

    Args:
      source: the Jinja template.
      names: values of `bos_token` and `eos_token`, and of others that the template uses.
      tokenizer: of the model.
      where: the file, for messages.
    Raises:
      UserError: the template is damaged.
    """

    def __init__(self, source: str, names: dict[str, str], tokenizer: FileTokenizer, where: str):
        import jinja2.sandbox

        self._names, self._tokenizer, self._where = names, tokenizer, where
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _no_clock}
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        special = tokenizer.special_ids()
        self._special = special
        longest_first = sorted(special, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if special else None
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"{where}: the chat template is damaged: {error}", status=1) from error

    @classmethod
    def load(cls, folder: epath.PathLike, tokenizer: FileTokenizer) -> "ChatTemplate":
        """The template in the folder of a model, `chat_template.jinja` or a field of `tokenizer_config.json`.

        Raises:
          UserError: there is none, or it is damaged.
        """
        folder = epath.Path(folder)
        names: dict[str, str] = {}
        source, where = None, folder / TEMPLATE
        if (folder / TOKENIZER_CONFIG).exists():
            plain = _table(folder / TOKENIZER_CONFIG)
            for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
                token = plain.get(name)
                token = token.get("content") if isinstance(token, dict) else token
                names[name] = token if isinstance(token, str) else ""
            source = _default_template(plain.get("chat_template"))
            where = folder / TEMPLATE if source is None else folder / TOKENIZER_CONFIG
        if (folder / TEMPLATE).exists():
            where = folder / TEMPLATE
            source = _text(where)
        if source is None:
            raise UserError(
                f"--chat: {folder} has no chat template ({TEMPLATE}, or chat_template in {TOKENIZER_CONFIG}); use "
                "--prompt TEXT"
            )
        if len(source) > _MOST_CHARACTERS:
            raise UserError(f"{where}: the chat template has {len(source):,} characters", status=1)
        return cls(source, names, tokenizer, str(where))

    def tokens(self, messages: Sequence[Message], is_answer_next: bool = True) -> list[int]:
        """The tokens of a conversation.

        Args:
          messages: so far.
          is_answer_next: adds the beginning of the model's turn.
        Raises:
          UserError: the template refuses the roles, or changes what a message says.
        """
        marked = [{"role": message.role, "content": f"\ue000{number}\ue001"} for number, message in enumerate(messages)]
        try:
            text = self._template.render(messages=marked, add_generation_prompt=is_answer_next, **self._names)
        except Exception as error:  # a template may fail in any way
            raise UserError(f"{self._where}: the chat template failed: {error}", status=1) from error
        ids, end = [], 0
        for found in _MESSAGE.finditer(text):
            ids += self._markup(text[end : found.start()])
            ids += messages[int(found[1])].tokens
            end = found.end()
        ids += self._markup(text[end:])
        shown = {int(found[1]) for found in _MESSAGE.finditer(text)}
        if lost := [number for number in range(len(messages)) if number not in shown]:
            raise UserError(f"{self._where}: the chat template leaves out or changes message {lost[0] + 1}", status=1)
        return ids

    def end_ids(self) -> tuple[int, ...]:
        """The special token with which the template ends the model's turn, if there is one."""
        mark = Message("assistant", (-1,))
        try:
            ids = self.tokens([Message("user", ()), mark], is_answer_next=False)
        except UserError:
            return ()
        after = ids[ids.index(-1) + 1 :]
        return tuple(i for i in after[:1] if i in self._special.values())

    def _markup(self, text: str) -> list[int]:
        """Tokens of the template's own text, in which names of special tokens mean these tokens."""
        if self._split is None:
            return self._tokenizer.encode(text) if text else []
        parts = self._split.split(text)
        ids: list[int] = []
        for part in parts:
            if part in self._special:
                ids.append(self._special[part])
            elif part:
                ids += self._tokenizer.encode(part)
        return ids


class Chat:
    """A conversation with a model; all that was said is in its memory.

    Args:
      run: a trained run.
      template: of its checkpoint.
      memory: what was read before the conversation; None: nothing.
    """

    def __init__(self, run: "Run", template: ChatTemplate, memory: MemorySnapshot | None = None):
        self._run, self._template = run, template
        self._reader = Reader(empty_memory(run) if memory is None else memory)
        self._reader.begin(Source("conversation", None, 0, False))
        self._messages: list[Message] = []
        self._read: list[int] = []
        self._end_ids = template.end_ids()

    def finish(self) -> MemorySnapshot:
        """What is remembered, the last answer included."""
        self._catch_up(self._template.tokens(self._messages, is_answer_next=False) if self._messages else [])
        return self._reader.memory

    def _catch_up(self, ids: list[int]) -> None:
        """Reads what is new in the conversation."""
        if ids[: len(self._read)] != self._read:
            raise UserError(
                "--chat: the chat template writes earlier turns anew after each message, which a recurrent memory "
                "cannot take back; use --prompt TEXT",
                status=1,
            )
        self._reader.feed(np.array(ids[len(self._read) :], np.int32))
        self._read = ids

    def say(
        self, text: str, max_new_tokens: int, sampling: Sampling = Sampling(), stop: tuple[str, ...] = ()
    ) -> Iterator[str]:
        """The model's answer to a message, as it comes.

        Args:
          text: the message.
          max_new_tokens: most tokens of the answer.
          sampling: how tokens are chosen; each turn draws anew.
          stop: the answer ends before the first of these strings.
        Raises:
          UserError: the template does not write a conversation turn after turn.
        """
        turn = len(self._messages)
        said = [*self._messages, Message("user", self._run.tokenizer.encode(text))]
        self._catch_up(self._template.tokens(said))
        self._messages = said
        request = Request(np.zeros(0, np.int32), turn, max_new_tokens, sampling, stop=stop, end_ids=self._end_ids)
        last: Piece | None = None
        for piece in Engine(self._run, self._reader.memory, 1).generate([request]):
            last = piece
            yield piece.text
        assert last is not None
        assert last.answer is not None
        self._messages = [*said, Message("assistant", tuple(last.answer.ids))]


def _default_template(value: Any) -> str | None:
    """The template of a field that may hold several by name."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        found = named.get("default")
        return found if isinstance(found, str) else None
    return None


def _text(path: epath.Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected UTF-8 text: {error}", status=1) from error


def _table(path: epath.Path) -> dict[str, Any]:
    try:
        plain = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}", status=1) from error
    if not isinstance(plain, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(plain).__name__}", status=1)
    return plain


def _refuse(message: str) -> None:
    """What templates call where roles do not alternate, and so on."""
    raise ValueError(message)


def _no_clock(_: str) -> str:
    """Templates that ask for the date get none, so that a conversation can be repeated."""
    return ""
