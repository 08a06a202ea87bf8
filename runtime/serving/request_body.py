"""RequestError, for requests that cannot be answered; and Body, the JSON object of a request, checked with pydantic."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from model.errors import InputError

_EXPECTED = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a text",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "literal_error": "{expected}",
    "greater_than_equal": "{ge} or more",
    "less_than_equal": "{le} or less",
    "string_too_short": "at least one character",
    "too_short": "a list of at least {min_length}",
    "too_long": "at most {max_length} entries",
}
"""Kind of pydantic's error -> the value that was expected."""


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


class Part(BaseModel):
    """An object within a request."""

    model_config = ConfigDict(strict=True, frozen=True)


class Body(Part):
    """The parameters of a request.

    The fields of a subclass are the parameters that have an effect. Their descriptions, if any, say which values they
    take. Null counts as missing, as with OpenAI.

    Attributes:
        ALIASES: other names of parameters -> the field's name.
        UNSUPPORTED: parameter that would change the answer but is not supported -> the values that have no effect and
            are accepted.
    """

    model_config = ConfigDict(extra="allow")
    ALIASES: ClassVar[Mapping[str, str]] = {}
    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @classmethod
    def prepared(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Returns the values to check, without those that have no effect."""
        return {name: value for name, value in values.items() if value is not None}

    @property
    def warnings(self) -> list[str]:
        """A sentence for each parameter that was ignored."""
        return [f"{name} is not a parameter of this server and was ignored" for name in self.model_extra or ()]


AnyBody = TypeVar("AnyBody", bound=Body)


def read_body(raw: bytes, kind: type[AnyBody]) -> AnyBody:
    """Reads a request's body.

    Raises:
        RequestError: it is no JSON object, or a parameter has an invalid value or is unsupported.
    """
    return read_values(_object(raw), kind)


def read_values(values: dict[str, Any], kind: type[AnyBody]) -> AnyBody:
    """Reads a body from its values.

    Raises:
        RequestError: as in `read_body`.
    """
    given, names = kind.prepared(values), dict[str, str]()
    for param, harmless in kind.UNSUPPORTED.items():
        if param in given and (value := given.pop(param)) not in harmless:
            fix = f"give {shown(harmless[0])}" if harmless else "leave it out"
            refuse(param, f"{param} {shown(value)} is unsupported; {fix}", "unsupported_value")
    for alias in [name for name in kind.ALIASES if name in given]:
        name, value = kind.ALIASES[alias], given.pop(alias)
        if given.setdefault(name, value) != value:
            refuse(alias, f"{alias} {shown(value)} and {names.get(name, name)} {shown(given[name])} differ; give one")
        names[name] = alias
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        _blame(error, kind, given, names)


def shown(value: Any) -> str:
    """Returns a value as JSON for a message, shortened if it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def no_number(text: str) -> NoReturn:
    """Refuses NaN and the infinities, which Python's json reads although JSON has none.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{text} is not a number")


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


def _blame(error: ValidationError, kind: type[Body], given: Mapping[str, Any], names: Mapping[str, str]) -> NoReturn:
    """Refuses a body for the first of its innermost invalid values; `names` are the names given for fields.

    Raises:
        RequestError: always.
    """
    worst = max(error.errors(include_url=False), key=lambda each: len(each["loc"]))
    field = str(worst["loc"][0])
    expected, value = kind.model_fields[field].description, given.get(field)
    param = path = names.get(field, field)
    if expected is None:
        expected = _EXPECTED.get(worst["type"], worst["msg"]).format(**worst.get("ctx", {}))
        for key in worst["loc"][1:]:  # whose other keys name the types of a union
            if isinstance(value, list) and isinstance(key, int):
                value, path = value[key], f"{path}[{key}]"
            elif isinstance(value, dict) and key in value:
                value, path = value[key], f"{path}.{key}"
        if worst["type"] == "missing":
            place = f"{path} {shown(value)}" if len(worst["loc"]) > 1 else "the request"
            refuse(param, f"{place} has no {worst['loc'][-1]}; add it")
    refuse(param, f"{path} {shown(value)} is invalid; give {expected}")
