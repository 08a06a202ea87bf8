"""The command `runtime.chat`, which chats with an exported model.

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
/system TEXT  set the system message; without TEXT, remove it
/reset        start a new conversation with the same system message
/help         list the commands
/exit         quit, as Ctrl-D does
Ctrl-C ends an answer, and quits at an empty prompt."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command: prints answers to stdout, and everything else to stderr.

    Returns:
        exit code 0; for bad input the command ends with 2.
    """
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
    parser = command.parser("runtime.chat", "Chats with the model in a .pte file.", __doc__)
    add = parser.add_argument
    add("file", type=Path, help=".pte file, or folder of shards or slices")
    add("--system", metavar="TEXT", help="system message (default: the chat template's own, if any)")
    add("--chat-template", metavar="NAME", help=f"chat template: {', '.join(NAMED)} (default: the file's)")
    add_generation_flags(parser, as_recommended=True)
    add_program_flags(parser)
    return parser


def _lines() -> Iterator[str]:
    """Yields the lines that are typed or piped in."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.removesuffix("\n").removesuffix("\r")
        return
    from prompt_toolkit import PromptSession  # only needed on a terminal

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
    """Runs a command line that begins with a slash; returns whether the chat continues.

    Raises:
        InputError: the command is unknown.
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
        raise InputError(f"{name} is unknown; /help lists the commands")
    return True


def _talk(chat: Chat, line: str) -> None:
    """Prints the answer to a message. Ctrl-C ends the answer."""
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
    """Records Ctrl-C in a list instead of raising, so that the current step ends and the session stays usable."""
    seen = list[int]()

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)

    usual = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, usual)
