"""Records docs/page-light.png and docs/page-phone.png, the pictures in docs/server.md, from a real chat.

python -m docs.record_page SmolLM2-135M-Instruct.pte
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Browser, expect, sync_playwright

from runtime.serve import open_model
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
    chromium = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    with serving(open_model(Path(sys.argv[1]))) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name in PICTURES:
            record(browser, server.url, name)
        browser.close()


if __name__ == "__main__":
    main()
