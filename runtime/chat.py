"""The command that talks with an exported model, and Chat: messages and answers in turns, over one session.

python -m runtime.chat llama.pte
python -m runtime.chat llama.pte --system "Answer in one sentence." --temperature 0.7 --seed 7
"""

from model import command

if __name__ == "__main__":
    command.start("runtime.chat")

import argparse
import io
import signal
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

from model.errors import InputError
from preproc.chat import ASSISTANT, NAMED, SYSTEM, USER, Message, named
from preproc.jinja_template import Carried, from_file
from runtime.flags import add_generation_flags, add_program_flags, generation_options, open_program, valid
from runtime.generation import GenerationOptions, Step, generate
from runtime.program import Program
from runtime.sampler import Rng
from runtime.session import Session

ANSWER_SHARE = 4
"""A message leaves at least a fourth of the context to its answer, unless it is too long by itself."""

_WORD = "Zumpango"
"""A system message that no template holds."""


class Chat:
    """A talk: each message is answered in the light of those before it.

    Attributes:
        system: the system message, or None; it may be changed between turns.
        messages: what was said, without the system message: of user and assistant in turns.
        forgotten: how many of the oldest turns were forgotten to make room for the latest message.
    """

    def __init__(
        self,
        program: Program,
        options: GenerationOptions,
        rng: Rng,
        system: str | None = None,
        template: Carried | None = None,
    ) -> None:
        """Starts a talk.

        Args:
            options: how each answer is chosen; the ids that end one come from the program and the template.
            template: None for the one in the file.

        Raises:
            InputError: there is no tokenizer or no template, or the template takes no system message.
        """
        if program.tokenizer is None:
            raise InputError("the file carries no tokenizer; export it again with --tokenizer")
        template = template or from_file(program.metadata.chat_template)
        if template is None:
            raise InputError(
                f"the file carries no chat template; export it again with --chat-template {', '.join(NAMED)} or a file"
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
        self._steps: Generator[Step, None, None] | None = None
        self.system: str | None = None
        self.instruct(system)

    @property
    def capacity(self) -> int:
        """How many tokens the talk can have."""
        return self._session.capacity

    @property
    def is_full(self) -> bool:
        """Whether no more token fits, so that an answer had to end."""
        return self._session.position == self._session.capacity

    def instruct(self, system: str | None) -> None:
        """Sets the system message for what follows, or takes it away.

        Raises:
            InputError: the template takes none.
        """
        if system is not None and _WORD not in self.template.text([(SYSTEM, _WORD), (USER, "")]):
            raise InputError("the chat template takes no system message; leave it out")
        self.system = system

    def reset(self) -> None:
        """Starts anew, with the same system message."""
        self.stop()
        self.messages.clear()
        self.forgotten = 0

    def send(self, message: str) -> Iterator[Step]:
        """Answers a message, one step at a time.

        Where the context has no room for all, the oldest turns are forgotten; see `forgotten`.

        Raises:
            InputError: the message does not fit even by itself; the talk is then as it was.
        """
        self.stop()
        self._steps = self._answer(message, self._fitting(message))
        return self._steps

    def stop(self) -> None:
        """Ends the answer: what was said until now is all of it."""
        if self._steps:
            self._steps.close()
        self._steps = None

    def _fitting(self, message: str) -> list[int]:
        """The ids of the talk with a message, without as many of the oldest turns as it takes."""
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


_HELP = """\
/system TEXT  set the system message; without TEXT, take it away
/reset        start anew, with the same system message
/help         this list
/exit         leave, as Ctrl-D does
Ctrl-C ends an answer, and leaves at an empty prompt."""


def main(arguments: list[str] | None = None) -> int:
    """The command: answers to stdout, all else to stderr; exit code 0, or 2 for bad input."""
    options = _parser().parse_args(arguments)
    generation_options(options)
    program = open_program(options, options.file)
    how = generation_options(options, program.metadata.sampling)
    template = None
    if options.chat_template and program.tokenizer:
        template = named(options.chat_template, program.tokenizer)
    system = None if options.system is None else valid(options.system)
    chat = Chat(program, how, Rng(options.seed), system, template)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace", newline="\n")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    for line in _lines():
        try:
            if line.startswith("/"):
                if not _obey(chat, line):
                    break
            elif line.strip():
                _talk(chat, line)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("runtime.chat", "Talks with an exported .pte.", __doc__)
    add = parser.add_argument
    add("file", type=Path, help="the .pte, or the folder of its shards")
    add("--system", metavar="TEXT", help="the system message: how to answer (default: what the template says, if any)")
    add("--chat-template", metavar="NAME", help=f"{', '.join(NAMED)} (default: the one in the file)")
    add_generation_flags(parser, as_recommended=True)
    add_program_flags(parser)
    return parser


def _lines() -> Iterator[str]:
    """What is typed or piped in, line by line."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.removesuffix("\n").removesuffix("\r")
        return
    from prompt_toolkit import PromptSession  # which is of no use otherwise

    session = PromptSession[str]()
    while True:
        try:
            yield session.prompt("> ")
        except EOFError:
            return
        except KeyboardInterrupt:
            if not session.default_buffer.text:
                return


def _obey(chat: Chat, line: str) -> bool:
    """Does what a line says that begins with a slash; whether the talk goes on.

    Raises:
        InputError: nothing is known under that name.
    """
    name, _, text = line.strip().partition(" ")
    if name == "/exit":
        return False
    if name == "/reset":
        chat.reset()
    elif name == "/system":
        chat.instruct(text.strip() or None)
    elif name == "/help":
        print(_HELP, file=sys.stderr)
    else:
        raise InputError(f"{name} is unknown; /help lists what can be given")
    return True


def _talk(chat: Chat, line: str) -> None:
    """Prints the answer to a message. Ctrl-C ends it."""
    steps = chat.send(line)
    if chat.forgotten:
        turns = "turn was" if chat.forgotten == 1 else f"{chat.forgotten} turns were"
        print(f"the context of {chat.capacity} tokens is full: the oldest {turns} forgotten", file=sys.stderr)
    reason = None
    with _interrupts() as interrupts:
        for step in steps:
            print(step.text, end="", flush=True)
            reason = step.finish_reason
            if interrupts:
                break
        chat.stop()
    print(flush=True)
    if reason == "length" and chat.is_full:
        print(f"the context of {chat.capacity} tokens is full: the answer ends here", file=sys.stderr)


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collects what Ctrl-C would raise: a step is to be finished, so that the session stays usable."""
    seen = list[int]()

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)

    usual = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, usual)
