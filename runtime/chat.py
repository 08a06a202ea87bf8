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
from runtime.cli.terminal import say, until_first
from runtime.text.conversation import Chat
from runtime.text.sampler import Rng

_HELP = """\
/system TEXT  set the system message; without TEXT, remove it
/undo         take back the last message and its answer
/reset        start a new conversation with the same system message
/save FILE    write the conversation to a file, as JSON in the form of OpenAI's messages
/load FILE    continue the conversation in such a file
/help         list the commands
/exit         quit, as Ctrl-D does
//TEXT        send /TEXT as a message
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
            if line.startswith("/") and not line.startswith("//"):
                if not _obey(chat, line):
                    break
            elif line.strip():
                _talk(chat, line.removeprefix("/"))
        except InputError as error:
            say(f"error: {error}", "red")
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
    from prompt_toolkit.output import create_output
    from prompt_toolkit.styles import Style

    screen = create_output(always_prefer_tty=True)  # stderr, if stdout goes to a file
    session = PromptSession[str]("> ", style=Style([("", "ansigreen")]), output=screen)
    while True:
        try:
            yield valid(session.prompt())
        except EOFError:
            return
        except KeyboardInterrupt:
            if not session.default_buffer.text:
                return


def _obey(chat: Chat, line: str) -> bool:
    """Runs a command line that begins with a slash; returns whether the chat continues.

    Raises:
        InputError: the command is unknown or cannot be run.
    """
    name, _, text = line.strip().partition(" ")
    text = text.strip()
    if name == "/exit":
        return False
    if name == "/reset":
        chat.reset()
    elif name == "/system":
        chat.instruct(text or None)
    elif name == "/undo":
        say(f"took back: {chat.undo()}", "dim")
    elif name in ("/save", "/load") and not text:
        raise InputError(f"{name} lacks the name of a file; give one, such as {name} chat.json")
    elif name == "/save":
        say(f"saved {chat.save(Path(text).expanduser())} messages to {text}", "dim")
    elif name == "/load":
        say(f"loaded {chat.load(Path(text).expanduser())} messages from {text}", "dim")
    elif name == "/help":
        say(_HELP)
    else:
        raise InputError(f"{name} is unknown; /help lists the commands")
    return True


def _talk(chat: Chat, line: str) -> None:
    """Prints the answer to a message. Ctrl-C ends the answer."""
    steps = chat.send(line)
    if chat.forgotten:
        turns = "turn was" if chat.forgotten == 1 else f"{chat.forgotten} turns were"
        say(f"the context of {chat.capacity} tokens is full: the oldest {turns} forgotten", "dim")
    step = None
    with _interrupts() as interrupts:
        for step in until_first("prefill", _prefill(chat, interrupts), steps):
            print(step.text, end="", flush=True)
            if interrupts:
                break
        chat.stop()
    print(flush=True)
    if step is None:
        say("the message is not kept, because its answer had not begun", "dim")
    elif step.finish_reason == "length" and chat.is_full:
        say(f"the context of {chat.capacity} tokens is full: the answer ends here", "dim")


def _prefill(chat: Chat, interrupts: list[int]) -> Iterator[tuple[int, int]]:
    """Prefills the message just sent, see `Chat.prefill`. Ctrl-C then ends the answer before it begins."""
    for done in chat.prefill():
        yield done
        if interrupts:
            chat.stop()
            return


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
