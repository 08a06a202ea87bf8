"""Tests the reduction of public chat templates to data, against transformers' rendering and ids."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from export.checkpoints.layouts import BUILT_IN
from export.planning.jinja_reduction import reduced
from export.planning.plan import ExportOptions, plan
from model.config import ModelConfig
from model.errors import InputError
from preproc.chat_template import NAMED, named
from preproc.jinja_template import JinjaTemplate, from_file, to_file
from preproc.special_tokens import Part
from preproc.tokenizer import HuggingFaceTokenizer, decode, open_tokenizer
from tests.conftest import TOY, random_model
from tests.export.test_checkpoints import CONFIG
from tests.preproc.test_tokenizer import byte_fallback, byte_level
from tests.support.chat_templates import ONLY_JINJA, PUBLIC, Public
from tests.support.checkpoints import hugging_face_state, save_safetensors, write_gguf

TINY = open_tokenizer(BUILT_IN / "tokenizer.model")


def metaspace() -> tokenizers.Tokenizer:
    """Returns a tokenizer like Mistral's tokenizer.json, with a space before the start of a text but not behind a
    special token.
    """
    model = byte_fallback()
    model.normalizer = None
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return model


MODELS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte level": byte_level,
    "byte fallback": byte_fallback,
    "metaspace": metaspace,
}


def theirs_of(public: Public, model: tokenizers.Tokenizer) -> PreTrainedTokenizerFast:
    """Returns transformers' tokenizer with a chat template and its special tokens."""
    specials = [
        AddedToken(text, special=True, normalized=False, rstrip=public.strips_right) for text in public.specials
    ]
    model.add_special_tokens(specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token=AddedToken(public.bos_token, special=True, normalized=False),
        eos_token=AddedToken(public.eos_token, special=True, normalized=False, rstrip=public.strips_right),
        chat_template=public.source,
    )


def ours_of(theirs: PreTrainedTokenizerFast) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(theirs.backend_tokenizer.to_str().encode())


def applied(theirs: PreTrainedTokenizerFast, messages: Any, **options: Any) -> Any:
    given_messages = [{"role": role, "content": content} for role, content in messages]
    return theirs.apply_chat_template(given_messages, add_generation_prompt=True, return_dict=False, **options)


CONTENTS = st.one_of(
    st.sampled_from(
        ["", " ", "\n", "Hi", "  two\n\nlines \n", "Grüße, 日本語 \N{SLIGHTLY SMILING FACE}", "\xa0x\x1c", "[INST]"]
    ),
    st.text(alphabet="aé日 \n\t.<|>{}"),
    st.text(),
)


@st.composite
def conversations(draw: st.DrawFn, with_system: bool) -> list[tuple[str, str]]:
    """Draws 1 to 4 turns."""
    contents = draw(st.lists(CONTENTS, min_size=1, max_size=7).filter(lambda contents: len(contents) % 2 == 1))
    messages = [("assistant" if i % 2 else "user", content) for i, content in enumerate(contents)]
    return [("system", draw(CONTENTS)), *messages] if with_system and draw(st.booleans()) else messages


def jinja_of(public: Public) -> JinjaTemplate:
    return JinjaTemplate(public.source, public.bos_token, public.eos_token)


class _NoTime(datetime):
    """A datetime class for transformers that always returns the epoch."""

    @classmethod
    def now(cls, tz: Any = None) -> "_NoTime":
        return cls(2026, 2, 3, 12, 30)


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> datetime:
    """Stops the clock for transformers and for this project."""
    monkeypatch.setattr(chat_template_utils, "datetime", _NoTime)
    return _NoTime.now()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", PUBLIC | ONLY_JINJA)
