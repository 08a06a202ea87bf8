"""The page's Markdown, which is that of markdown-it on the same texts, but for the wrapping of code and tables."""

from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt
from playwright.sync_api import Page

from runtime import serve
from tests.support.browser import chromium, needs_chromium, opened
from tests.support.serving import serving

pytestmark = needs_chromium

RENDER = """async text => {
  const { show } = await import("/static/markdown.js"), container = document.createElement("div");
  show(container, text);
  return container.innerHTML;
}"""

TEXTS = (
    "# One\n## Two ##\n###### Six\n#none\n####### seven\n#\n\nSetext\n===\n\nSecond\n---\ntext",
    "a paragraph\nof two lines  \nand a\\\nthird\n\n\nanother",
    "*em* **strong** ***both*** _em_ __strong__ snake_case_name __init__.py 2 * 3 * 4 a*b*c",
    "**bold with *em* inside** *em with **bold** inside* **a*b** *a **b* c** ~~gone~~ ~5 ~~ 6",
    "**unclosed and *this\n\n*foo**bar**baz* **foo*bar*baz** ***a** b* ***a* b** **a**: *b*. (**c**)",
    '**"quoted"** and**"not"**here *(a)* **Title:** text **`code`** * not * _(b)_c',
    "`code` ``with ` tick`` ` spaced ` `` ` `` `unclosed **b** `*c*` \\`d\\` `two\nlines`",
    "\\*not em\\* \\# \\[x](y) \\a \\\\ 1\\. \\<b>",
    '[a](https://example.com) [b *c*](https://x.org/a_b_c "title") [d](<https://x.org/a b>) [e](http://x.org/(f))',
    "[a][b] [c] [d](relative) [] ![] [x](javascript:alert(1)) [y](data:text/html,z)",
    "<https://example.com/?a=b&c=d> <b>bold</b> <mailto:a@example.com> 1 < 2 > 0 & &c",
    "[outer [inner] text](https://x.org) *[a*](https://x.org)",
    "```python\nprint(1)\n\n\tx = `1`\n```\nafter\n~~~\n```\n~~~\n````\n```\n````\n```\nunclosed\n",
    "text\n```\ncode\n```\n   ```\n   indented\n    more\n   ```\n``` not`code",
    "- a\n- b\n  - c\n    - d\n- e\n\n* other\n+ third",
    "1. a\n2. b\n   - c\n   - d\n\n     e\n3. f\n\n7) seven\n8) eight",
    "1. a\n\n2. b\n\n   text\n\n   ```py\n   code\n     more\n   ```\n\n3. c\n",
    "- a\n\n- b\n- c\n\n\nafter\n- d\nlazy\n  continued\n10. ten\nnot a list\n2. two",
    "text\n- a\n- b\ntext\n1. c\n\n1. d\n  - two spaces\n    - four",
    "-\n- a\n-   b\n\n    c\n- # heading\n- > quote\n- ```\n  code\n  ```\n\n-not\n1.not",
    "> a\n> b\nlazy\n\n> c\n>\n> - d\n> - e\n>> f\n\n> ```\n> code\n> ```\nafter\n> # g\nh",
    "***\n---\n___\n- - -\n* * *\n-- -\n--\n\na\n***\nb\n- c\n***\n- d",
    "| a | b |\n|---|:-:|\n| 1 | 2 |\n| `x` | **y** | z |\n| 3\n\nafter",
    "a | b\n--|--:\n1 | 2 \\| 3\n\n| a |\n|:--|\n\n| no | table |\n| - |\n\ntext\n| h |\n| - |\n| c |\n> q",
    "- item\n\n  | a | b |\n  |---|---|\n  | 1 | 2 |\n\n- next\n\n  para\n",
    "é*ü*ß “**Zitat**” 日本**語**です 🎉 **🎉 x** a\u00a0*b*\u00a0c",
    "1. **Bold**: text\n   continues here\n2. `code`:\n   1. inner\n   2. inner\n\n---\n\nend",
)


GROW = """async text => {
  const { show } = await import("/static/markdown.js");
  const grown = document.createElement("div"), whole = document.createElement("div");
  for (let length = 1; length <= text.length; length++) {
    show(grown, text.slice(0, length));
    whole.replaceChildren();
    show(whole, text.slice(0, length));
    if (grown.innerHTML !== whole.innerHTML) return text.slice(0, length);
  }
}"""


class Flat(HTMLParser):
    """The tags and texts of HTML, without wrappers and the space between blocks."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.parts = list[str]()
        self._ignored = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "figcaption":
            self._ignored += 1
        if self._ignored or tag in ("figure", "div"):
            return
        values = {name: value for name, value in attrs if name in ("href", "start", "style") and value}
        kept = {name: unquote(value).replace(" ", "").rstrip(";") for name, value in values.items() if value != "1"}
        self.parts.append(f"<{tag}{kept or ''}>")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if not self._ignored and tag not in ("figure", "div"):
            self.parts.append(f"</{tag}>")
        self._ignored -= tag == "figcaption"

    def handle_data(self, data: str) -> None:
        if data.strip() and not self._ignored:
            self.parts.append(data.strip("\n"))


@pytest.fixture(scope="module")
def page(tiny_pte: Path) -> Iterator[Page]:
    model = serve.open_model(tiny_pte, "llama2")
    with chromium() as browser, serving(model) as server, opened(browser, server.url) as page:
        yield page


def theirs(text: str) -> str:
    """Returns markdown-it's HTML, with headings two levels lower, and links only where the page has them."""
    parser = (
        MarkdownIt("commonmark", {"breaks": True, "html": False}).enable(["table", "strikethrough"]).disable("code")
    )
    parser.validateLink = lambda address: address.startswith(("https://", "http://", "mailto:"))
    tokens = parser.parse(text)
    for token in tokens:
        if token.type.startswith("heading"):
            token.tag = f"h{min(int(token.tag[1]) + 2, 6)}"
    return str(parser.renderer.render(tokens, parser.options, {}))


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_shown_as_by_markdown_it(page: Page, text: str) -> None:
    assert Flat(page.evaluate(RENDER, text)).parts == Flat(theirs(text)).parts


def test_a_text_that_grows_is_shown_as_if_it_had_come_at_once(page: Page) -> None:
    assert page.evaluate(GROW, "\n\n".join(TEXTS[:4] + TEXTS[12:16])) is None


def test_reasoning_is_folded_until_the_reader_opens_it(page: Page) -> None:
    text = "<think>\nFirst *this*.\n\nThen that.\n</think>\n\nDone."
    html = page.evaluate(RENDER, text)
    assert html.startswith(
        "<details><summary>Reasoning</summary><p>First <em>this</em>.</p><p>Then that.</p></details>"
    )
    assert html.endswith("</details><p>Done.</p>")
    opened_early = """async text => {
      const { show } = await import("/static/markdown.js"), container = document.createElement("div");
      show(container, text.slice(0, 15));
      container.firstChild.open = true;
      show(container, text);
      return container.firstChild.open;
    }"""
    assert page.evaluate(opened_early, text)


@pytest.mark.parametrize(
    "mark", [">", "- ", "1. ", "*", "*a ", "**a*", "_", "[", "[a](", "![", "`", "~~", "|", "<think>"]
)
def test_a_mark_that_a_model_repeats_without_end_is_shown_at_once(page: Page, mark: str) -> None:
    before = page.evaluate("performance.now()")
    for text in (mark * 5000, "word " + mark * 5000, f"{mark}\n" * 1000):
        assert page.evaluate(RENDER, text)
    assert page.evaluate("performance.now()") - before < 20000
