"""Tests Jinja templates against transformers' rendering. tests/export/test_jinja_reduction.py tests their reduction to
data.
"""

from typing import Any

import pytest

from export.planning.jinja_reduction import reduced
from model.errors import InputError
from preproc.jinja_template import JinjaTemplate, from_file
from tests.export.test_jinja_reduction import applied, jinja_of, ours_of, theirs_of
from tests.preproc.test_tokenizer import byte_level
from tests.support.chat_templates import PUBLIC, Public


@pytest.mark.parametrize("content", ["Sure, ", " It is\n\n", "Yes"])
@pytest.mark.parametrize("name", ["qwen2", "llama3", "gemma 3", "mistral v0.3"])
def test_a_last_message_of_the_assistant_is_continued(name: str, content: str) -> None:
    theirs = theirs_of(PUBLIC[name], byte_level())
    messages = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": content}]
    expected = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert jinja_of(PUBLIC[name]).text(messages) == expected


TOOLS = [{"type": "function", "function": {"name": "f", "description": "Grüße <b>", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("name", ["qwen3", "granite 3", "mistral v0.3"])
def test_tools_and_messages_of_other_roles_are_rendered_as_transformers_renders_them(name: str) -> None:
    public = PUBLIC[name]
    theirs = theirs_of(public, byte_level())
    messages = [
        {"role": "user", "content": "How warm is it?", "name": None},
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nI ask."},
        *([{"role": "tool", "content": "20"}] if name == "qwen3" else [{"role": "user", "content": "And now?"}]),
    ]
    options: dict[str, Any] = {"tools": TOOLS, "add_generation_prompt": True}
    jinja = jinja_of(public)
    assert jinja.text(messages, TOOLS) == theirs.apply_chat_template(messages, tokenize=False, **options)
    ids = theirs.apply_chat_template(messages, return_dict=False, **options)
    assert jinja.encode(messages, ours_of(theirs), TOOLS) == ids


def test_generation_marks_and_loop_controls_work_as_in_transformers() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}{{ m.role }}:"
        "{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}"
    )
    theirs = theirs_of(Public(source), byte_level())
    messages = [("system", "a"), ("user", "b"), ("assistant", "c"), ("user", "d")]
    assert (
        reduced(JinjaTemplate(source)).text(messages)
        == applied(theirs, messages, tokenize=False)
        == "system:a;user:b;assistant:c;user:d;"
    )


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "{}",
        "[]",
        '{"jinja": {"x": ""}}',
        '{"jinja": null, "data": {}}',
        '{"jinja": null, "data": {"opening": "", "system": {"x": 1}}}',
    ],
)
def test_a_damaged_template_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="chat template cannot be read"):
        from_file(text)
