"""Records docs/page-light.png and docs/page-phone.png, the pictures in docs/server.md, from a real chat.

python -m docs.record_page SmolLM2-135M-Instruct.pte
"""

import sys
from pathlib import Path

from playwright.sync_api import Browser, expect

from runtime.serve import open_model
from tests.support.browser import chromium
from tests.support.serving import serving

ROOT = Path(__file__).resolve().parents[1]
MESSAGES = (
    "What is the capital of France?",
    "Write a Python function that reverses a string, and explain it in one sentence.",
)
PICTURES = {
    "light": {"viewport": {"width": 1000, "height": 600}},
    "phone": {"viewport": {"width": 390, "height": 660}, "color_scheme": "dark", "has_touch": True, "is_mobile": True},
}


def record(browser: Browser, url: str, name: str) -> None:
    """Chats, and writes the picture of that name."""
    page = browser.new_page(**PICTURES[name])  # type: ignore[arg-type]
    page.goto(url)
    page.evaluate("localStorage.setItem('llama-pte.settings', JSON.stringify({ temperature: '0' }))")
    for message in MESSAGES:
        page.goto(url)
        page.reload()
        page.get_by_label("Message", exact=True).fill(message)
        page.get_by_label("Message", exact=True).press("Enter")
        expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible(timeout=120000)
    page.mouse.click(0, 0)
    page.screenshot(path=ROOT / "docs" / f"page-{name}.png")


def main() -> None:
    """Serves the file and records the pictures."""
    with serving(open_model(Path(sys.argv[1]))) as server, chromium() as browser:
        for name in PICTURES:
            record(browser, server.url, name)


if __name__ == "__main__":
    main()
