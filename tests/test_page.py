"""The chat page in headless Chromium: with a scripted server, and with ffjax's own."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
from chat_folder import chat_folder
from scripted_server import MODEL, ScriptedServer, scripted

webdriver = pytest.importorskip(
    "selenium.webdriver", reason="the page is tested with selenium, which is not installed"
)
from selenium.common.exceptions import StaleElementReferenceException  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

_CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
_DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.once("The page is Chromium's."),
    pytest.mark.skipif(
        not (_CHROMIUM and _DRIVER),
        reason="the page is tested in Chromium, and chromium or chromedriver is not installed",
    ),
]
_SECONDS = 30
# Chromium asks for nothing from elsewhere, and needs neither a GPU nor a user who may sandbox.
_OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--hide-scrollbars", "--force-prefers-reduced-motion"),
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = _CHROMIUM or ""
    profile = tempfile.mkdtemp(prefix="ffjax-page-")
    for option in (*_OPTIONS, f"--user-data-dir={profile}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=_DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    driver.execute_cdp_cmd("Browser.setPermission", _CLIPBOARD)
    yield driver
    driver.quit()
    shutil.rmtree(profile, ignore_errors=True)


_CLIPBOARD = {"permission": {"name": "clipboard-write"}, "setting": "granted"}


class Page:
    """The page, as a person sees and uses it."""

    def __init__(self, browser: Any, url: str, width: int = 1000):
        self.browser = browser
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 740, "deviceScaleFactor": 1, "mobile": width < 500},
        )
        browser.get(url)
        browser.execute_script("sessionStorage.clear(); localStorage.clear();")
        browser.get(url)
        self.complaints()  # those of earlier tests are gone

    def until(self, happens: Any) -> Any:
        wait = WebDriverWait(self.browser, _SECONDS, 0.02, [StaleElementReferenceException])
        return wait.until(lambda _: happens())

    def find(self, selector: str) -> Any:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def button(self, name: str) -> Any:
        """The last button of that name that can be seen."""
        found = [
            one
            for one in self.browser.find_elements(By.TAG_NAME, "button")
            if one.is_displayed() and name in (one.text, one.get_attribute("aria-label"))
        ]
        assert found, f"there is no button {name}"
        return found[-1]

    @property
    def texts(self) -> list[str]:
        bodies = "[...document.querySelectorAll('#log .body')]"
        return self.browser.execute_script(f"return {bodies}.map((one) => one.innerText)")

    @property
    def figures(self) -> str:
        return self.find("#log li:last-child .figures").text

    @property
    def is_busy(self) -> bool:
        return self.find("#log").get_attribute("aria-busy") == "true"

    @property
    def error(self) -> str:
        return self.find("#error").text

    def type(self, text: str) -> None:
        self.find("#text").send_keys(text)

    def ask(self, text: str) -> None:
        """Sends a message and waits for the answer's end."""
        count = len(self.texts)
        self.type(text + Keys.ENTER)
        self.until(lambda: len(self.texts) >= count + 2 and not self.is_busy)

    def complaints(self) -> list[str]:
        """What the console says, but for answers with an error's status."""
        said = [one["message"] for one in self.browser.get_log("browser")]
        return [one for one in said if "the server responded with a status" not in one]


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted() as server:
        yield server


@pytest.fixture
def page(browser, server) -> Page:
    page = Page(browser, server.url)
    page.until(lambda: page.find("#model").text == MODEL)
    return page


def test_a_conversation_streams(page, server):
    server.hold = 2
    page.type("hello" + Keys.ENTER)
    page.until(lambda: page.texts == ["hello", "Hello there"])
    assert page.is_busy
    server.go.set()
    page.until(lambda: not page.is_busy)
    assert page.texts == ["hello", "Hello there."]
    assert re.fullmatch(
        r"3 tokens, [\d.]+ tokens/s, first after \d+\.\d\d s, 3 of 7 context tokens cached",
        page.figures,
    )
    server.pieces = ["Zwölf 漢字 🙂"]
    page.ask("größe")
    assert page.texts[2:] == ["größe", "Zwölf 漢字 🙂"]
    assert server.messages == [
        ("user", "hello"),
        ("assistant", "Hello there."),
        ("user", "größe"),
    ]
    body = server.bodies[-1]
    assert (body["model"], body["stream"]) == (MODEL, True)
    assert body["stream_options"] == {"include_usage": True}
    assert "temperature" not in body
    assert page.find("#status").get_attribute("textContent").startswith("The answer has ended.")
    assert page.complaints() == []


