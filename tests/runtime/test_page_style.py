"""How the chat page looks and is used with a keyboard, at all widths and in both colours."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from runtime import serve
from tests.support.browser import needs_chromium, opened
from tests.support.serving import Server, serving

pytestmark = needs_chromium

PHONE: Any = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}

ANSWER = f"""# Words

Some *are* **short**, and `others` [are not](https://example.com/).

```python
print("{"a long line " * 20}")
```

| {"word | " * 12}
|{"---|" * 12}
| {"fig | " * 12}

> A quotation.

1. one
   - [x] and a half
"""

TIMINGS = {
    "cache_n": 20,
    "prompt_n": 30,
    "prompt_per_second": 100,
    "predicted_n": 40,
    "predicted_per_second": 12.5,
}

CONVERSATION = {
    "id": "one",
    "name": "A conversation with a name that is longer than the list is wide",
    "changed": 2,
    "messages": [
        {"role": "user", "content": "What are words? " * 8},
        {"role": "assistant", "content": ANSWER, "timings": TIMINGS},
        {"role": "user", "content": "longwithoutspaces" * 20},
        {"role": "assistant", "content": "", "error": "the server is shutting down; try again later"},
    ],
}

CONTRASTS = """() => {
  const parse = text => {
    const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
    return text.startsWith("color(") ? [255 * r, 255 * g, 255 * b, a] : [r, g, b, a];
  };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const ground = node => !node ? [255, 255, 255, 1]
    : over(parse(getComputedStyle(node).backgroundColor), ground(node.parentElement));
  const light = color => {
    const linear = each => each <= .04045 ? each / 12.92 : ((each + .055) / 1.055) ** 2.4;
    const [r, g, b] = color.map(each => linear(each / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const ratio = (one, other) => (Math.max(one, other) + .05) / (Math.min(one, other) + .05);
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    if (!node.checkVisibility() || node.closest(".unseen")) continue;
    const texts = [...node.childNodes].filter(child => child.nodeType === Node.TEXT_NODE && child.data.trim());
    const styles = texts.length ? [getComputedStyle(node)] : [];
    if (node.placeholder) styles.push(getComputedStyle(node, "::placeholder"));
    for (const style of styles) {
      const value = ratio(light(over(parse(style.color), ground(node))), light(ground(node)));
      found.push([`${node.tagName} ${node.id} ${node.className} ${texts[0]?.data ?? node.placeholder}`, value]);
    }
  }
  return found;
}"""
"""The contrast of each visible text with its ground, as WCAG 2.2 defines it."""

NAME = "node => `${node.tagName} ${node.id} ${node.ariaLabel ?? node.textContent.slice(0, 20)}`"

CONTROLS = f"""within => [...document.querySelectorAll(`${{within}} :is(button, input, textarea, a, pre, .table)`)]
  .filter(node => node.checkVisibility() && !node.disabled).map({NAME})"""

UNNAMED = """() => [...document.querySelectorAll("button, input, textarea, meter")].filter(node => {
  const label = node.ariaLabel || node.labels?.[0]?.textContent || node.ariaLabelledByElements?.[0]?.textContent;
  return !/\\w/.test(label ?? (node.tagName === "BUTTON" ? node.textContent : ""));
}).map(node => node.outerHTML)"""

FOCUSED = f"""() => {{
  const {{ outlineStyle, outlineWidth }} = getComputedStyle(document.activeElement);
  return [({NAME})(document.activeElement), outlineStyle !== "none" && parseFloat(outlineWidth) >= 2];
}}"""


@pytest.fixture(scope="module")
def server(tiny_pte: Path) -> Iterator[Server]:
    with serving(serve.open_model(tiny_pte, "llama2")) as server:
        yield server


def show(page: Page) -> None:
    """Shows a conversation that the browser has kept."""
    page.evaluate("one => localStorage.setItem('llama-pte.conversation.one', one)", json.dumps(CONVERSATION))
    page.evaluate("location.hash = 'one'")
    page.reload()
    expect(page.locator(".message")).to_have_count(4)
    expect(page.locator("#used")).to_have_text("90 of 512 tokens of context")


def overflow(page: Page) -> list[str]:
    """Returns what is wider than the window."""
    return list(
        page.evaluate(
            "() => [...document.querySelectorAll('body, body > *, #chat > *, .message, .message .body > *')]"
            ".filter(node => node.getBoundingClientRect().right > innerWidth + .5 && node.checkVisibility()"
            " && !node.matches('.unseen')).map(node => node.outerHTML.slice(0, 80))"
        )
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_enough_contrast(browser: Browser, server: Server, scheme: Any) -> None:
    with opened(browser, server.url, color_scheme=scheme) as page:
        show(page)
        found = page.evaluate(CONTRASTS)
        page.get_by_role("button", name="Settings").click()
        found += page.evaluate(CONTRASTS)
        assert len(found) > 60
        assert [(name, ratio) for name, ratio in found if ratio < 4.5] == []
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(255, 255, 255)") == (scheme == "light")


def test_the_switch_of_colours_outlasts_a_reload(browser: Browser, server: Server) -> None:
    with opened(browser, server.url, color_scheme="dark") as page:
        page.get_by_role("button", name="Light colours").click()
        page.reload()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        expect(page.get_by_role("button", name="Dark colours")).to_be_visible()


def reached(page: Page) -> dict[str, bool]:
    """Returns the controls that Tab reaches, and whether each shows that it has the focus."""
    found = dict[str, bool]()
    for _ in range(50):
        page.keyboard.press("Tab")
        name, is_visible = page.evaluate(FOCUSED)
        found[name] = is_visible or name.startswith("BODY")  # where the browser's own controls would follow
    return found


def test_tab_reaches_every_control_with_a_visible_focus(browser: Browser, server: Server) -> None:
    with opened(browser, server.url) as page:
        show(page)
        page.get_by_role("button", name="Edit message").first.click()
        expected = page.evaluate(CONTROLS, "body")
        assert "TEXTAREA  Edited message" in expected
        found = reached(page)
        assert found.keys() >= set(expected)
        assert all(found.values()), found
        page.get_by_role("button", name="Settings").click()
        found = reached(page)
        assert found.keys() >= set(page.evaluate(CONTROLS, "dialog"))
        assert all(found.values()), found


def test_every_control_has_a_name(browser: Browser, server: Server) -> None:
    with opened(browser, server.url) as page:
        show(page)
        page.get_by_role("button", name="Edit message").first.click()
        page.get_by_role("button", name="Settings").click()
        unnamed = page.evaluate(UNNAMED)
        assert unnamed == []


def test_a_phone_shows_everything_in_its_width_and_the_list_on_demand(browser: Browser, server: Server) -> None:
    with opened(browser, server.url, **PHONE) as page:
        show(page)
        assert overflow(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        menu, names = page.get_by_role("button", name="Conversations"), page.get_by_role("navigation")
        expect(names).to_be_hidden()
        menu.click()
        expect(names).to_be_visible()
        expect(menu).to_have_attribute("aria-expanded", "true")
        page.keyboard.press("Escape")
        expect(names).to_be_hidden()
        expect(menu).to_be_focused()
        menu.click()
        page.get_by_role("button", name="New chat").click()
        expect(names).to_be_hidden()
        expect(page.locator(".message")).to_have_count(0)
        page.get_by_role("button", name="Settings").click()
        box = page.get_by_role("dialog").bounding_box()
        assert box
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360


def test_a_narrow_window_shows_everything_in_its_width(browser: Browser, server: Server) -> None:
    with opened(browser, server.url, viewport={"width": 800, "height": 600}) as page:
        show(page)
        assert overflow(page) == []
        expect(page.get_by_role("navigation")).to_be_visible()
