"""The table of parameters in docs/server.md, which is what the endpoints do."""

import re
from pathlib import Path

import pytest

from runtime.serving.openai_bodies import ChatBody, CompletionBody
from runtime.serving.request_body import Body, RequestError, read_values
from runtime.serving.responses import ResponsesBody

DOCUMENT = (Path(__file__).parents[2] / "docs" / "server.md").read_text()
REQUIRED: dict[type[Body], dict[str, object]] = {
    CompletionBody: {"prompt": "x"},
    ChatBody: {"messages": [{"role": "user", "content": "x"}]},
    ResponsesBody: {"input": "x"},
}


def table() -> dict[str, list[str]]:
    """What the document says: parameter -> how completions and chats treat it."""
    (rows,) = re.findall(r"<!-- parameters -->\n\|.*\n\|-.*\n((?:\|.*\n)+)", DOCUMENT)
    found = dict[str, list[str]]()
    for row in rows.splitlines():
        names, _, completions, chats, _ = (cell.strip() for cell in row.strip("|").split("|"))
        for name in re.findall(r"`(\w+)`", names):
            assert name not in found, f"{name} is there twice"
            found[name] = [completions, chats]
    return found


def treatment(kind: type[Body], name: str) -> str:
    """What becomes of a parameter whose value no endpoint takes."""
    try:
        body = read_values(REQUIRED[kind] | {name: [{"odd": 1}]}, kind)
    except RequestError as error:
        told = error.content["error"]
        kinds = {"unsupported_value": "refused", None: "taken"}
        return kinds[told["code"]] if told["param"] == name else f"an error of {told['param']}"
    assert [sentence.split()[0] for sentence in body.warnings] == [name]
    return "ignored"


def test_the_table_of_parameters_is_what_the_endpoints_do() -> None:
    expected = {name: [treatment(kind, name) for kind in (CompletionBody, ChatBody)] for name in table()}
    assert table() == expected


@pytest.mark.parametrize("kind", [CompletionBody, ChatBody])
def test_every_parameter_is_in_the_table(kind: type[Body]) -> None:
    assert table().keys() >= {*kind.model_fields, *kind.ALIASES, *kind.UNSUPPORTED}


def test_the_parameters_of_responses_are_those_that_the_document_names() -> None:
    text = " ".join(DOCUMENT.split())
    own, refused = re.findall(r"in whose place are (.+?)\..+?Refused: (.+?)\.", text)[0]
    assert set(re.findall(r"`(\w+)`", own)) == ResponsesBody.model_fields.keys()
    assert set(re.findall(r"`(\w+)`", refused)) == ResponsesBody.UNSUPPORTED.keys()


@pytest.mark.parametrize("kind", [CompletionBody, ChatBody, ResponsesBody])
def test_values_that_ask_for_nothing_are_accepted_without_a_warning(kind: type[Body]) -> None:
    for name, harmless in kind.UNSUPPORTED.items():
        for value in (None, *harmless):
            assert read_values(REQUIRED[kind] | {name: value}, kind).warnings == [], name
