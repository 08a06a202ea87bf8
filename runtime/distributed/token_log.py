"""TokenLog: the tokens of many texts, kept as they come, so that a run that was cut off can go on from the last one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.errors import InputError


class TokenLog:
    """A file with a line that says what is run, and then, for each token, one with its text's number and the token.

    Attributes:
        tokens: those of each text, by its number.
    """

    def __init__(self, path: Path | None, run: Mapping[str, Any]) -> None:
        """Reads what is there, and goes on behind it; without a path it keeps nothing.

        Args:
            run: what decides which tokens come, in JSON's types.

        Raises:
            InputError: the file is another run's, or none of ours; or it cannot be written.
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
            whole = content[: content.rfind(b"\n") + 1]  # what follows was cut off with its writer
            if not (content.startswith(first) or first.startswith(content)):
                raise InputError(
                    f"--journal {path} is not of this run, with its model, prompts and options; give another"
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
        """Keeps a text's next token; the system has it when this returns."""
        self._write(f"{number} {token}\n".encode())

    def _write(self, line: bytes) -> None:
        if self._file:
            self._file.write(line)
            self._file.flush()
