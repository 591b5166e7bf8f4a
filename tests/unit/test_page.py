"""The chat page in a real headless Chromium: what a person does with mouse, keyboard and phone."""

import re
import shutil

import pytest
from serving import chat_model, serving_replies

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

BROWSER, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="chromium and chromedriver are not installed")

MARKDOWN = """Some **bold** and `code`, 你好 👋.

```python
print("<b>x</b>")
```

- one
  - inner
- two

<img src=x onerror="document.title='owned'"> [bad](javascript:alert(1)) [good](https://example.org/)"""


def reply(prompt):
    question = prompt.rsplit("<|user|>", 1)[-1]
    return "word " * 2000 if "slow" in question else MARKDOWN if "markdown" in question else f"You said: {question}"


@pytest.fixture(scope="module")
def server():
    with serving_replies(reply, pause_s=0.002, model=chat_model(context_length=100_000)) as served:
        yield served


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--lang=en-US"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"intl.accept_languages": "en-US"})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.binary_location = BROWSER
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """What a test does with the page."""

    def __init__(self, browser, address):
        self.browser = browser
        browser.get(address)
        browser.execute_script("localStorage.clear(); sessionStorage.clear(); onbeforeunload = null")
        self.size(1200, 800)
        self.colours("light")
        browser.execute_script("localStorage.clear()")
        browser.get(address + "/health")  # leaves the page, which saves, before its storage is emptied for good
        browser.execute_script("localStorage.clear(); sessionStorage.clear()")
        browser.get(address)
        browser.get_log("browser")

    def size(self, width, height, mobile=False):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def colours(self, scheme):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def one(self, selector):
        return self.browser.find_element("css selector", selector)

    def script(self, text):
        return self.browser.execute_script(f"return {text}")

    def until(self, holds):
        WebDriverWait(self.browser, 8, poll_frequency=0.03).until(lambda _: holds())

    def keys(self, *keys):
        self.browser.switch_to.active_element.send_keys(*keys)

    def focused(self):
        return self.script("document.activeElement.id || document.activeElement.getAttribute('aria-label')")

    def ask(self, text, wait=True):
        self.one("#prompt").send_keys(text, Keys.ENTER)
        self.until(lambda: self.all(".message.assistant"))
        if wait:
            self.ended()

    def ended(self):
        self.until(lambda: self.one("#send").is_displayed())

    def answers(self):
        return [element.text for element in self.all(".message.assistant .text")]

    def errors(self):
        """What the console holds, among it every violation of the content security policy."""
        return [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture
def page(browser, server):
    opened = Page(browser, server[0])
    yield opened
    assert opened.errors() == []


def test_an_answer_streams_and_its_figures_follow(page, server):
    page.ask("slow", wait=False)
    page.until(lambda: 0 < len(page.answers()[0]) < 500)
    assert page.one(".message.assistant").get_attribute("aria-busy") == "true"
    first = len(page.answers()[0])
    page.until(lambda: len(page.answers()[0]) > first)
    page.one("#stop").click()
    page.ended()
    page.until(lambda: server[1].streams[-1].is_cancelled)
    figures = page.one(".figures").text
    assert "tok/s" in figures and figures.endswith("stopped")
    assert re.search(r"\d [MG]B\b", page.one("#status").text)
    assert "tok/s" in page.one("#status").text
    assert "Memory" in page.one("#facts").text


def test_model_text_never_becomes_markup(page):
    page.ask("markdown")
    assert page.one(".text strong").text == "bold"
    assert page.one(".code code").text == 'print("<b>x</b>")'
    assert page.one(".text ul ul li").text == "inner"
    assert not page.all(".text img, .text b, .text script")
    assert page.script("document.title") == "markdown · megalith"
    assert [link.get_attribute("href") for link in page.all(".text a")] == ["https://example.org/"]
    assert "[bad](javascript:alert(1))" in page.answers()[0]
    assert page.answers()[0].startswith("Some bold and code, 你好 👋.")


def test_regenerate_asks_the_same_again(page, server):
    page.ask("first question")
    before = len(server[1].streams)
    page.one(".message.assistant button[aria-label='Regenerate']").click()
    page.until(lambda: len(server[1].streams) == before + 1)
    page.ended()
    assert page.answers() == ["You said: first question\n<|assistant|>".replace("\n", "\n")]


def test_a_message_can_be_edited_and_what_follows_goes(page):
    page.ask("one")
    page.ask("two")
    page.one(".message.user button[aria-label='Edit']").click()
    assert page.one("#prompt").get_attribute("value") == "one"
    page.one("#prompt").send_keys(" more")
    page.keys(Keys.ENTER)
    page.ended()
    page.until(lambda: [element.text for element in page.all(".message.user .text")] == ["one more"])
    assert len(page.answers()) == 1


def test_conversations_are_kept_switched_deleted_and_brought_back(page):
    page.ask("about stones")
    page.one("#new").click()
    assert page.one("#welcome").is_displayed()
    page.ask("about trees")
    kept = page.answers()
    page.browser.refresh()
    page.until(lambda: page.answers() == kept)
    assert [item.text for item in page.all("#list .open")] == ["about trees", "about stones"]
    page.all("#list .open")[1].click()
    assert "about stones" in page.answers()[0]
    page.browser.execute_script("arguments[0].click()", page.all("#list .remove")[1])
    assert [item.text for item in page.all("#list .open")] == ["about trees"]
    page.one("#toast button").click()
    assert "about stones" in page.answers()[0]
    page.one("#title").send_keys("!")
    assert page.all("#list .open")[1].text == "about stones!"


def test_an_answer_goes_on_while_another_conversation_is_looked_at(page):
    page.ask("quick")
    page.one("#new").click()
    page.ask("slow", wait=False)
    page.all("#list .open")[1].click()
    assert "quick" in page.answers()[0]
    page.keys(Keys.ESCAPE)
    page.ended()
    page.all("#list .open")[0].click()
    assert page.answers()[0].startswith("word")


def test_settings_and_system_prompt_reach_the_server(page, server):
    page.one("#open-settings").click()
    page.one("#s-system").send_keys("You are a stone.")
    page.browser.execute_script(
        "const t = document.getElementById('s-temperature'); t.value = 1.25; t.dispatchEvent(new Event('input'))"
    )
    for name, value in [("seed", "7"), ("top_k", "3"), ("max_tokens", "77")]:
        page.one(f"#s-{name}").clear()
        page.one(f"#s-{name}").send_keys(value)
    page.keys(Keys.ESCAPE)
    page.ask("hello")
    options = server[1].streams[-1].answer.options
    assert (options.temperature, options.seed, options.top_k, options.max_new_tokens) == (1.25, 7, 3, 77)
    page.browser.refresh()
    page.one("#open-settings").click()
    assert page.one("#s-system").get_attribute("value") == "You are a stone."
    assert page.one("#s-seed").get_attribute("value") == "7"
    page.one("#reset").click()
    assert page.one("#s-seed").get_attribute("value") == ""


def test_light_and_dark(page):
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.script(ground)
    page.colours("dark")
    page.until(lambda: page.script(ground) != light)
    page.one("#theme").click()
    assert page.script(ground) == light
    page.browser.refresh()
    assert page.script(ground) == light, "a choice is kept, whatever the system says"


def test_a_phone(page):
    page.size(360, 640, mobile=True)
    page.browser.refresh()
    page.ask("markdown")
    assert page.script("document.documentElement.scrollWidth") == 360
    assert page.script("innerWidth") == 360
    for name in ("prompt", "send", "menu", "open-settings", "theme", "language"):
        box = page.one(f"#{name}").rect
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360, name
    assert not page.one("#new").is_displayed()
    page.one("#menu").click()
    page.until(lambda: page.one("#new").is_displayed())
    page.one("#new").click()
    page.until(lambda: not page.one("#new").is_displayed())


def test_by_keyboard_alone(page, server):
    assert page.focused() == "prompt", "typing can begin at once"
    page.keys("slow", Keys.SHIFT, Keys.ENTER, Keys.NULL, "and more", Keys.ENTER)
    page.until(lambda: page.answers() and page.answers()[0])
    assert page.one(".message.user .text").text == "slow\nand more"
    page.keys(Keys.ESCAPE)
    page.ended()
    page.until(lambda: server[1].streams[-1].is_cancelled)
    page.keys(Keys.SHIFT, Keys.TAB, Keys.NULL)
    assert page.focused() == "Regenerate"
    page.keys(Keys.ENTER)
    page.until(lambda: not page.one("#send").is_displayed())
    page.keys(Keys.ESCAPE)
    page.ended()
    for _ in range(20):
        if page.focused() == "open-settings":
            break
        page.keys(Keys.SHIFT, Keys.TAB, Keys.NULL)
    outline = page.script("getComputedStyle(document.activeElement).outlineStyle")
    assert (page.focused(), outline) == ("open-settings", "solid")
    page.keys(Keys.ENTER)
    assert page.one("#settings").is_displayed()
    page.keys(Keys.ESCAPE)
    page.until(lambda: not page.one("#settings").is_displayed())
    assert page.focused() == "open-settings"


def test_english_and_chinese(page):
    page.ask("hello")
    page.one("#language").click()
    assert page.script("document.documentElement.lang") == "zh-CN"
    assert page.one("#new").text == "新对话"
    assert page.one("#prompt").get_attribute("placeholder") == "输入消息"
    assert page.all(".message.assistant button[aria-label='重新生成']")
    page.browser.execute_cdp_cmd("Emulation.setUserAgentOverride", {"userAgent": "test", "acceptLanguage": "zh-CN,en"})
    page.browser.execute_script("localStorage.removeItem('megalith.language')")
    page.browser.refresh()
    chinese = page.one("#new").text
    page.browser.execute_cdp_cmd("Emulation.setUserAgentOverride", {"userAgent": "test", "acceptLanguage": "fr,en-GB"})
    page.browser.refresh()
    assert (chinese, page.one("#new").text) == ("新对话", "New chat")


def test_both_languages_say_the_same_things(page):
    source = page.script("document.querySelector('script').textContent")
    words = source[source.index("const WORDS = ") + len("const WORDS = ") : source.index("const DEFAULTS")].strip()
    keys = page.browser.execute_script(f"const w = {words} return [Object.keys(w.en), Object.keys(w.zh)]")
    assert keys[0] == keys[1]
    used = page.script("[...document.querySelectorAll('[data-say]')].map(e => e.dataset.say)")
    assert set(used) <= set(keys[0])


def test_a_key_is_asked_for_and_used(browser):
    with serving_replies(reply, api_key="sk-1") as (address, _):
        page = Page(browser, address)
        page.until(lambda: page.one("#key").is_displayed())
        page.keys(Keys.ESCAPE)
        page.until(lambda: not page.one("#key").is_displayed())
        page.ask("hello")
        assert "a valid key is needed" in page.one(".message.assistant .notice").text
        page.until(lambda: page.one("#key").is_displayed())
        page.one("#k-key").send_keys("sk-wrong", Keys.ENTER)
        page.until(lambda: not page.one("#key").is_displayed() or page.one("#k-key").get_attribute("value") == "")
        page.until(lambda: page.one("#key").is_displayed())
        page.one("#k-key").send_keys("sk-1", Keys.ENTER)
        page.until(lambda: "tiny" in page.one("#facts").text)
        page.ask("hello again")
        assert "hello again" in page.answers()[-1]
        assert page.script("localStorage.getItem('megalith.key')") is None, "not kept unless wanted"
        browser.get(f"{address}/health")


def test_errors_are_shown_and_can_be_tried_again(browser):
    def failing(prompt):
        return RuntimeError("the engine broke") if "break" in prompt else "fine"

    with serving_replies(failing, max_tokens=600) as (address, _):
        page = Page(browser, address)
        page.ask("break")
        assert page.one(".message.assistant .notice").text == "the engine broke"
        assert page.all("button[aria-label='Try again']")
        page.ask("hello")
        assert page.answers() == ["", "fine"], "what failed is not said to the model again"
    page.one("#prompt").send_keys("anybody there?", Keys.ENTER)
    page.until(lambda: page.all(".notice") and page.all(".notice")[-1].text == "The server cannot be reached.")
