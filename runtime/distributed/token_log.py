"""TokenLog: a file of chosen tokens, from which an interrupted run can continue."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.errors import InputError


class TokenLog:
    """A file whose first line describes the run; each other line has a text's number and one of its tokens.

    Attributes:
        tokens: text number -> the tokens that were in the file when it was opened.
    """

    def __init__(self, path: Path | None, run: Mapping[str, Any]) -> None:
        """Reads the file and opens it for appending; without a path nothing is read or written.

        Args:
            run: everything that determines the tokens, in JSON types.

        Raises:
            InputError: the file is from another run, is no journal, or cannot be written.
        """
        self.tokens = dict[int, list[int]]()
        self._file = None
        if path is None:
            return
        first = json.dumps(run, sort_keys=True).encode() + b"\n"
        try:
            self._file = path.open("a+b")
            self._file.seek(0)
            content = self._file.read()
            whole = content[: content.rfind(b"\n") + 1]  # the rest is an incomplete line
            if not (content.startswith(first) or first.startswith(content)):
                raise InputError(
                    f"--journal {path} belongs to a run with another model, prompts or options; give another file"
                )
            self._file.truncate(len(whole))
            if not whole:
                self._write(first)
        except OSError as error:
            raise InputError(f"--journal {path} cannot be used ({error.strerror}); give another file") from error
        for line in whole.splitlines()[1:]:
            number, token = map(int, line.split())
            self.tokens.setdefault(number, []).append(token)

    def add(self, number: int, token: int) -> None:
        """Appends a text's next token; the operating system has it when this returns."""
        self._write(f"{number} {token}\n".encode())

    def _write(self, line: bytes) -> None:
        if self._file:
            self._file.write(line)
            self._file.flush()
