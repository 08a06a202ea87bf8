"""The command that talks with an exported model.

python -m runtime.chat llama.pte
python -m runtime.chat llama.pte --system "Answer in one sentence." --temperature 0.7 --seed 7
"""

from runtime.cli import command

if __name__ == "__main__":
    command.start("runtime.chat")

import argparse
import io
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from model.errors import InputError
from preproc.chat_template import NAMED, named
from runtime.cli.flags import add_generation_flags, add_program_flags, generation_options, open_program, valid
from runtime.text.conversation import Chat
from runtime.text.sampler import Rng

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