def test_ids_are_those_of_apply_chat_template(name: str, kind: str, stopped: datetime) -> None:
    public = (PUBLIC | ONLY_JINJA)[name]
    theirs = theirs_of(public, MODELS[kind]())
    ours = ours_of(theirs)
    jinja = replace(jinja_of(public), clock=lambda: stopped)
    data = reduced(jinja) if name in PUBLIC else None
    takes_system = "not supported" not in public.source and name != "mistral v0.1"
    specials = tuple(ours.specials)

    @settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(conversations(with_system=takes_system))
    def check(messages: list[tuple[str, str]]) -> None:
        expected = applied(theirs, messages, tokenize=False)
        assert jinja.text(messages) == expected
        assert data is None or data.text(messages, stopped) == expected
        if not any(special in content for _, content in messages for special in specials):
            ids = applied(theirs, messages, tokenize=True)
            assert jinja.encode(messages, ours) == ids
            assert data is None or ours.encode_parts(data.parts(messages, stopped)) == ids

    check()
    end_id = theirs.convert_tokens_to_ids(public.end)
    starts = theirs.bos_token_id if public.bos_token != public.end else None  # Granite's is both and starts no text
    assert jinja.stop_ids(ours, starts, ()) == (end_id,)
    assert from_file(json.dumps(to_file(jinja, data))) == jinja
    if data:
        assert (data.system is not None) == takes_system
        assert data.end_id(ours, starts) == end_id
        assert from_file(json.dumps(to_file(None, data))) == data


@pytest.mark.parametrize("kind", MODELS)
@given(text=CONTENTS, strips=st.tuples(st.booleans(), st.booleans()))
def test_parts_that_may_hold_special_tokens_give_the_ids_of_the_whole_text(
    kind: str, text: str, strips: tuple[bool, bool]
) -> None:
    model = BASES[kind]
    model.add_special_tokens([AddedToken("<|x|>", normalized=False, lstrip=strips[0], rstrip=strips[1])])
    model.encode_special_tokens = False
    text = text.replace("|", "<|x|>").replace(".", "<s>")
    ours = HuggingFaceTokenizer(model.to_str().encode())
    middle = len(text) // 2
    cut_inside = "<|x|>" in text[max(middle - 4, 0) : middle + 4] or "<s>" in text[max(middle - 2, 0) : middle + 2]
    for parts in ([Part(text, True)], [Part(text, True), Part("", True)]):
        assert ours.encode_parts(parts) == model.encode(text, add_special_tokens=False).ids
    if not cut_inside:
        halves = [Part(text[:middle], True), Part(text[middle:], True)]
        assert ours.encode_parts(halves) == model.encode(text, add_special_tokens=False).ids
    assert ours.encode_parts([Part(text, False)]) == ours.encode(text)


BASES = {kind: make() for kind, make in MODELS.items()}


@pytest.mark.parametrize("is_jinja", [False, True])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", PUBLIC)
def test_the_text_of_a_special_token_in_a_message_stays_text(name: str, kind: str, is_jinja: bool) -> None:
    public = PUBLIC[name]
    ours = ours_of(theirs_of(public, MODELS[kind]()))
    template = jinja_of(public) if is_jinja else reduced(jinja_of(public))
    inside = "a" + "".join(ours.specials) + "b"
    messages = [("user", inside), ("assistant", inside), ("user", inside)]
    without = [(role, "ab") for role, _ in messages]
    controls = set(ours.specials.values())
    ids = template.encode(messages, ours)
    expected = [token for token in template.encode(without, ours) if token in controls]
    assert [token for token in ids if token in controls] == expected
    text = "".join(ours.piece(token, first=False).decode() for token in ids)
    assert text.count("".join(ours.specials)) == 3


def test_special_text_stays_text_in_sentencepiece_and_tiktoken(shared: Path) -> None:
    llama3 = open_tokenizer(shared / "tokenizers" / "llama3_tokenizer.model")
    for name, tokenizer, end in (("llama2", TINY, "</s>"), ("llama3", llama3, "<|eot_id|>")):
        template = named(name, tokenizer)
        plain, sly = (template.encode([("user", text)], tokenizer) for text in ("x", f"x{end}"))
        controls = set(tokenizer.specials.values())
        assert [token for token in sly if token in controls] == [token for token in plain if token in controls]
        assert end in decode(tokenizer, sly)
        assert plain.count(plain[0]) == 1, "BOS is not doubled"
        assert plain[0] == tokenizer.bos_id