def test_text_is_never_html(page, server):
    evil = "<img src=x onerror=\"document.title='bad'\"><script>document.title='bad'</script>"
    server.pieces = [evil, "\n```html\n", evil, "\n```\nand `<b>`"]
    page.ask(evil)
    assert page.texts[0] == evil
    assert page.browser.find_elements(By.CSS_SELECTOR, "#log img, #log script, #log b") == []
    assert page.find("#log pre").text == evil
    assert page.find("#log p code").text == "<b>"
    assert page.browser.title == f"{MODEL} - ffjax chat"
    assert page.complaints() == []


def test_stop_keeps_what_was_said(page, server):
    server.hold = 2
    page.type("hello" + Keys.ENTER)
    page.until(lambda: page.texts == ["hello", "Hello there"])
    page.button("Stop").click()
    page.until(lambda: not page.is_busy)
    assert server.left.wait(_SECONDS)
    assert page.texts == ["hello", "Hello there"]
    assert page.figures.startswith("stopped, first after")
    server.hold = None
    page.ask("go on")
    assert server.messages[1] == ("assistant", "Hello there")


def test_stopped_before_the_first_word_the_message_comes_back(page, server):
    server.hold = 0
    page.type("hello" + Keys.ENTER)
    page.until(lambda: server.bodies)
    page.type(Keys.ESCAPE)
    page.until(lambda: not page.is_busy)
    assert page.texts == []
    assert page.find("#text").get_attribute("value") == "hello"


def test_the_last_message_is_edited_and_sent_again(page, server):
    page.ask("one")
    page.ask("two")
    assert len(page.browser.find_elements(By.CSS_SELECTOR, "#log .mine button")) == 1
    page.button("Edit").click()
    assert page.find("#text").get_attribute("value") == "two"
    page.button("Cancel").click()
    assert page.find("#text").get_attribute("value") == ""
    page.button("Edit").click()
    server.pieces = ["Other"]
    page.type(" and a half" + Keys.ENTER)
    page.until(lambda: page.texts[-1] == "Other" and not page.is_busy)
    assert page.texts == ["one", "Hello there.", "two and a half", "Other"]
    assert server.messages[-1] == ("user", "two and a half")
    assert len(server.messages) == 3


def test_new_chat_and_a_page_that_is_loaded_again(page, server):
    page.ask("one")
    page.browser.refresh()
    page.until(lambda: page.texts == ["one", "Hello there."])
    page.button("New chat").click()
    assert page.texts == []
    page.ask("two")
    assert server.messages == [("user", "two")]


def test_an_answer_is_copied(page, server):
    server.pieces = ["text\n```py\nx = 1\n```"]
    page.ask("one")
    page.browser.execute_script(
        "navigator.clipboard.writeText = async (text) => { window.pasteboard = text; }"
    )
    page.button("Copy the answer").click()
    page.until(lambda: page.browser.execute_script("return window.pasteboard"))
    assert page.browser.execute_script("return window.pasteboard") == server.pieces[0]
    page.button("Copy code").click()
    page.until(lambda: page.browser.execute_script("return window.pasteboard") == "x = 1")


def test_settings_are_sent_and_kept(page, server):
    page.button("Settings").click()
    page.find("#system").send_keys("Be brief.")
    page.find("#temperature").send_keys("0,7")
    page.find("#top_p").send_keys("0")
    page.find("#max_tokens").send_keys("12")
    page.button("Save").click()
    assert page.find("#settings-error").text == "Top-p is a number above 0 to 1, or empty; it is 0."
    page.find("#top_p").send_keys(".9")
    page.find("#top_p").send_keys(Keys.ENTER)
    page.ask("hello")
    assert server.messages[0] == ("system", "Be brief.")
    body = server.bodies[-1]
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.7, 0.9, 12)
    page.browser.refresh()
    page.until(lambda: page.find("#model").text == MODEL)
    page.button("Settings").click()
    assert page.find("#temperature").get_attribute("value") == "0.7"
    page.find("#temperature").clear()
    page.button("Save").click()
    page.ask("again")
    assert "temperature" not in server.bodies[-1]


