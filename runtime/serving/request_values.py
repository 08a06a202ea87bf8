"""Values: a request's JSON object, whose values are checked when read; and RequestError, for wrong ones."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from model.errors import InputError


class RequestError(Exception):
    """Raised for a request that is answered with an error in OpenAI's form.

    Attributes:
        status: the HTTP status.
        content: the response's JSON.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        kinds = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(status, "invalid_request_error")
        self.status = status
        self.content = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refuse(param: str | None, message: str, code: str | None = None) -> NoReturn:
    """Refuses a request because of a parameter.

    Raises:
        RequestError: always, with status 400.
    """
    raise RequestError(400, message, param, code)


@contextmanager
def blamed_on(param: str) -> Iterator[None]:
    """Turns an InputError of the library into a RequestError that names a parameter."""
    try:
        yield
    except InputError as error:
        refuse(param, str(error))


class Values:
    """The values of a body. A null value counts as missing, as with OpenAI."""

    def __init__(self, raw: bytes) -> None:
        """Reads a body.

        Raises:
            RequestError: the body is no JSON object.
        """
        self._values = {name: value for name, value in _object(raw).items() if value is not None}

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def get(self, name: str, usual: Any = None) -> Any:
        """Returns a value without checking it, or `usual` if it is missing."""
        return self._values.get(name, usual)

    def whole(self, name: str, low: int | None = None, high: int | None = None) -> int | None:
        """Returns a whole number from `low` to `high`, or None if it is missing."""
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            refuse(name, f"{name} {shown(value)} is invalid; give a whole number")
        if (low is not None and value < low) or (high is not None and value > high):
            bounds = f"{low} or more" if high is None else f"{low} to {high}"
            refuse(name, f"{name} {value} is invalid; give {bounds}")
        return value

    def flag(self, name: str, usual: bool = False) -> bool:
        """Returns true or false, or `usual` if it is missing."""
        value = self.get(name, usual)
        if not isinstance(value, bool):
            refuse(name, f"{name} {shown(value)} is invalid; give true or false")
        return value

    def entries(self, name: str) -> Mapping[str, Any]:
        """Returns the entries of an object, which is empty if it is missing."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            refuse(name, f"{name} {shown(value)} is invalid; give an object")
        return value


def number(name: str, value: Any) -> float:
    """Checks that the value of parameter `name` is a number, and returns it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        refuse(name, f"{name} {shown(value)} is invalid; give a number")
    try:
        return float(value)
    except OverflowError:
        refuse(name, f"{name} {shown(value)} is too large; give a smaller number")


def shown(value: Any) -> str:
    """Returns a value as JSON for a message, shortened if it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _object(raw: bytes) -> dict[str, Any]:
    """Parses a body as a JSON object."""
    try:
        values = json.loads(raw, parse_constant=no_number)
        json.dumps(values, ensure_ascii=False).encode()  # fails for half of a surrogate pair
    except (ValueError, RecursionError) as error:
        refuse(None, f"the body is not JSON ({error}); send an object with Content-Type: application/json")
    if not isinstance(values, dict):
        refuse(None, f"the body {shown(values)} is invalid; send an object")
    return values


def no_number(text: str) -> NoReturn:
    """Refuses NaN and the infinities, which Python's json reads although JSON has none.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{text} is not a number")
