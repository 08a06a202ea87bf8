"""A chat: messages and answers in turns, over one session."""

import json
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path

from model.errors import InputError
from preproc.chat_template import ASSISTANT, NAMED, SYSTEM, USER, Message
from preproc.jinja_template import Carried, from_file
from runtime.atomic_file import replacing
from runtime.engine.program import Program
from runtime.engine.session import Session
from runtime.text.generation import GenerationOptions, Step, generate
from runtime.text.sampler import Rng

ANSWER_SHARE = 4
"""Divisor of the context: capacity // ANSWER_SHARE tokens, or max_new_tokens if that is less, are reserved for an
answer, unless the message alone is too long for that.
"""


_WORD = "Zumpango"
"""A word that no template contains, to find out whether a template renders the system message."""


class Chat:
    """A conversation: each message is answered with the messages before it as context.

    Attributes:
        system: the system message, or None; it may be changed between turns.
        messages: the messages of user and assistant in turns, without the system message.
        forgotten: number of the oldest turns that were removed to make room for the latest message.
    """

    def __init__(
        self,
        program: Program,
        options: GenerationOptions,
        rng: Rng,
        system: str | None = None,
        template: Carried | None = None,
    ) -> None:
        """Starts an empty conversation.

        Args:
            options: how each answer is generated; the ids that end it come from the program and the template.
            template: the chat template; None for the one in the file.

        Raises:
            InputError: there is no tokenizer or no template, or there is a system message and the template takes none.
        """
        if program.tokenizer is None:
            raise InputError("the file has no tokenizer; export it again with --tokenizer")
        template = template or from_file(program.metadata.chat_template)
        if template is None:
            raise InputError(
                f"the file has no chat template; export it again with --chat-template {', '.join(NAMED)} or a file"
            )
        self.template = template
        self._tokenizer = program.tokenizer
        metadata = program.metadata
        stop_ids = self.template.stop_ids(self._tokenizer, metadata.bos_id, metadata.stop_ids)
        self._options = replace(options, stop_ids=stop_ids)
        self._rng = rng
        self._session = Session(program)
        self.messages = list[Message]()
        self.forgotten = 0
        self._prompt = list[int]()
        self._steps: Generator[Step, None, None] | None = None
        self.system: str | None = None
        self.instruct(system)

    @property
    def capacity(self) -> int:
        """Maximum number of tokens in the conversation."""
        return self._session.capacity

    @property
    def is_full(self) -> bool:
        """Whether the context is full, which ends an answer."""
        return self._session.position == self._session.capacity

    def instruct(self, system: str | None) -> None:
        """Sets the system message for the following answers; None removes it.

        Raises:
            InputError: the template takes none.
        """
        if system is not None and _WORD not in self.template.text([(SYSTEM, _WORD), (USER, "")]):
            raise InputError("the chat template supports no system message; leave it out")
        self.system = system

    def reset(self) -> None:
        """Starts a new conversation with the same system message."""
        self.stop()
        self.messages.clear()
        self.forgotten = 0

    def send(self, message: str) -> Iterator[Step]:
        """Yields the answer to a message, one step at a time.

        If the context has no room for all messages, the oldest turns are removed; see `forgotten`.

        Raises:
            InputError: the message does not fit even alone; the conversation is then unchanged.
        """
        self.stop()
        self._prompt = self._fitting(message)
        self._steps = self._answer(message, self._prompt)
        return self._steps

    def prefill(self) -> Iterator[tuple[int, int]]:
        """Runs the conversation and the message just sent, but for the last step, with which the answer begins.

        See `Session.begin`. An answer whose prefill was not run begins with all of it.
        """
        return self._session.begin(self._prompt)

    def stop(self) -> None:
        """Ends the answer; what was generated so far becomes the assistant's message."""
        if self._steps:
            self._steps.close()
        self._steps = None

    def undo(self) -> str:
        """Takes back the last message and its answer, and returns the message.

        The text before them stays in the KV cache, so that the next message runs only what is new.

        Raises:
            InputError: there is no message.
        """
        self.stop()
        if not self.messages:
            raise InputError("there is no message to take back; send one first")
        (_, message), _ = self.messages[-2:]
        del self.messages[-2:]
        return message

    def save(self, path: Path) -> int:
        """Writes the system message and the messages to a file, as OpenAI's API takes them, and returns their number.

        Raises:
            InputError: the file cannot be written.
        """
        self.stop()
        system = [] if self.system is None else [(SYSTEM, self.system)]
        said = [{"role": role, "content": content} for role, content in [*system, *self.messages]]
        with replacing(path) as temporary:
            temporary.write_bytes(json.dumps(said, ensure_ascii=False, indent=1).encode() + b"\n")
        return len(said)

    def load(self, path: Path) -> int:
        """Continues the conversation in a file that `save` wrote, with its system message, if any, and returns the
        number of messages.

        Raises:
            InputError: the file cannot be read, or has no conversation that the template takes; this one then goes on.
        """
        system, messages = _read(path)
        self.instruct(system)
        self.reset()
        self.messages = messages
        return len(messages) + (system is not None)

    def _fitting(self, message: str) -> list[int]:
        """Removes as many of the oldest turns as necessary; returns the ids of the conversation and the message."""
        wanted = self.capacity // ANSWER_SHARE
        room = self.capacity - min(wanted, self._options.max_new_tokens or wanted)
        system = [] if self.system is None else [(SYSTEM, self.system)]
        for start in range(0, len(self.messages) + 1, 2):
            ids = self.template.encode([*system, *self.messages[start:], (USER, message)], self._tokenizer)
            if len(ids) <= room:
                break
        if len(ids) > self.capacity:
            raise InputError(
                f"the message has {len(ids)} tokens with what the chat template adds, but the context only "
                f"{self.capacity}; shorten it or export with a larger --max-seq-len"
            )
        self.forgotten = start // 2
        del self.messages[:start]
        return ids

    def _answer(self, message: str, prompt: Sequence[int]) -> Generator[Step, None, None]:
        said = list[str]()
        try:
            for step in generate(self._session, prompt, self._options, self._rng, self._tokenizer):
                said.append(step.text)
                yield step
        finally:
            if said:
                self.messages += [(USER, message), (ASSISTANT, "".join(said))]


def _read(path: Path) -> tuple[str | None, list[Message]]:
    """Reads the system message, if any, and the messages of user and assistant in turns, from a JSON file.

    Raises:
        InputError: the file cannot be read or has something else.
    """
    try:
        said = [(message["role"], message["content"]) for message in json.loads(path.read_bytes())]
        "".join(text for message in said for text in message).encode()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a file that a chat was saved to") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(
            f'{path} is not a saved chat; give a JSON list of messages such as {{"role": "user", "content": "Hello"}}'
        ) from error
    system = said.pop(0)[1] if said and said[0][0] == SYSTEM else None
    for number, ((role, _), expected) in enumerate(zip(said, cycle((USER, ASSISTANT)), strict=False)):
        if role != expected:
            number += 1 if system is None else 2
            raise InputError(
                f"message {number} of {path} is from {role}; give user and assistant in turns, and before them at most "
                "one from system"
            )
    if len(said) % 2:
        raise InputError(f"the last message of {path} has no answer; add one, or leave the message out")
    return system, said