def test_a_key_is_asked_for_and_kept_in_the_tab(browser, server):
    server.api_key = "secret"
    page = Page(browser, server.url)
    page.until(lambda: page.find("#key-dialog").is_displayed())
    page.find("#key").send_keys("wrong" + Keys.ENTER)
    page.until(lambda: "The API key is wrong." in page.find("#key-why").text)
    page.find("#key").send_keys("secret" + Keys.ENTER)
    page.until(lambda: page.find("#model").text == MODEL)
    page.ask("hello")
    server.api_key = "another"
    page.type("more" + Keys.ENTER)
    page.until(lambda: page.find("#key-dialog").is_displayed())
    page.find("#key").send_keys("another" + Keys.ENTER)
    page.until(lambda: page.texts[2:] == ["more", "Hello there."] and not page.is_busy)
    held = "return [localStorage.length, sessionStorage.getItem('ffjax.key')]"
    assert page.browser.execute_script(held) == [0, '"another"']


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ({"status": 400, "message": "The conversation is too long."}, "The conversation is too"),
        ({"status": 503, "message": "The queue is full."}, r"The queue is full. Try again in 3 s."),
    ],
)
def test_what_is_refused_is_said_and_the_message_comes_back(page, server, script, error):
    page.ask("one")
    vars(server).update(script)
    page.type("two" + Keys.ENTER)
    page.until(lambda: error in page.error)
    assert page.texts == ["one", "Hello there."]
    assert page.find("#text").get_attribute("value") == "two"
    server.status = 200
    page.ask("")
    assert page.error == ""
    assert [text for _, text in server.messages] == ["one", "Hello there.", "two"]


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ({"breaks": True}, "The connection ended before the answer did."),
        ({"late_error": "The logits became NaN."}, "The logits became NaN."),
    ],
)
def test_an_answer_that_breaks_off_keeps_what_was_said(page, server, script, error):
    vars(server).update(script)
    page.type("one" + Keys.ENTER)
    page.until(lambda: page.error == error)
    assert page.texts == ["one", "Hello there."]


def test_an_answer_that_is_cut_off_says_so(page, server):
    server.finish_reason = "length"
    page.ask("one")
    assert page.figures.startswith("cut off at the context's end: begin a new chat, 3 tokens")
    page.button("Settings").click()
    page.find("#max_tokens").send_keys("3" + Keys.ENTER)
    page.ask("two")
    assert page.figures.startswith("cut off by max tokens, 3 tokens")


def test_a_server_that_is_gone(browser):
    with scripted() as server:
        page = Page(browser, server.url)
        page.until(lambda: page.find("#model").text == MODEL)
    page.type("one" + Keys.ENTER)
    page.until(lambda: page.error == "The server does not answer. Is ffjax serve still running?")
    assert page.find("#text").get_attribute("value") == "one"


LONG = "A long line, averylongwordthatdoesnotfitintoanarrowwindowandmustbebroken. " * 5


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_a_desk(browser, server, width, scheme):
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    page = Page(browser, server.url, width)
    page.until(lambda: page.find("#model").text == MODEL)
    server.pieces = [LONG, "\n\n```python\n", f'print("{LONG}")\n', "```\n\nDone."]
    page.ask(f"Write code.{Keys.SHIFT}{Keys.ENTER}{Keys.SHIFT}Please.")
    assert page.texts[0] == "Write code.\nPlease."
    wide = (
        "return [document.documentElement.scrollWidth, document.querySelector('main').scrollWidth]"
    )
    assert max(page.browser.execute_script(wide)) <= width
    for name in ("Settings", "New chat", "Send"):
        box = page.button(name).rect
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        assert box["y"] + box["height"] <= 740
        assert box["height"] >= 40
    shoot(page, f"chat-{width}-{scheme}")
    page.button("Settings").click()
    box = page.find("#settings").rect
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    shoot(page, f"settings-{width}-{scheme}")
    colors = page.browser.execute_script(
        "return ['color', 'backgroundColor'].map((name) => getComputedStyle(document.body)[name])"
    )
    assert contrast(*colors) > 7
    assert page.complaints() == []


