"""The command `llama-pte`, with all commands as sub-commands; each is also `python -m` its module.

llama-pte export --max-seq-len 512
llama-pte generate tiny.pte --prompt "Once upon a time"
"""

import sys
from typing import NamedTuple

from runtime.cli import command


class SubCommand(NamedTuple):
    """A command's module, and a one-line summary."""

    module: str
    summary: str


COMMANDS = {
    "export": SubCommand("export.llama", "export a checkpoint to one .pte file and verify it"),
    "verify": SubCommand("export.verify", "compare a .pte file with its checkpoint"),
    "inspect": SubCommand("export.inspect", "print what a .pte file or a checkpoint contains and needs"),
    "generate": SubCommand("runtime.generate", "continue a prompt"),
    "chat": SubCommand("runtime.chat", "chat with a model in the terminal"),
    "batch": SubCommand("runtime.batch", "continue many prompts, several at once"),
    "serve": SubCommand("runtime.serve", "serve a .pte file over OpenAI's HTTP API"),
    "bench": SubCommand("runtime.bench", "measure prefill and decode speed on this machine"),
    "pipeline": SubCommand("runtime.pipeline", "run shards or slices on several machines, under torchrun"),
    "placement": SubCommand("runtime.placement", "predict how fast shards would run on several machines"),
}


def main() -> int:
    """Runs the sub-command that the first argument names, with the remaining arguments."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name not in COMMANDS:
        print(f"error: {name} is not a sub-command of llama-pte; choose from {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    sys.argv[:2] = [f"{command.SCRIPT} {name}"]
    return command.start(COMMANDS[name].module)


def _usage() -> str:
    lines = [f"  {name:10} {found.summary}" for name, found in COMMANDS.items()]
    return "\n".join([
        "usage: llama-pte COMMAND ...",
        "",
        "Exports Llama checkpoints as self-contained ExecuTorch .pte files, and runs them.",
        "",
        "commands:",
        *lines,
        "",
        "llama-pte COMMAND --help lists a command's flags.",
    ])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
