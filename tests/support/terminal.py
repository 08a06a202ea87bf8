"""A command in a terminal of its own, as a person at it sees and types."""

import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from types import TracebackType

from tests.conftest import ROOT

CONTROL = re.compile(rb"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[=>()][AB0]?")
"""Control sequences, which move the cursor and change colours."""


class Terminal:
    """A process whose stdin, stdout and stderr are a pseudo-terminal, which Ctrl-C in it reaches as a signal.

    Attributes:
        screen: all that was written so far, as bytes with control sequences.
    """

    def __init__(self, module: str, *arguments: str, env: Mapping[str, str] | None = None, redirect: str = "") -> None:
        """Starts `python -m module` with the arguments.

        Args:
            env: environment variables beside the usual ones.
            redirect: redirection in the shell's syntax, such as `>file`.
        """
        self._own, theirs = os.openpty()
        name = os.ttyname(theirs)
        # The first terminal that a session's leader opens becomes its controlling terminal.
        shell = f'name=$1; shift; exec "$@" <$name >$name 2>$name {redirect}'
        command = ["sh", "-c", shell, "sh", name, sys.executable, "-m", module, *arguments]
        usual = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
        usual |= {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", **(env or {})}
        self._process = subprocess.Popen(command, cwd=ROOT, env=usual, start_new_session=True, stdin=theirs)
        os.close(theirs)
        self.screen = b""
        self._seen = 0

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._own)

    def type(self, keys: str) -> None:
        r"""Types keys; a line ends with `\r`, as the return key does."""
        os.write(self._own, keys.encode())

    def wait_for(self, text: str, seconds: float = 120) -> str:
        """Waits until a text is written after the text last waited for; returns what was written up to it, without
        control sequences.
        """
        end = time.monotonic() + seconds
        while True:
            before, found, _ = CONTROL.sub(b"", self.screen)[self._seen :].partition(text.encode())
            if found:
                self._seen += len(before) + len(found)
                return before.decode(errors="replace")
            assert time.monotonic() < end, f"{text!r} did not appear in {self.screen[-2000:]!r}"
            assert self._read(end), f"the command ended before {text!r} in {self.screen[-2000:]!r}"

    def wait(self, seconds: float = 120) -> int:
        """Waits until the command ends and returns its exit code."""
        end = time.monotonic() + seconds
        while self._read(end):
            assert time.monotonic() < end, f"the command does not end: {self.screen[-2000:]!r}"
        return self._process.wait(10)

    def _read(self, end: float) -> bool:
        """Reads what is written until `end`; returns whether the terminal is still open on the other side."""
        if not select.select([self._own], [], [], max(end - time.monotonic(), 0))[0]:
            return True
        try:
            piece = os.read(self._own, 1 << 16)
        except OSError:  # EIO: nobody has the other side open
            return False
        self.screen += piece
        return bool(piece)
