"""The chat page, in a browser."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Error, Locator, Page, expect

from export.planning.plan import ExportOptions
from runtime import serve
from tests.conftest import MODELS, SMOLLM2, exported
from tests.support.browser import needs_chromium, opened
from tests.support.serving import Script, Server, serving

pytestmark = needs_chromium

CODE = "for word in words:\n\tprint(word)\n"
RICH = f"""# Words

Some *are* **short**, and `others` [are not](https://example.com/).

```python
{CODE}```

| word | length |
|------|-------:|
| fig  | 3      |

> They are [x] words.

1. one
   - [x] and a half
"""


@pytest.fixture(scope="module")
def server(tiny_pte: Path) -> Iterator[Server]:
    with serving(serve.open_model(tiny_pte, "llama2")) as server:
        yield server


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    return Script(monkeypatch)


@pytest.fixture
def page(browser: Browser, server: Server, script: Script) -> Iterator[Page]:
    with opened(browser, server.url) as page:
        yield page
    server.wait_for(active=0)


def message(page: Page) -> Locator:
    return page.get_by_label("Message", exact=True)


def press(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def ask(page: Page, text: str) -> None:
    message(page).fill(text)
    message(page).press("Enter")


def finish(page: Page) -> None:
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()


def sent(page: Page, action: Callable[[], None]) -> dict[str, Any]:
    """Returns the body of the request for an answer that an action sends."""
    with page.expect_request("**/v1/chat/completions") as request:
        action()
    return dict(request.value.post_data_json)


def turns(page: Page) -> list[str]:
    return page.locator(".message .body").all_inner_texts()


def test_an_answer_is_streamed_and_is_that_of_the_endpoint(
    browser: Browser, tiny_pte: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = serve.open_model(tiny_pte, "llama2")
    step, slow = model.program.step, threading.Event()

    def slowly(*arguments: Any) -> Any:
        slow.wait(0.02)
        return step(*arguments)

    monkeypatch.setattr(model.program, "step", slowly)
    with serving(model, key="secret") as server, opened(browser, server.url, expected="401") as page:
        expect(page.locator("#notice")).to_contain_text("the API key is missing or wrong")
        press(page, "Settings")
        page.get_by_label("API key").fill("secret")
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Longest answer").fill("60")
        press(page, "Done")
        expect(page.get_by_role("heading", level=1)).to_have_text("tiny")
        expect(page.locator("#notice")).to_be_hidden()
        ask(page, "Tell me of a dog.")
        expect(page.locator(".assistant .body")).to_have_text(re.compile(r"\w+"))
        part = page.locator(".assistant .body").inner_text()
        expect(page.get_by_role("button", name="Stop")).to_be_visible()
        finish(page)
        messages: Any = [{"role": "user", "content": "Tell me of a dog."}]
        answer = server.client("secret").chat.completions.create(
            model="tiny", messages=messages, temperature=0, max_tokens=60
        )
        said = answer.choices[0].message.content or ""
        (whole,) = [each["content"] for each in conversations(page)[0]["messages"] if each["role"] == "assistant"]
        assert whole == said
        assert len(part) < len(page.locator(".assistant .body").inner_text())
        assert answer.usage
        expect(page.locator(".numbers")).to_contain_text(f"{answer.usage.completion_tokens} tokens · ")
        expect(page.locator(".numbers")).to_contain_text(re.compile(r"tokens/s · prompt \d+ tokens"))
        total = answer.usage.total_tokens
        expect(page.locator("#used")).to_have_text(f"{total} of 512 tokens of context")
        assert page.locator("#context").evaluate("meter => [meter.value, meter.max]") == [total, 512]


def conversations(page: Page) -> list[dict[str, Any]]:
    kept: dict[str, str] = page.evaluate("({ ...localStorage })")
    return [json.loads(value) for key, value in kept.items() if key.startswith("llama-pte.conversation.")]


def test_only_the_pages_own_files_can_run(browser: Browser, server: Server) -> None:
    policy = httpx.get(server.url).headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "script-src 'self'; style-src 'self'" in policy
    assert httpx.get(f"{server.url}/static/page.js").headers["content-type"].startswith("text/javascript")
    for name in ("../page.py", "%2e%2e/page.py", "index.html", ""):
        assert httpx.get(f"{server.url}/static/{name}").status_code == 404
    with opened(browser, server.url, expected="This document requires 'Trusted") as page:
        for code in ("document.body.innerHTML = '<b>'", "document.createElement('script').text = '1'"):
            with pytest.raises(Error, match=r"TrustedHTML|TrustedScript"):
                page.evaluate(f"() => {{ {code}; }}")


def test_html_and_scripts_in_an_answer_are_text(page: Page, script: Script) -> None:
    hostile = (
        "<img src=x onerror=alert(1)> <script>alert(1)</script> [x](javascript:alert) ![y](https://example.com/z.png)"
    )
    script.texts = [hostile]
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    ask(page, hostile)
    finish(page)
    assert page.locator("#talk :is(img, script, iframe, style)").count() == 0
    assert page.locator("#talk a").evaluate_all("all => all.map(a => a.href)") == ["https://example.com/z.png"]
    assert turns(page)[0] == hostile
    assert "<script>alert(1)</script> [x](javascript:alert)" in turns(page)[1]


def test_markdown_is_shown_and_code_is_copied(browser: Browser, server: Server, script: Script) -> None:
    script.texts = [RICH]
    with opened(browser, server.url, permissions=["clipboard-read", "clipboard-write"]) as page:
        ask(page, "**Words?**")
        finish(page)
        assert turns(page)[0] == "**Words?**"
        answer = page.locator(".assistant .body")
        expect(answer.get_by_role("heading", level=3)).to_have_text("Words")
        expect(answer.locator("strong")).to_have_text("short")
        expect(answer.get_by_role("link")).to_have_attribute("rel", "noopener noreferrer")
        expect(answer.get_by_role("cell")).to_have_text(["fig", "3"])
        expect(answer.get_by_role("checkbox")).to_be_checked()
        expect(answer.locator("figcaption span")).to_have_text("python")
        for name, copied in (("Copy code", CODE.rstrip("\n")), ("Copy answer", RICH), ("Copy message", "**Words?**")):
            press(page, name)
            expect(page.locator("#announcer p").last).to_have_text("Copied")
            assert page.evaluate("navigator.clipboard.readText()") == copied
            page.evaluate("document.getElementById('announcer').replaceChildren()")


def test_copying_works_on_pages_from_other_machines_without_tls(page: Page, script: Script) -> None:
    script.texts = ["one"]
    ask(page, "A")
    finish(page)
    page.evaluate(
        "() => { Object.defineProperty(navigator, 'clipboard', { value: undefined });"
        " document.addEventListener('copy', () => { window.copied = getSelection().toString(); }); }"
    )
    press(page, "Copy answer")
    expect(page.get_by_role("button", name="Copy answer")).to_be_focused()
    assert page.evaluate("window.copied") == "one"


def test_blocks_that_are_complete_keep_their_nodes_and_are_told_to_screen_readers(page: Page, script: Script) -> None:
    script.texts = ["First\n\nsecond third fourth."]
    script.go.clear()
    ask(page, "Go")
    expect(page.locator(".assistant p")).to_have_count(3)  # two of the answer and an empty one for errors
    page.evaluate("window.first = document.querySelector('.assistant .body p')")
    expect(page.locator("#announcer")).to_have_text("First")
    script.go.set()
    finish(page)
    expect(page.locator("#announcer p")).to_have_text(["First", "second third fourth."])
    assert page.evaluate("window.first.isConnected")
    assert page.locator("#announcer").get_attribute("aria-live") == "polite"


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_a_stopped_answer_keeps_what_was_said(page: Page, script: Script, server: Server, how: str) -> None:
    script.texts = ["one two three four five", "again"]
    script.go.clear()
    ask(page, "Count")
    expect(page.locator(".assistant .body")).to_have_text("one two three")
    if how == "Escape":
        page.keyboard.press("Escape")
    else:
        press(page, "Stop")
    finish(page)
    server.wait_for(active=0)
    expect(page.locator("#announcer")).to_contain_text("Stopped")
    expect(page.locator(".numbers")).to_contain_text("tokens")
    script.go.set()
    body = sent(page, lambda: ask(page, "More"))
    assert [each["content"].strip() for each in body["messages"]] == ["Count", "one two three", "More"]
    finish(page)


def ask_twice(page: Page, script: Script) -> None:
    """Asks A and B, which are answered by one and two. A third answer would be three."""
    script.texts = ["one", "two", "three"]
    for question in ("A", "B"):
        ask(page, question)
        finish(page)


def test_an_answer_is_regenerated_in_its_place(page: Page, script: Script) -> None:
    ask_twice(page, script)
    expect(page.get_by_role("button", name="Regenerate answer")).to_have_count(1)  # of the last answer alone
    body = sent(page, lambda: press(page, "Regenerate answer"))
    assert [each["content"] for each in body["messages"]] == ["A", "one", "B"]
    finish(page)
    assert turns(page) == ["A", "one", "B", "three"]


def test_an_edited_message_is_sent_again_without_what_followed(page: Page, script: Script) -> None:
    ask_twice(page, script)
    edit = page.get_by_role("button", name="Edit message").first
    edit.click()
    field = page.get_by_label("Edited message", exact=True)
    expect(field).to_be_focused()
    field.fill("changed")
    field.press("Escape")
    expect(edit).to_be_focused()
    assert turns(page) == ["A", "one", "B", "two"]
    edit.click()
    field.fill("C")
    field.press("Shift+Enter")
    field.press_sequentially("D")
    body = sent(page, lambda: field.press("Enter"))
    assert body["messages"] == [{"role": "user", "content": "C\nD"}]
    finish(page)
    assert turns(page) == ["C\nD", "three"]
    assert [each["content"] for each in conversations(page)[0]["messages"]] == ["C\nD", "three"]


def test_an_answer_that_failed_may_be_asked_for_again(
    browser: Browser, server: Server, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(browser, server.url, expected="500") as page:
        with monkeypatch.context() as broken:
            broken.setattr(server.model.program, "step", lambda *arguments: 1 / 0)
            ask(page, "A fresh question")
            expect(page.locator(".message .error")).to_have_text(["", "the server failed; see its log"])
        script.texts = ["one", "two"]
        body = sent(page, lambda: ask(page, "B"))
        assert [each["content"] for each in body["messages"]] == ["B"]
        finish(page)
        press(page, "Regenerate answer")
        finish(page)
        assert turns(page)[2:] == ["B", "two"]


def test_conversations_are_kept_listed_renamed_and_deleted(page: Page, script: Script) -> None:
    script.texts = ["one", "two", "three"]
    names = page.locator("#list .open")
    ask(page, "First question\nwith details")
    finish(page)
    press(page, "New chat")
    expect(message(page)).to_be_focused()
    assert turns(page) == []
    ask(page, "Second question")
    finish(page)
    expect(names).to_have_text(["Second question", "First question"])
    page.reload()
    assert turns(page) == ["Second question", "two"]
    press(page, "First question")
    expect(page.locator("#list [aria-current=true]")).to_have_text("First question")
    assert turns(page) == ["First question\nwith details", "one"]
    page.go_back()
    expect(page.locator(".user .body")).to_have_text("Second question")
    press(page, "Rename Second question")
    page.get_by_label("New name").fill("Renamed")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Renamed", exact=True)).to_be_focused()
    page.reload()
    expect(names).to_have_text(["Renamed", "First question"])
    page.once("dialog", lambda dialog: dialog.dismiss())
    press(page, "Delete Renamed")
    expect(names).to_have_count(2)
    page.once("dialog", lambda dialog: dialog.accept())
    press(page, "Delete Renamed")
    expect(names).to_have_text(["First question"])
    assert turns(page) == []
    assert [each["messages"][0]["content"] for each in conversations(page)] == ["First question\nwith details"]


def test_an_answer_goes_on_while_another_conversation_is_shown(page: Page, script: Script) -> None:
    script.texts = ["one two three four five", "other"]
    script.go.clear()
    ask(page, "Count")
    expect(page.locator(".assistant .body")).to_have_text("one two three")
    press(page, "New chat")
    ask(page, "Else")
    finish(page)
    assert turns(page) == ["Else", "other"]
    press(page, "Count")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    script.go.set()
    finish(page)
    assert turns(page) == ["Count", "one two three four five"]


def test_another_tab_shows_what_this_one_has_changed(page: Page, script: Script) -> None:
    script.texts = ["one", "two"]
    ask(page, "A")
    finish(page)
    other = page.context.new_page()
    other.goto(page.url)
    ask(page, "B")
    finish(page)
    expect(other.locator(".message .body")).to_have_text(["A", "one", "B", "two"])


def test_settings_are_sent_and_kept_but_for_the_key(page: Page, script: Script, server: Server) -> None:
    script.texts = ["one", "two", "three"]
    assert sent(page, lambda: ask(page, "A")).keys() == {"messages", "stream", "timings_per_token"}
    finish(page)
    chosen = {"Temperature": 0.5, "Top-p": 0.9, "Top-k": 40, "Min-p": 0.05, "Longest answer": 7, "Seed": 3}
    press(page, "Settings")
    for name, value in server.model.sampling.items():
        expect(page.locator(f"#{name}")).to_have_attribute("placeholder", f"{value:g}")
    for name, value in chosen.items():
        page.get_by_label(name).fill(str(value))
    page.get_by_label("System message").fill("Be brief.")
    page.get_by_label("API key").fill("hidden")
    page.keyboard.press("Escape")
    page.reload()
    body = sent(page, lambda: ask(page, "B"))
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    names = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed")
    assert [body[name] for name in names] == list(chosen.values())
    assert "hidden" not in page.evaluate("JSON.stringify(localStorage)")
    finish(page)
    press(page, "Settings")
    press(page, "Model's defaults")
    press(page, "Done")
    assert sent(page, lambda: ask(page, "C")).keys() == {"messages", "stream", "timings_per_token"}
    finish(page)


@pytest.mark.slow
def test_a_real_model_is_chatted_with(browser: Browser) -> None:
    options = ExportOptions(checkpoint=SMOLLM2, quantize="fp32", max_seq_len=256, output=MODELS / "SmolLM2-gguf.pte")
    with serving(serve.open_model(exported(options))) as server, opened(browser, server.url) as page:
        press(page, "Settings")
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Longest answer").fill("80")
        press(page, "Done")
        ask(page, "What is the capital of France?")
        finish(page)
        expect(page.locator(".assistant .body")).to_contain_text("Paris")
        ask(page, "Write a Python function that adds two numbers, in a code block.")
        expect(page.locator(".assistant pre code")).to_contain_text("def ", timeout=120000)
        page.keyboard.press("Escape")
        finish(page)
        server.wait_for(active=0)
        expect(page.locator(".numbers").last).to_contain_text(re.compile(r"prompt \d+ tokens \(\d+ cached\)"))
        before = turns(page)
        page.reload()
        expect(page.locator(".message")).to_have_count(4)
        assert turns(page) == before