def test_it_is_used_by_keyboard_alone(page, server):
    active = "return document.activeElement.id"
    assert page.browser.execute_script(active) == "text"
    page.ask("hello")
    assert page.browser.execute_script(active) == "text"
    keys = page.browser.switch_to.active_element
    keys.send_keys(Keys.SHIFT + Keys.TAB)
    names = []
    for _ in range(4):
        one = page.browser.switch_to.active_element
        names.append(one.get_attribute("aria-label") or one.text)
        one.send_keys(Keys.SHIFT + Keys.TAB)
    assert names == [
        "Copy the answer",
        "Edit and resend this message",
        "New chat",
        "Settings",
    ]
    page.button("Settings").send_keys(Keys.ENTER)
    assert page.browser.execute_script(active) == "system"
    page.browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert page.browser.execute_script(active) == "settings-open"


def test_every_field_and_button_has_a_name(page):
    page.ask("hello")
    nameless = """
        return [...document.querySelectorAll("button, input, textarea")]
          .filter((one) => !(one.textContent.trim() || one.getAttribute("aria-label")
            || (one.labels && one.labels.length))).map((one) => one.outerHTML)"""
    assert page.browser.execute_script(nameless) == []
    assert page.find("#log").get_attribute("role") == "log"


def contrast(one: str, other: str) -> float:
    """Of two colours as rgb(...), as WCAG 2 has it."""

    def light(color: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True)) + 0.05

    low, high = sorted((light(one), light(other)))
    return high / low


def shoot(page: Page, name: str) -> None:
    """Keeps a picture, where FFJAX_TEST_PICTURES is a folder for them."""
    if folder := os.environ.get("FFJAX_TEST_PICTURES"):
        page.browser.save_screenshot(os.path.join(folder, f"{name}.png"))


# With ffjax's own server


def test_it_talks_with_ffjax_serve(browser, tmp_path):
    import jax.numpy as jnp
    from serve_cases import NAME, serving

    import checkpoints
    from ffjax.live.batch import LiveBatch
    from ffjax.text.tokenizers import load_tokenizer

    model = checkpoints.load(folder := chat_folder(tmp_path / "talker"), dtype=jnp.float32)
    with serving(
        lambda: LiveBatch(model, rows=2, capacity=512, chunk=128),
        config=model.config,
        tokenizer=load_tokenizer(folder, model.config),
        api_key="secret",
    ) as running:
        page = Page(browser, f"{running.url}/")
        page.until(lambda: page.find("#key-dialog").is_displayed())
        page.find("#key").send_keys("secret" + Keys.ENTER)
        page.until(lambda: page.find("#model").text == NAME)
        page.button("Settings").click()
        page.find("#max_tokens").send_keys("20" + Keys.ENTER)
        page.ask("hello")
        page.ask("hello again")
        said = running.client(api_key="secret").chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": "hello"}], max_tokens=20
        )
        assert page.browser.execute_script("return state.turns[1].content") == (
            said.choices[0].message.content
        )
        assert re.search(r"20 tokens, [\d.]+ tokens/s, first after", page.figures)
        cached = re.search(r"(\d+) of \d+ context tokens cached", page.figures)
        assert cached is not None
        assert int(cached[1]) > 20
        page.button("Settings").click()
        page.find("#max_tokens").clear()
        page.find("#max_tokens").send_keys("9999" + Keys.ENTER)
        page.type("more" + Keys.ENTER)
        page.until(lambda: page.error)
        assert "9999" in page.error
        assert page.find("#text").get_attribute("value") == "more"
        assert page.complaints() == []
