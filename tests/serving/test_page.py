"""The web page at /: in a browser, against a real server, and against one that simulates network faults."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.request import Request, urlopen

import pytest

from tests.support.servers import Running, run_server
from tnnlm.inference.generator import TextGenerator
from tnnlm.serving.app import PAGE, PARTS

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
FILES = {"/": "index.html", **{f"/{name}": name for name in PARTS}}
KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
CARD = {
    "id": "fake",
    "tnnlm": {"parameters": 24_100_000, "state_bytes": 565_248, "engine": "packed", "max_tokens": 100},
}
WAIT = 60_000
"""Timeout in milliseconds, which allows for a busy machine."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open pages in a fresh profile; fail at the end if one logged an error or contacted another server."""
    problems: list[str] = []
    contexts = []

    def open_page(url: str, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
        own = (url.partition("#")[0], "data:")
        page.on("request", lambda r: None if r.url.startswith(own) else problems.append(r.url))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    # The browser itself logs refused requests.
    assert [line for line in problems if not line.startswith("Failed to load resource")] == []


@pytest.fixture
def page(visit: Any, server: Running) -> Any:
    opened = visit(server.url)
    expect(opened.locator("#model")).to_have_text("tiny")
    return opened


def write(page: Any, prompt: str = "the quick", tokens: int = 40, temperature: float = 0) -> None:
    page.fill("#prompt", prompt)
    page.fill("#max_tokens", str(tokens))
    page.fill("#temperature", str(temperature))
    page.click("#generate")


def finished(page: Any) -> None:
    expect(page.locator("#status")).to_have_text(re.compile(r"^Finished \((stop|length)\): "), timeout=WAIT)


def text_of(page: Any, sample: int = 0) -> str:
    blocks = page.locator(".sample").nth(sample).locator(".blocks > div")
    return "\n".join(blocks.evaluate_all("blocks => blocks.map(b => b.textContent)"))


def finished_samples(page: Any) -> None:
    expect(page.locator("#status")).to_have_text(re.compile(r"^Finished \([^)]+\): "), timeout=WAIT)


def whole_answer(server: Running, **body: Any) -> str:
    """Return the text of the same completion without streaming."""
    return answers(server, **body)[0]


def answers(server: Running, **body: Any) -> list[str]:
    """Return the same completions without streaming."""
    data = json.dumps(body).encode()
    request = Request(f"{server.url}/v1/completions", data, {"Content-Type": "application/json"})
    with urlopen(request, timeout=300) as answer:
        return [str(choice["text"]) for choice in json.load(answer)["choices"]]


def test_text_streams_in(page: Any, server: Running) -> None:
    page.fill("#seed", "5")
    page.evaluate(
        """() => {
            const text = document.querySelector("#text");
            window.lengths = new Set();
            const note = () => window.lengths.add(text.textContent.length);
            new MutationObserver(note).observe(text, {childList: true, subtree: true, characterData: true});
        }"""
    )
    write(page, tokens=1800, temperature=1)
    finished(page)
    assert page.evaluate("window.lengths.size") >= 4
    text = whole_answer(server, prompt="the quick", max_tokens=1800, temperature=1, seed=5)
    assert text_of(page) == "the quick" + text
    assert page.locator("#text .prompt").first.text_content() == "the quick"
    colours = [
        page.locator(f"#text .{part}").first.evaluate("e => getComputedStyle(e).color")
        for part in ("prompt", "completion")
    ]
    assert colours[0] != colours[1]
    assert re.match(r"Finished \(length\): 1,?800 tokens in ", page.inner_text("#status"))


def test_numbers_are_the_servers(page: Any, server: Running, generator: TextGenerator) -> None:
    row_bytes = server.service.scheduler.row_bytes
    expect(page.locator("#state")).to_have_text(f"{row_bytes / 1024:,.0f}")  # in KiB, as in README.md
    write(page, tokens=60)
    finished(page)
    # The last token was generated, and is not yet part of the state.
    prompt = len(generator.tokenizer.encode("the quick"))
    expect(page.locator("#context")).to_have_text(str(prompt + 59))
    assert float(page.inner_text("#step")) > 0
    assert int(page.inner_text("#speed").replace(",", "")) > 0


def test_stop_keeps_the_generated_text_and_frees_the_server(page: Any, server: Running) -> None:
    write(page, tokens=3000)
    expect(page.locator("#text .completion").first).not_to_be_empty(timeout=WAIT)
    page.click("#stop")
    expect(page.locator("#status")).to_have_text(re.compile("^Stopped: .* tokens in "))
    kept = text_of(page)
    expect(page.locator("#generate")).to_have_attribute("aria-disabled", "false")
    for _ in range(100):
        if not any(server.service.health()[name] for name in server.service.scheduler.load):
            break
        page.wait_for_timeout(50)
    assert text_of(page) == kept
    assert len(kept) > len("the quick")


def test_continue_extends_the_text(page: Any) -> None:
    write(page, tokens=20)
    finished(page)
    before, context = text_of(page), int(page.inner_text("#context"))
    page.fill("#prompt", "something else that is not used")
    page.click("#continue")
    finished(page)
    assert text_of(page).startswith(before)
    assert len(text_of(page)) > len(before)
    assert int(page.inner_text("#context")) >= context + 15
    write(page, "another")
    finished(page)
    assert text_of(page).startswith("another")


def test_continue_sends_the_tokens_and_not_the_text(page: Any, server: Running) -> None:
    whole = whole_answer(server, prompt="the quick", max_tokens=40, temperature=0)
    write(page, tokens=20)
    finished(page)
    with page.expect_request("**/v1/completions") as sent:
        page.click("#continue")
    finished(page)
    assert re.search(r"; [01] of \d+ prompt tokens read, \d+ kept\.$", page.inner_text("#status"))
    assert text_of(page) == "the quick" + whole
    (ids,) = sent.value.post_data_json["prompt"]
    tokenizer = server.service.parser.tokenizer
    prompt = tokenizer.encode("the quick")
    assert ids[: len(prompt)] == prompt
    assert len(ids) == len(prompt) + 20


def test_continue_after_a_stop_string_sends_the_text(visit: Any) -> None:
    bodies: list[dict[str, Any]] = []

    def answer(_: str, body: dict[str, Any]) -> bytes:
        bodies.append(body)
        return event("some text", 5, "stop", prompt_token_ids=[1, 2], token_ids=[3, 4, 5]) + DONE

    with odd_server(answer) as url:
        page = visit(url)
        write(page, prompt="a ")
        finished(page)
        page.click("#continue")
        finished(page)
        page.fill("#stop_strings", "END")
        for _ in range(2):  # the tokens of the stop string are not part of the text
            page.click("#continue")
            finished(page)
    prompts = [body["prompt"] for body in bodies]
    assert prompts[:3] == ["a ", [[1, 2, 3, 4, 5]], [[1, 2, 3, 4, 5]]]
    assert prompts[3] == ["a " + 3 * "some text"]
    assert not any("n" in body and body["n"] != 1 for body in bodies)


def test_samples_are_shown_side_by_side(page: Any, server: Running) -> None:
    page.fill("#n", "3")
    page.fill("#seed", "7")
    write(page, tokens=30, temperature=1)
    finished_samples(page)
    assert page.locator("#text > .prompt").text_content() == "the quick"
    data = {"prompt": "the quick", "max_tokens": 30, "temperature": 1, "seed": 7, "n": 3}
    texts = answers(server, **data)
    assert [text_of(page, i) for i in range(3)] == texts
    boxes = [page.locator(".sample").nth(i).bounding_box() for i in range(3)]
    assert len({box["y"] for box in boxes}) == 1
    assert boxes[0]["x"] < boxes[1]["x"] < boxes[2]["x"]
    with page.expect_request("**/v1/completions") as sent:
        page.click("#continue")
    finished_samples(page)
    assert len(sent.value.post_data_json["prompt"]) == 3
    assert all(text_of(page, i).startswith(texts[i]) for i in range(3))
    page.set_viewport_size({"width": 390, "height": 844})
    boxes = [page.locator(".sample").nth(i).bounding_box() for i in range(3)]
    assert boxes[0]["y"] < boxes[1]["y"] < boxes[2]["y"]
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("width", [390, 1280])
def test_sampling_panel_opens_by_mouse_and_keyboard(visit: Any, server: Running, width: int) -> None:
    page = visit(server.url, viewport={"width": width, "height": 844})
    field, title = page.locator("#temperature"), page.locator("#sampling summary")
    if width < 900:
        expect(field).to_be_hidden()
        title.click()
    expect(field).to_be_visible()
    title.click()
    expect(field).to_be_hidden()
    title.click()
    expect(field).to_be_visible()
    for key in ("Enter", "Space"):
        title.press(key)
        expect(field).to_be_hidden()
        title.press(key)
        expect(field).to_be_visible()


def test_stop_strings_and_escapes_are_sent(page: Any) -> None:
    page.fill("#stop_strings", "END\n\\n\\n")
    page.fill("#seed", "3")
    with page.expect_request("**/v1/completions") as sent:
        write(page, tokens=5, temperature=0.7)
    body = sent.value.post_data_json
    assert body["stop"] == ["END", "\n\n"]
    assert (body["seed"], body["temperature"], body["top_k"], body["max_tokens"]) == (3, 0.7, 0, 5)
    finished(page)


def test_errors_are_one_clear_line(page: Any) -> None:
    write(page, prompt="the quick " * 1500)
    expect(page.locator("#error")).to_have_text(re.compile("2,?000"))
    assert page.inner_text("#status") == ""
    write(page, temperature=-1)
    expect(page.locator("#error")).to_have_text(re.compile("^Temperature: "))
    assert page.evaluate("document.activeElement.id") == "temperature"
    write(page, tokens=4000)
    expect(page.locator("#error")).to_have_text(re.compile("^Max new tokens: "))
    page.route("**/v1/completions", lambda route: route.abort())
    write(page)
    expect(page.locator("#error")).to_have_text("The server can't be reached.")
    page.unroute("**/v1/completions")
    page.route("**/v1/completions", lambda route: route.fulfill(status=502, body="<html>no</html>"))
    write(page)
    expect(page.locator("#error")).to_have_text(re.compile("^The server returned 502"))
    page.unroute("**/v1/completions")
    write(page)
    finished(page)
    assert page.inner_text("#error") == ""


def test_keyboard_alone(page: Any) -> None:
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type("the quick")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "generate"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    finished(page)
    assert page.evaluate("document.activeElement.id") == "generate", "focus stays where it was"
    order = []
    for _ in range(12):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert order[:2] == ["stop", "continue"]
    fields = ["temperature", "max_tokens", "n", "top_p", "top_k", "seed", "stop_strings", "copy", "text"]
    assert [name for name in order if name in fields] == fields
    page.locator("#max_tokens").focus()
    page.keyboard.press("Control+a")
    page.keyboard.type("3000")
    for keys in ("Control+Shift+Enter", "Control+Enter"):
        start_by_keyboard(page, keys)
        page.keyboard.press("Escape")
        expect(page.locator("#status")).to_have_text(re.compile("^Stopped"))


def start_by_keyboard(page: Any, keys: str) -> None:
    """Press keys until a completion is generated that does not end at once, as a random sample may."""
    status = page.locator("#status")
    for _ in range(5):
        page.keyboard.press(keys)
        expect(status).to_have_text(re.compile("^(Generating|Finished)"), timeout=WAIT)
        if status.inner_text().startswith("Generating"):
            return
    pytest.fail("five completions ended with their first tokens")


def test_every_control_has_an_accessible_name(page: Any) -> None:
    names = (
        "Prompt",
        "Completion",
        "Chat",
        "Temperature",
        "Max new tokens",
        "Samples",
        "Top-p",
        "Top-k",
        "Seed",
        "Stop strings",
    )
    for name in names:
        assert page.get_by_label(name, exact=True).count() == 1, name
    for name in ("Generate", "Stop", "Continue", "Copy"):
        assert page.get_by_role("button", name=name, exact=True).count() == 1, name
    assert page.get_by_role("region", name="Output").count() >= 1
    assert page.get_by_role("status").count() == page.get_by_role("alert").count() == 1
    assert page.get_by_role("img").count() == 1


def pixels(page: Any, name: str) -> int:
    """Count the pixels of the plot that are close to a colour of the page."""
    return int(
        page.evaluate(
            """name => {
            const canvas = document.getElementById("plot");
            const probe = document.createElement("i");
            document.body.append(probe);
            probe.style.color = getComputedStyle(document.documentElement).getPropertyValue("--" + name);
            const [r, g, b] = getComputedStyle(probe).color.match(/[\\d.]+/g).map(Number);
            probe.remove();
            const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            let found = 0;
            for (let i = 0; i < data.length; i += 4) {
                const off = Math.abs(data[i] - r) + Math.abs(data[i + 1] - g) + Math.abs(data[i + 2] - b);
                if (off < 30 && data[i + 3] > 40) found += 1;
            }
            return found;
        }""",
            name,
        )
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_plot_has_points_and_their_median(visit: Any, server: Running, scheme: str) -> None:
    page = visit(server.url, color_scheme=scheme)
    expect(page.locator("#model")).to_have_text("tiny")
    assert pixels(page, "point") == 0
    write(page, tokens=200)
    finished(page)
    assert pixels(page, "point") > 300
    assert pixels(page, "accent") > 50
    assert re.search(r"First 100: [\d.]+ ms, last 100: [\d.]+ ms", page.inner_text("#plot-summary"))
    # A change of the colour scheme redraws the plot at once.
    before = page.locator("#plot").screenshot()
    page.emulate_media(color_scheme="dark" if scheme == "light" else "light")
    page.wait_for_timeout(200)
    assert pixels(page, "point") > 300
    assert page.locator("#plot").screenshot() != before


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_scrolls_sideways_nor_moves(visit: Any, server: Running, width: int) -> None:
    page = visit(server.url, viewport={"width": width, "height": 844})
    expect(page.locator("#model")).to_have_text("tiny")
    page.evaluate("document.getElementById('sampling').open = true")
    page.wait_for_timeout(200)
    page.evaluate(
        """() => {
        window.shifts = [];
        new PerformanceObserver((list) => window.shifts.push(...list.getEntries().map((e) => e.value)))
            .observe({type: "layout-shift"});
    }"""
    )
    write(page, prompt="longwordwithoutaspace" * 20, tokens=300)
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(
        "[...document.querySelectorAll('main > *')].every(e => e.scrollWidth <= e.clientWidth)"
    )
    assert sum(page.evaluate("window.shifts")) < 0.001


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_both_schemes(visit: Any, server: Running, scheme: str) -> None:
    page = visit(server.url, color_scheme=scheme)
    for selector in ("#text", ".hint", "#generate", "h1", "#status", ".legend .prompt", "#prompt"):
        colours = page.locator(selector).first.evaluate(
            """e => {
            const colour = getComputedStyle(e).color;
            while (getComputedStyle(e).backgroundColor === "rgba(0, 0, 0, 0)") e = e.parentElement;
            return [colour, getComputedStyle(e).backgroundColor];
        }"""
        )
        bright, dim = sorted(map(luminance, colours), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 4.5, selector


def luminance(colour: str) -> float:
    """Return the relative luminance, as WCAG 2 defines it."""
    channels = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_key_is_requested_and_kept_in_the_tab(visit: Any, generator: TextGenerator) -> None:
    with run_server(generator, key="secret") as locked:
        page = visit(locked.url)
        field = page.get_by_label("API key", exact=True)
        expect(field).to_be_focused()
        field.fill("wrong")
        field.press("Enter")
        expect(page.locator("#error")).to_have_text(re.compile("API key"))
        expect(field).to_be_focused()
        field.fill("secret")
        field.press("Enter")
        expect(page.locator("#model")).to_have_text("tiny")
        expect(field).to_be_hidden()
        write(page)
        finished(page)
        page.reload()
        expect(page.locator("#model")).to_have_text("tiny")
        expect(field).to_be_hidden()
        assert "secret" not in json.dumps(page.evaluate("({...localStorage})"))


def test_no_key_is_requested_where_none_is_needed(page: Any) -> None:
    expect(page.get_by_label("API key", exact=True)).to_be_hidden()


def test_settings_are_kept_in_the_browser(page: Any) -> None:
    page.fill("#top_k", "17")
    page.fill("#stop_strings", "}")
    page.locator("#stop_strings").blur()
    page.reload()
    expect(page.locator("#top_k")).to_have_value("17")
    expect(page.locator("#stop_strings")).to_have_value("}")
    page.evaluate("localStorage.setItem('tnnlm.sampling', '{broken')")
    page.reload()
    expect(page.locator("#model")).to_have_text("tiny")
    expect(page.locator("#top_k")).to_have_value("0")


def test_page_allows_nothing_from_elsewhere_nor_inline() -> None:
    assert {path.name for path in PAGE.iterdir()} == {"index.html", *PARTS}
    for name in ("index.html", *PARTS):
        text = (PAGE / name).read_text(encoding="utf-8")
        assert not re.search(r"https?://|\bstyle=|\son\w+=|innerHTML|insertAdjacentHTML|eval\(", text), name


@contextmanager
def odd_server(stream: bytes | Callable[[str, dict[str, Any]], bytes], piece: int = 1 << 20) -> Iterator[str]:
    """Run a server that answers with ``stream``, ``piece`` bytes at a time, and then disconnects.

    A function returns the answer to a path and a body.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(200)
            name = FILES.get(self.path)
            body = json.dumps({"data": [CARD]}).encode()
            if name:
                body = (PAGE / name).read_bytes()
            kind = KINDS[name.split(".")[1]] if name else "application/json"
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = stream if isinstance(stream, bytes) else stream(self.path, body)
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for start in range(0, len(answer), piece):
                part = answer[start : start + piece]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


DONE = b"data: [DONE]\n\n"


def event(text: str, position: int, finish: str | None = None, **fields: Any) -> bytes:
    steps = [2.5] if position > 5 else []
    data = {
        "choices": [{"index": 0, "text": text, "finish_reason": finish, **fields}],
        "tnnlm": {"position": position, "step_ms": steps},
    }
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


STRANGE = [
    "naïve ",
    "😀漢字",
    "<b>bold</b><script>window.harm = 1</script>",
    "\n\n  data: [DONE]\n",
    "&amp; end",
]


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_stream_split_anywhere_is_parsed_correctly(visit: Any, piece: int, newline: bytes) -> None:
    events = [event(text, 5 + i) for i, text in enumerate(STRANGE)]
    usage = b'data: {"choices": [], "usage": {"completion_tokens": 5}}\n\n'
    stream = b": a comment\n\n" + b"".join(events) + event("", 9, "stop") + usage + b"data: [DONE]\n\n"
    with odd_server(stream.replace(b"\n", newline), piece) as url:
        page = visit(url)
        expect(page.locator("#about")).to_have_text("24.1M parameters · packed")
        expect(page.locator("#state")).to_have_text("552")
        write(page, prompt="é<i>")
        expect(page.locator("#status")).to_have_text(re.compile(r"^Finished \(stop\): 5 tokens in "))
        assert text_of(page) == "é<i>" + "".join(STRANGE)
        assert page.locator("#text b, #text i, #text script").count() == 0
        assert page.evaluate("window.harm") is None


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (b"", "The connection was lost."),
        (b'data: {"error": {"message": "out of memory"}}\n\n', "out of memory"),
    ],
)
def test_stream_that_fails_keeps_its_text(visit: Any, last: bytes, message: str) -> None:
    with odd_server(event("some ", 5) + event("text", 6) + last, 50) as url:
        page = visit(url)
        expect(page.locator("#model")).to_have_text("fake")
        write(page, prompt="a ")
        expect(page.locator("#error")).to_have_text(message)
        assert text_of(page) == "a some text"
        expect(page.locator("#continue")).to_have_attribute("aria-disabled", "false")


def test_long_text_is_laid_out_in_blocks_and_stays_complete(visit: Any) -> None:
    lines = [f"line {i} of a long text\n" for i in range(3000)]
    stream = b"".join(event(line, 5 + i) for i, line in enumerate(lines))
    with odd_server(stream + event("", 4000, "length") + b"data: [DONE]\n\n", 999) as url:
        page = visit(url)
        expect(page.locator("#model")).to_have_text("fake")
        write(page, prompt="a")
        finished(page)
        assert text_of(page) == "a" + "".join(lines)
        assert page.locator(".blocks > div").count() > 3


# ---- chat --------------------------------------------------------------------------------------


class FakeChat:
    """Chat endpoint that answers each message with its number, and reports all but the last as kept."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []

    def __call__(self, path: str, body: dict[str, Any]) -> bytes:
        assert path == "/v1/chat/completions"
        self.bodies.append(body)
        said = [message["content"] for message in body["messages"]]
        if said[-1] == "fail":
            return b'data: {"error": {"message": "out of memory"}}\n\n'
        stream = b""
        for i in range(body["n"]):
            stream += self.chunk(i, {"role": "assistant", "content": ""})
            stream += self.chunk(i, {"content": f"answer {len(said)}"}) + self.chunk(i, {"content": f"-{i}"})
            stream += self.chunk(i, {}, "stop")
        usage = {"prompt_tokens": 10 * len(said), "completion_tokens": 2, "total_tokens": 10 * len(said) + 2}
        usage["prompt_tokens_details"] = {"cached_tokens": 10 * (len(said) - 1)}  # type: ignore[assignment]
        return stream + b"data: %s\n\n" % json.dumps({"choices": [], "usage": usage}).encode() + DONE

    def chunk(self, index: int, delta: dict[str, str], finish: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "finish_reason": finish}
        data = {"object": "chat.completion.chunk", "choices": [choice]}
        return b"data: %s\n\n" % json.dumps(data).encode()


def say(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    finished(page)


def test_chat_sends_the_whole_conversation_and_shows_what_was_read(visit: Any) -> None:
    chat = FakeChat()
    with odd_server(chat) as url:
        page = visit(url)
        page.get_by_label("Chat", exact=True).check()
        page.get_by_label("Message", exact=True).fill("first")
        page.press("#prompt", "Shift+Enter")
        page.keyboard.type("line")
        page.press("#prompt", "Enter")
        finished(page)
        expect(page.locator("#prompt")).to_have_value("")
        say(page, "<b>second</b>")
    user = {"role": "user", "content": "first\nline"}
    answer = {"role": "assistant", "content": "answer 1-0"}
    assert chat.bodies[0]["messages"] == [user]
    assert chat.bodies[1]["messages"] == [user, answer, {"role": "user", "content": "<b>second</b>"}]
    assert page.locator("#text b").count() == 0
    turns = page.locator(".turn").all_inner_texts()
    assert [turn.split("\n")[0] for turn in turns] == ["You", "fake", "You", "fake"]
    assert "answer 1-0" in turns[1]
    assert "answer 3-0" in turns[3]
    assert "10 of 30 prompt tokens read, 20 kept" in turns[3]
    expect(page.locator("#context")).to_have_text("32")


def test_chat_continues_with_the_answer_that_is_selected(visit: Any) -> None:
    chat = FakeChat()
    with odd_server(chat) as url:
        page = visit(f"{url}/#chat")
        page.fill("#n", "3")
        say(page, "first")
        page.get_by_label("Sample 2", exact=True).check()
        assert page.locator(".sample").count() == 3
        say(page, "second")
        assert chat.bodies[1]["messages"][1] == {"role": "assistant", "content": "answer 1-1"}
        assert page.locator(".turn").nth(1).locator(".sample").count() == 1, "the others are not kept"
        page.click("#reset")
        assert page.locator(".turn").count() == 0
        page.fill("#n", "1")
        say(page, "again")
        assert chat.bodies[2]["messages"] == [{"role": "user", "content": "again"}]


def test_chat_keeps_a_message_that_was_not_answered(visit: Any) -> None:
    chat = FakeChat()
    with odd_server(chat) as url:
        page = visit(f"{url}/#chat")
        say(page, "first")
        page.fill("#prompt", "fail")
        page.click("#generate")
        expect(page.locator("#error")).to_have_text("out of memory")
        expect(page.locator("#prompt")).to_have_value("fail")
        assert page.locator(".turn").count() == 2
        say(page, "second")
        assert [message["content"] for message in chat.bodies[2]["messages"]] == [
            "first",
            "answer 1-0",
            "second",
        ]


def test_chat_with_the_server(visit: Any, server: Running) -> None:
    page = visit(f"{server.url}/#chat")
    expect(page.locator("#template")).to_have_text("plain: lines of role: content")
    page.fill("#max_tokens", "8")
    page.fill("#temperature", "0")
    for message in ("the quick", "brown fox"):
        say(page, message)
    assert re.search(r"; \d+ of \d+ prompt tokens read, [1-9]\d* kept\.$", page.inner_text("#status"))
    assert page.locator(".turn").count() == 4
    assert int(page.inner_text("#context")) > 16


def test_each_view_keeps_what_it_shows(visit: Any, server: Running) -> None:
    page = visit(server.url)
    write(page, tokens=10)
    finished(page)
    text = text_of(page)
    page.get_by_label("Chat", exact=True).focus()
    page.keyboard.press("Space")
    expect(page.locator("#text-title")).to_have_text("Conversation")
    expect(page.locator("#continue")).to_be_hidden()
    assert page.locator("#text *").count() == 0
    assert page.url.endswith("/#chat")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#text-title")).to_have_text("Output")
    assert text_of(page) == text
    page.click("#continue")
    finished(page)
    assert text_of(page).startswith(text)
