"""Messages become text: the pieces of a prompt in order, each marked as given (no loss) or answered (loss).

The same function serves training and chatting, so what the model sees while talking is what it was trained on.
An answer ends with the end token; `Piece.end` says where. Prompt wording: Alpaca (Taori et al. 2023) and Guanaco
(artidoro/qlora), character for character, including Alpaca's blank after "### Response:".
"""

from dataclasses import dataclass
from typing import Any

from ..cli import UserError
from .formats import Example, Message


@dataclass(frozen=True)
class Piece:
    """A stretch of text. `answer`: it carries loss. `end`: the end token follows. `markup`: may hold special tokens."""

    text: str
    answer: bool
    end: bool = False
    markup: bool = False


_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response: "
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response: "
)


def _user_text(message: Message) -> str:
    return f"{message.text}\n\n{message.context}" if message.context.strip() else message.text


def _single_turn(messages: Example, template: str) -> tuple[Message, str | None]:
    """The user message and the answer (None when it is still to be given)."""
    turns = [m for m in messages if m.role != "system"]
    if [m.role for m in turns] not in (["user"], ["user", "assistant"]) or len(turns) != len(messages):
        raise UserError(f"the {template} template holds one question and one answer; use --template guanaco or chat.")
    return turns[0], turns[1].text if len(turns) == 2 else None


def _alpaca(messages: Example) -> list[Piece]:
    user, answer = _single_turn(messages, "alpaca")
    head, tail = (_ALPACA_INPUT if user.context.strip() else _ALPACA).split("{instruction}")
    prompt = head + user.text + tail.replace("{input}", user.context)
    return [Piece(prompt, False)] + ([Piece(answer, True, end=True)] if answer is not None else [])


def _plain(messages: Example) -> list[Piece]:
    user, answer = _single_turn(messages, "plain")
    return [Piece(_user_text(user), False)] + ([Piece(answer, True, end=True)] if answer is not None else [])


def _guanaco(messages: Example) -> list[Piece]:
    """`### Human: ... ### Assistant: ...`; every answer ends with the end token, so that a chat knows when to stop."""
    pieces = []
    for i, m in enumerate(messages):
        gap = "" if i == 0 else "\n"
        if m.role == "system":
            pieces.append(Piece(gap + m.text, False))
        elif m.role == "user":
            pieces.append(Piece(f"{gap}### Human: {_user_text(m)}\n### Assistant: ", False))
        else:
            pieces.append(Piece(m.text, True, end=True))
    return pieces


def _chat(messages: Example, tokenizer: Any) -> list[Piece]:
    """The tokenizer's own chat template, cut where each answer begins and ends.

    The cut is found by rendering every prefix of the conversation: a template that rewrites earlier turns cannot be cut
    and is refused (its loss mask would be a guess).
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "this model's tokenizer has no chat template; use --template guanaco (or alpaca for single turns)."
        )
    turns = [{"role": m.role, "content": _user_text(m) if m.role == "user" else m.text} for m in messages]
    pieces: list[Piece] = []
    done = ""
    for i, m in enumerate(messages):
        if m.role != "assistant":
            continue
        prompt, full = _rendered(tokenizer, turns[:i], True), _rendered(tokenizer, turns[: i + 1], False)
        if not (prompt.startswith(done) and full.startswith(prompt)):
            raise UserError(
                "this chat template rewrites earlier turns, so answers cannot be located; use --template guanaco."
            )
        pieces += [
            Piece(prompt[len(done) :], False, markup=True),
            Piece(full[len(prompt) :], True, markup=True),
        ]
        done = full
    if messages[-1].role != "assistant":
        pieces.append(Piece(_rendered(tokenizer, turns, True)[len(done) :], False, markup=True))
    return pieces


def _rendered(tokenizer: Any, turns: list[dict[str, str]], ask: bool) -> str:
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask)
    except Exception as error:  # a template is a program; whatever it raises, it raises about this conversation
        raise UserError(f"the chat template refuses this conversation: {error}.") from None


def render(messages: Example, template: str, tokenizer: Any) -> list[Piece]:
    """The pieces of a conversation under a template; without a last assistant message, the prompt that asks for it."""
    if template == "alpaca":
        return _alpaca(messages)
    if template == "plain":
        return _plain(messages)
    if template == "guanaco":
        return _guanaco(messages)
    if template == "chat":
        return _chat(messages, tokenizer)
    raise UserError(f"there is no template '{template}'.")