def test_llama_3s_ids_are_metas(shared: Path) -> None:
    """Follows ChatFormat in llama/tokenizer.py of meta-llama/llama3: header, stripped text, end token."""
    tokenizer = open_tokenizer(shared / "tokenizers" / "llama3_tokenizer.model")
    messages = [("system", "Be brief."), ("user", " Hi!\n"), ("assistant", "\nYes? "), ("user", "Bye")]

    def header(role: str) -> list[int]:
        return [128006, *tokenizer.encode(role), 128007, *tokenizer.encode("\n\n")]

    expected = [128000]
    for role, content in messages:
        expected += [*header(role), *tokenizer.encode(content.strip()), 128009]
    assert named("llama3", tokenizer).encode(messages, tokenizer) == expected + header("assistant")


def test_named_templates_are_the_public_ones() -> None:
    chatml = PUBLIC["qwen2"].source.replace("loop.first and", "false and")
    for name, source in (("llama2", None), ("llama3", None), ("gemma", None), ("chatml", chatml)):
        public = PUBLIC.get(name, PUBLIC["qwen2"])
        assert NAMED[name] == reduced(JinjaTemplate(source or public.source, public.bos_token, public.eos_token)), name
    old, new = "%}{{ message['content'] + eos_token + ' '", "%}{{ ' ' + message['content'] + eos_token + ''"
    mistral = PUBLIC["mistral v0.1"].source.replace(old, new)
    assert replace(NAMED["mistral"], system=None) == reduced(JinjaTemplate(mistral, "<s>", "</s>"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}", "line 1 of the chat template is not valid Jinja"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "leaves out or moves a user message"),
        ("{% for t in tools %}{{ t }}{% endfor %}", "cannot be rendered"),
        ("{{ raise_exception('no') }}", "refuses the roles user"),
        (
            "{{ messages | length }}{% for m in messages %}[{{ m.content }}]{% endfor %}",
            "the first turn changes if more follow",
        ),
        ("{% for m in messages %}[{{ m.content.lstrip() }}]{% endfor %}", "white space in a user message"),
        (
            "{% for m in messages %}[{{ m.content | replace('\\n\\n', '\\n') }}]{% endfor %}",
            "cannot be reduced to data: for the messages",
        ),
        ("{% for m in messages %}[{{ m.content.split('</think>')[-1] }}]{% endfor %}", "Because"),
        ("{{ strftime_now('%d')|int + 1 }}{% for m in messages %}[{{ m.content }}]{% endfor %}", "cannot be reduced"),
        ("{% for m in messages[-3:] %}{{ m.role }}[{{ m.content }}]{% endfor %}", "reduced to data: for the messages"),
    ],
)
def test_irreducible_templates_are_refused_in_one_sentence(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        reduced(JinjaTemplate(source, "<s>", "</s>"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "the roles of the messages are none"),
        (
            [("user", "a"), ("assistant", "b")],
            "the roles of the messages are user, assistant; give user and assistant in turns",
        ),
        ([("assistant", "b")], "are assistant"),
        ([("user", "a"), ("user", "b"), ("user", "c")], "are user, user, user"),
        ([("user", "a"), ("system", "b"), ("user", "c")], "are user, system, user"),
        ([("system", "a"), ("user", "b")], "supports no system message"),
    ],
)
def test_messages_out_of_turn_are_refused(messages: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        NAMED["gemma"].text(messages)


def test_a_token_matched_in_any_text_is_refused_in_a_message() -> None:
    public = replace(PUBLIC["qwen2"], specials=())
    theirs = theirs_of(public, byte_level())
    theirs.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<|im_start|>", "  ")])
    ours = ours_of(theirs)
    for template in (jinja_of(public), reduced(jinja_of(public))):
        assert template.encode([("user", "a  b")], ours)
        message = r"a message holds <\|im_start\|>, which separates messages; leave it out"
        with pytest.raises(InputError, match=message):
            template.encode([("user", "a<|im_start|>b")], ours)


def checkpoint(folder: Path, **settings: Any) -> Path:
    """A Hugging Face folder with the built-in tokenizer."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_safetensors(hugging_face_state(random_model(TOY)), folder / "model.safetensors")
    shutil.copy(BUILT_IN / "tokenizer.model", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


LISTED = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": PUBLIC["llama2"].source}]


@pytest.mark.parametrize(
    ("settings", "jinja", "option", "expected"),
    [
        ({}, None, None, None),
        ({"chat_template": PUBLIC["llama2"].source}, None, None, "llama2"),
        ({"chat_template": LISTED, "bos_token": {"content": "<s>"}, "eos_token": "</s>"}, None, None, "llama2"),
        ({"chat_template": "{{ broken"}, PUBLIC["llama2"].source, None, "llama2"),
        ({"chat_template": "{{ broken"}, None, "none", None),
        ({"chat_template": "{{ broken"}, None, "mistral", "mistral"),
        ({"chat_template": "{{ broken"}, None, "given.jinja", "llama2"),
    ],
)
def test_the_checkpoints_template_is_found_and_an_option_wins(
    settings: dict[str, Any], jinja: str | None, option: str | None, expected: str | None, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path, **settings)
    if jinja:
        (folder / "chat_template.jinja").write_text(jinja)
    if option and option.endswith(".jinja"):
        option = str(tmp_path / option)
        Path(option).write_text(PUBLIC["llama2"].source)
    planned = plan(ExportOptions(checkpoint=folder, chat_template=option, output=tmp_path / "x.pte"))
    found = planned.provenance["chat_template"]
    assert (found and found["data"]) == (NAMED[expected].to_json() if expected else None)
    assert not planned.warnings


LAST_THREE = "{% for m in messages[-3:] %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("llama4", "llama4 is neither a file nor a known name; give --chat-template llama2"),
        ("chatml", r"needs <\|im_end\|>, <\|im_start\|>, which the tokenizer lacks; give another"),
        ("broken.jinja", "--chat-template .*broken.jinja: line 1 of the chat template is not valid Jinja"),
    ],
)
def test_an_unavailable_template_given_as_option_fails_the_export(option: str, message: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, chat_template=LAST_THREE)
    if option.endswith(".jinja"):
        option = str(tmp_path / option)
        Path(option).write_text("{% for m in messages %}")
    with pytest.raises(InputError, match=message):
        plan(ExportOptions(checkpoint=folder, chat_template=option, output=tmp_path / "x.pte"))


@pytest.mark.parametrize(
    ("source", "carries", "warning"),
    [
        (
            LAST_THREE,
            True,
            "only the Python runtime can render the chat template; llama_runner cannot: it cannot be reduced",
        ),
        ("{% for m in messages %}", False, "have no chat template, because line 1 .*; give --chat-template llama2, "),
        ("{{ nothing.there.is }}", False, "have no chat template, because the chat template cannot be rendered"),
    ],
)
def test_a_checkpoints_own_template_never_fails_the_export(
    source: str, carries: bool, warning: str, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path, chat_template=source)
    planned = plan(ExportOptions(checkpoint=folder, output=tmp_path / "x.pte"))
    found = planned.provenance["chat_template"]
    assert found == (
        {"jinja": {"source": source, "bos_token": "<s>", "eos_token": "</s>"}, "data": None} if carries else None
    )
    assert len(planned.warnings) == 1
    assert re.search(warning, planned.warnings[0])


def test_a_ggufs_template_is_found_and_its_end_token_ends_a_text(tmp_path: Path) -> None:
    public = PUBLIC["qwen2"]
    model = byte_level()
    model.add_special_tokens([*public.specials])
    content = json.loads(model.to_str())
    tokens = sorted(
        content["model"]["vocab"] | {t["content"]: t["id"] for t in content["added_tokens"]}, key=model.token_to_id
    )

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token.startswith("<|") and token.endswith("|>") else 1 for token in tokens])
        writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
        writer.add_chat_template(public.source)

    config = ModelConfig(8, 1, 1, 1, 8, 8, len(tokens), 48, tied=True)
    path = write_gguf(random_model(config), tmp_path / "model.gguf", "F32", add_tokenizer=add)
    planned = plan(ExportOptions(checkpoint=path, output=tmp_path / "x.pte"))
    assert planned.provenance["chat_template"]["data"]["again"] == "<|im_end|>\n<|im_start|>user\n"
    assert planned.provenance["stop_ids"] == [2, model.token_to_id("<|im_end|>")]
