"""Records docs/terminal.svg, the picture in the README, from a real run in an empty folder.

python docs/record_terminal.py
"""

import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = (
    "llama-pte export --max-seq-len 512",
    'llama-pte generate tiny.pte --prompt "Once upon a time" --max-new-tokens 60',
)


def output(command: str, folder: str) -> str:
    """What the command prints, as a terminal shows it: an export's file name last, a text before its statistics."""
    call = [sys.executable, "-m", "runtime.cli.llama_pte", *shlex.split(command)[1:]]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": folder}
    done = subprocess.run(call, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    parts = (done.stderr, done.stdout) if done.stdout.endswith("\n") else (done.stdout, done.stderr)
    return "\n".join(part.rstrip("\n") for part in parts)


def main() -> None:
    """Runs the commands and writes the picture."""
    console = Console(record=True, width=100, file=io.StringIO())
    with tempfile.TemporaryDirectory() as folder:
        for command in COMMANDS:
            console.print(Text("$ ", style="green") + Text(command, style="bold"))
            console.print(Text(output(command, folder)))
    svg = console.export_svg(title="llama-pte", unique_id="terminal")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # they would be loaded from another host
    (ROOT / "docs" / "terminal.svg").write_text(re.sub(r"Fira Code(, )?", "", svg))


if __name__ == "__main__":
    main()
