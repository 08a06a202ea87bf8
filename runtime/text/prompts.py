"""Reads prompts and turns them into ids."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.errors import InputError
from runtime.engine.program import Program


def prompt_ids(program: Program, text: str, parse_special: bool = False) -> list[int]:
    """Returns the ids of a prompt, with BOS first if the model has one; see `Tokenizer.encode` for parse_special.

    Raises:
        InputError: the file carries no tokenizer.
    """
    if program.tokenizer is None:
        raise InputError("the file has no tokenizer; give --prompt-ids, or export again with --tokenizer")
    bos_id = program.metadata.bos_id
    text = text.encode("utf-8", "replace").decode()  # JSON may contain half of a surrogate pair
    return ([] if bos_id is None else [bos_id]) + program.tokenizer.encode(text, parse_special)


def read_text(path: Path) -> str:
    """Reads a text from a file, or from standard input for `-`, without a byte order mark.

    Invalid UTF-8 becomes U+FFFD.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a text file") from error
    return content.decode("utf-8-sig", "replace")


def read_prompts(path: Path, program: Program) -> list[Sequence[int] | InputError]:
    """Returns the ids of each prompt in a file, or the error of a prompt that cannot be used.

    Raises:
        InputError: the file cannot be read, or has no prompts.
    """
    text = read_text(path)
    lines = {number: line.removesuffix("\r") for number, line in enumerate(text.split("\n"), 1) if line.strip()}
    if not lines:
        raise InputError(f"{path} has no prompts; give one per line")
    first = next(iter(lines.values()))
    if path.suffix == ".jsonl" or isinstance(_object(first), dict):
        return [_ids(number, _object(line), program) for number, line in lines.items()]
    return [_ids(number, {"prompt": line}, program) for number, line in lines.items()]


def _object(line: str) -> Any:
    """Returns the value of a line of JSON, or an error if it is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return InputError(f"is not JSON ({error})")


def _ids(number: int, prompt: Any, program: Program) -> Sequence[int] | InputError:
    if isinstance(prompt, InputError):
        return InputError(f"line {number} {prompt}; give one object per line")
    text, ids = (prompt.get(key) if isinstance(prompt, dict) else None for key in ("prompt", "prompt_ids"))
    if isinstance(ids, list) and all(type(token) is int for token in ids):
        return ids
    if not isinstance(text, str):
        return InputError(
            f'line {number}, {json.dumps(prompt)}, is not a prompt; give an object with "prompt" or "prompt_ids"'
        )
    try:
        return prompt_ids(program, text)
    except InputError as error:
        return error
