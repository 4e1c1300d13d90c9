"""The page from end to end, in a real browser against a real server on the embedded model."""

import base64
import io
import json
import os
import re
import signal
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from browsers import FLAGS, MISSING, chromium
from retour import cli

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
if chromium() is None:
    pytest.skip(MISSING, allow_module_level=True)

SECONDS = 60_000
STEPS = 3


@pytest.fixture(scope="module")
def server():
    from retour.ui.desk import Desk
    from retour.ui.drawing import limits
    from retour.ui.serve import Server

    with Server(Desk(longest=3, allowed=limits(0.5)), port=0) as running:
        yield running
    assert not running.folder.exists()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, server):
    """Opens the page as another visitor each time; nothing may go wrong unseen."""
    contexts, wrong, asked = [], [], []

    def come():
        context = browser.new_context(viewport={"width": 1440, "height": 1000})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(SECONDS)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("response", lambda r: wrong.append(r.url) if r.status >= 400 else None)
        page.on("request", lambda r: asked.append(r.url))
        page.goto(server.url)
        page.wait_for_selector("[data-sample=apple]")
        return page

    yield come
    for context in contexts:
        context.close()
    assert not wrong
    # Not even a font comes from elsewhere.
    assert all(url.startswith((server.url, "data:", "blob:")) for url in asked)


def pick(page, name="apple", steps=STEPS):
    page.click(f"[data-sample={name}]")
    page.wait_for_selector(f"#u-source img[alt='{name}.png']")
    page.locator("#u-steps input").fill(str(steps))


def edit(page):
    page.click("#u-run")
    page.wait_for_selector(".r-compare")
    page.wait_for_selector("#u-run")


def link(page, selector):
    """Content of a link that holds its file."""
    url = page.locator(selector).get_attribute("href")
    return base64.b64decode(url.partition(",")[2])


def test_upload_edit_see_and_make_it_again(visit, tmp_path, monkeypatch, server):
    page = visit()
    assert "Drop a picture here" in page.inner_text("#u-source")
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste("red", (16, 16, 48, 48))
    picture.save(tmp_path / "my square.png")
    page.set_input_files("#r-file", tmp_path / "my square.png")
    page.wait_for_selector("#u-source canvas")
    assert page.input_value("#u-before textarea") == ""
    page.fill("#u-before textarea", "a red square on a white background")
    page.fill("#u-after textarea", "a blue square on a white background")
    page.wait_for_selector("#u-words ins")
    assert page.inner_text("#u-words ins") == "blue" and page.inner_text("#u-words del") == "red"

    # Paint the left half, roughly; take an option and a seed of our own.
    page.click("button[data-tool=paint]")
    box = page.locator("#u-source canvas").bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 60, box["y"] + box["height"] - 60, steps=5)
    page.mouse.up()
    page.click("#u-options button")
    page.fill("[data-task=edit] [name=self_steps]", "0.3")
    page.locator("#u-steps input").fill(str(STEPS))
    page.locator("#u-seed input").fill("7")
    edit(page)
    page.locator(".r-compare input").fill("20")
    assert "--cut: 20%" in page.locator(".r-compare").get_attribute("style")

    # The download holds its record, and the copied script makes the very pixels.
    made = link(page, "a[download='my-square-1.png']")
    with Image.open(io.BytesIO(made)) as image:
        record, wanted = json.loads(image.info["retour"]), image.convert("RGB").tobytes()
    assert record["masked"] and record["inversion"]["seed"] == 7
    assert record["editor_options"]["self_steps"] in ("0.3", 0.3)
    monkeypatch.chdir(tmp_path)
    Path("my-square.png").write_bytes(link(page, "a[data-file=picture]"))
    Path("my-square-mask.png").write_bytes(link(page, "a[data-file=mask]"))
    exec(compile(page.locator(".r-code pre").first.text_content(), "copied", "exec"), {})
    with Image.open("edited.png") as image:
        assert image.convert("RGB").tobytes() == wanted
    page.click("[data-tab='1']")
    assert page.inner_text(".r-code:visible pre").startswith("retour edit my-square.png")
    assert list(server.folder.rglob("*.png")) == []


def test_history_shows_an_earlier_result(visit):
    page = visit()
    pick(page, "apple", steps=1)
    edit(page)
    page.fill("#u-after textarea", "a 3d render of a lemon on a sky blue background")
    edit(page)
    page.wait_for_selector("[data-result='2'][aria-current=true]")
    assert "lemon" in page.inner_text(".r-code:visible pre")
    page.click("[data-result='1']")
    page.wait_for_selector("[data-result='1'][aria-current=true]")
    assert "lemon" not in page.inner_text(".r-code:visible pre")


def draw(page, tool, *points):
    """Press, move and let go, in fractions of the picture."""
    if page.locator(f"button[data-tool={tool}]").get_attribute("aria-pressed") == "false":
        page.click(f"button[data-tool={tool}]")
    box = page.locator("#u-source canvas").bounding_box()
    for place, (across, down) in enumerate(points):
        page.mouse.move(box["x"] + across * box["width"], box["y"] + down * box["height"])
        if place == 0:
            page.mouse.down()
    page.mouse.up()


def asked(page):
    """What the page would send with the form."""
    return json.loads(page.evaluate("window.retour.gather('')[0]"))


def test_an_earlier_results_settings_come_back(visit):
    """Picture, drawing, prompts, methods, numbers and options; and the very pixels with them."""
    page = visit()
    pick(page, "apple", steps=2)
    draw(page, "paint", (0.2, 0.2), (0.8, 0.3), (0.4, 0.8))
    page.click("#u-options button")
    page.fill("[data-task=edit] [name=self_steps]", "0.3")
    page.locator("#u-guidance input").fill("2.5")
    edit(page)
    before = {name: page.input_value(f"#u-{name} textarea") for name in ("before", "after")}
    pick(page, "fish", steps=1)
    choose(page, "editor", "masactrl")
    page.wait_for_selector("[data-task=edit] [name=depth]")
    edit(page)
    page.click("[data-result='1']")
    page.wait_for_selector("[data-restore='1']")
    assert page.locator("#u-source img").get_attribute("alt") == "fish.png"  # Looked at, no more.
    page.click("[data-restore='1']")
    page.wait_for_selector("#u-source img[alt='apple.png']")
    page.wait_for_selector("[data-task=edit] [name=self_steps]")
    assert {n: page.input_value(f"#u-{n} textarea") for n in before} == before
    assert page.locator("#u-steps input").input_value() == "2"
    assert page.locator("#u-guidance input").input_value() == "2.5"
    page.wait_for_function("window.retour.gather('')[0].includes('image/png')")
    assert asked(page)["options"]["edit"] == {"self_steps": "0.3"}
    page.click("#u-run")
    page.wait_for_selector("[data-result='3'][aria-current=true]")
    first, third = (page.locator(f"[data-result='{n}'] img").get_attribute("src") for n in (1, 3))
    assert first == third


def test_a_drawing_belongs_to_its_picture(visit):
    """The framework keeps the canvas when the picture changes; what is on it must go."""
    page = visit()
    pick(page, "apple")
    draw(page, "paint", (0.2, 0.2), (0.8, 0.3))
    page.set_input_files("#r-file", {"name": "x.png", "mimeType": "image/png", "buffer": b"no"})
    page.wait_for_selector("#u-note .r-notice")
    assert asked(page)["mask"]  # A file that cannot be read changes nothing.
    assert page.locator("[data-sample][aria-current=true]").get_attribute("data-sample") == "apple"
    draw(page, "drag", (0.5, 0.5))
    assert page.inner_text("#u-source .r-told") == "Now click where it should go."
    draw(page, "drag", (0.6, 0.5))
    assert len(asked(page)["points"]) == 2
    page.click("#u-run")
    page.wait_for_selector("#u-said >> text='p2p' does not use drag points")
    pick(page, "cat")
    page.wait_for_function("!window.retour.gather('')[0].includes('image/png')")
    assert asked(page)["points"] == [] and page.locator("[data-clear]").is_hidden()


def drop(page, script):
    """Drop something on the page; whether the page took it, so that the browser does not."""
    event = "new DragEvent('drop', { dataTransfer: given, bubbles: true, cancelable: true })"
    return page.evaluate(
        f"() => {{ const given = new DataTransfer(); {script}; "
        f"return !document.querySelector('#u-source').dispatchEvent({event}); }}"
    )


def test_what_is_dropped_is_taken_or_refused_but_never_gone_to(visit):
    page = visit()
    assert drop(page, "given.setData('text/uri-list', 'https://example.com/a.png')")
    page.wait_for_selector("#u-note >> text=save the picture, then drop its file")
    assert not drop(page, "given.setData('text/plain', 'some words')")
    bytes_ = list(picture_file()["buffer"])
    assert drop(page, f"given.items.add(new File([new Uint8Array({bytes_})], 'teal.png'))")
    page.wait_for_selector("#u-source img[alt='teal.png']")
    page.wait_for_selector("#u-note .r-notice", state="detached")


def picture_file(size=(64, 64)):
    """What a file chooser is given."""
    buffer = io.BytesIO()
    Image.new("RGB", size, "teal").save(buffer, "PNG")
    return {"name": "x.png", "mimeType": "image/png", "buffer": buffer.getvalue()}


def test_a_picture_may_come_before_the_page_is_whole(visit):
    page = visit()
    page.wait_for_selector("#u-take", state="attached")
    page.evaluate("document.querySelector('#u-take').id = 'u-later'")
    page.set_input_files("#r-file", picture_file())
    page.wait_for_timeout(300)
    page.evaluate("document.querySelector('#u-later').id = 'u-take'")
    page.wait_for_selector("#u-source canvas")


@pytest.mark.parametrize("width", [1440, 700, 390])
@pytest.mark.parametrize("size", [(60, 240), (240, 60), (64, 64)])
def test_no_picture_is_stretched(visit, size, width):
    page = visit()
    page.set_viewport_size({"width": width, "height": 900})
    page.set_input_files("#r-file", picture_file(size))
    page.wait_for_selector("#u-source canvas")
    shown = page.locator("#u-source .r-frame img").bounding_box()
    assert shown["width"] / shown["height"] == pytest.approx(size[0] / size[1], rel=0.03)
    assert shown["height"] <= 640 and page.evaluate("document.documentElement.scrollWidth") <= width


def test_what_was_typed_for_one_method_is_not_sent_for_another(visit):
    page = visit()
    page.click("#u-options button")
    page.wait_for_selector("[data-task=edit] [name=self_steps]")
    for field in page.locator("[data-task=edit] input").all():
        field.fill("0.123")
    choose(page, "inverter", "ddim")
    page.wait_for_function("document.querySelector('#u-inverter input').value.startsWith('ddim')")
    page.wait_for_selector("[data-task=invert][data-made=ddim]")
    assert len(asked(page)["options"]["edit"]) > 3  # The same editor's stay.
    choose(page, "editor", "masactrl")
    page.wait_for_selector("[data-task=edit][data-made=masactrl]")
    page.wait_for_selector("[data-task=invert][data-made=direct]")
    nothing = "JSON.stringify(JSON.parse(window.retour.gather('')[0]).options.edit) === '{}'"
    page.wait_for_function(nothing)
    assert asked(page)["options"] == {"edit": {}, "invert": {}}


def test_an_error_leaves_the_last_result_where_it_is(visit):
    page = visit()
    pick(page, "rose", steps=1)
    edit(page)
    page.locator(".r-compare input").fill("20")
    for number, says in (("0", "Steps is 0: choose"), ("", "Steps is empty: give a number")):
        page.locator("#u-steps input").fill(number)
        page.click("#u-run")
        page.wait_for_selector(f"#u-said >> text={says}")
    assert page.locator(".r-compare input").input_value() == "20"
    page.locator("#u-steps input").fill("250")
    page.focus("#u-run")
    page.keyboard.press("Enter")
    page.wait_for_selector(".r-busy [role=progressbar]")
    page.wait_for_function("document.activeElement.id === 'u-stop'")  # The keyboard goes on.
    page.keyboard.press("Enter")
    page.wait_for_selector("#u-said >> text=Stopped.")
    assert page.locator(".r-compare").count() == 1
    page.wait_for_function("document.activeElement.id === 'u-run'")


def test_another_picture_meanwhile_keeps_its_own_prompts(visit):
    """A guess that a job made fills in the prompt of the job's picture only."""
    page = visit()
    pick(page, "house", steps=40)
    page.fill("#u-before textarea", "")
    page.click("#u-run")
    page.wait_for_selector(".r-busy")
    page.click("[data-sample=ghost]")
    page.wait_for_selector("#u-source img[alt='ghost.png']")
    page.wait_for_selector(".r-compare")
    assert "ghost" in page.input_value("#u-before textarea")


def test_the_page_can_be_used_by_keyboard_and_read_aloud(visit):
    page = visit()
    pick(page, "star", steps=1)
    assert page.locator("h1").inner_text() == "retour"
    edit(page)
    page.focus("[data-tab='0']")
    page.keyboard.press("ArrowRight")
    assert page.locator("[role=tab][aria-selected=true]").inner_text() == "Command line"
    assert page.inner_text("[role=tabpanel]:visible pre").startswith("retour edit")
    nameless = page.evaluate(
        """[...document.querySelectorAll('button, input, select, textarea, a[href]')]
        .filter((e) => e.offsetParent && !e.ariaLabel && !e.textContent.trim() && !e.title)
        .filter((e) => !(e.labels && e.labels.length))
        .map((e) => e.outerHTML.slice(0, 120))"""
    )
    assert nameless == []


def test_cancel_stops_within_a_step(visit, server):
    page = visit()
    pick(page, "cat", steps=250)
    page.click("#u-run")
    page.wait_for_selector("text=/Going back to noise: step [0-9]+ of 250/")
    page.wait_for_selector(".r-busy img[src^='data:image/webp']")
    [ticket] = [r.ticket for r in server.desk.rooms._rooms.values() if r.busy]
    page.click("#u-stop")
    page.wait_for_selector("text=Stopped.")
    assert ticket.done and not page.locator(".r-compare").count()
    page.locator("#u-steps input").fill("1")
    edit(page)


def test_closing_the_tab_stops_its_job(visit, server):
    page = visit()
    pick(page, "rose", steps=250)
    page.click("#u-run")
    page.wait_for_selector("text=/step [0-9]+ of 250/")
    [ticket] = [r.ticket for r in server.desk.rooms._rooms.values() if r.busy]
    page.close()
    assert ticket._done.wait(30) and ticket.token.cancelled


def test_bad_files_get_one_sentence(visit, tmp_path):
    page = visit()
    (tmp_path / "notes.png").write_text("hello")
    page.set_input_files("#r-file", tmp_path / "notes.png")
    page.wait_for_selector("#u-note .r-notice")
    assert page.inner_text("#u-note .r-notice").startswith("'notes.png' is not a picture")
    (tmp_path / "large.png").write_bytes(bytes(600_000))
    page.set_input_files("#r-file", tmp_path / "large.png")
    page.wait_for_selector("text=make it smaller first, at most 524,288")
    Image.new("1", (13_000, 2)).save(tmp_path / "wide.png")
    page.set_input_files("#r-file", tmp_path / "wide.png")
    page.wait_for_selector("text=is 13,000 x 2 pixels")
    page.click("#u-run")
    page.wait_for_selector("#u-said >> text=There is no picture yet")


def test_two_visitors_at_once_do_not_mix(visit):
    one, other = visit(), visit()
    pick(one, "apple", steps=250)
    pick(other, "balloon")
    one.click("#u-run")
    one.wait_for_selector("text=/step [0-9]+ of 250/")
    other.click("#u-run")
    other.wait_for_selector("text=In the queue: 1 job before yours")
    one.click("#u-stop")
    one.wait_for_selector("text=Stopped.")
    other.wait_for_selector(".r-compare")
    assert not one.locator(".r-compare, [data-result]").count()
    one.locator("#u-steps input").fill("1")
    edit(one)
    for page, name in ((one, "apple"), (other, "balloon")):
        assert page.locator("[data-result]").count() == 1
        assert f"'{name}.png'" in page.inner_text(".r-code:visible pre")
        assert f"{name}.png" in page.locator("a[data-file=picture]").get_attribute("download")


def test_menus_follow_model_and_editor_and_points_are_dragged(visit):
    page = visit()
    pick(page, "star", steps=2)
    assert "joint-attention" in page.locator("#u-editor-facts .r-refused").text_content()
    choose(page, "model", "emoji-mmdit")
    page.wait_for_function("document.querySelector('#u-steps input').value === '20'")
    choose(page, "editor", "lazydrag")
    page.wait_for_function("document.querySelector('#u-inverter input').value.startsWith('uniinv')")
    assert page.locator("#u-guidance input").input_value() == "1"
    page.locator("#u-steps input").fill("2")
    page.click("#u-run")
    page.wait_for_selector("text=pick the drag tool")
    page.click("button[data-tool=drag]")
    box = page.locator("#u-source canvas").bounding_box()
    for across, down in ((0.5, 0.5), (0.75, 0.5)):
        page.mouse.click(box["x"] + across * box["width"], box["y"] + down * box["height"])
    edit(page)
    page.click("[data-tab='1']")
    assert "--from 32,32 --to 48,32" in page.inner_text(".r-code:visible pre")


def choose(page, menu, name):
    page.click(f"#u-{menu} input")
    page.fill(f"#u-{menu} input", name)
    page.locator("[role=option]").filter(has_text=re.compile(f"{name}(:|$)")).first.click()


def test_a_guess_can_be_asked_for(visit):
    page = visit()
    pick(page, "fish")
    page.fill("#u-before textarea", "")
    page.click("#u-guess")
    page.wait_for_function("document.querySelector('#u-before textarea').value.length > 10")


@pytest.mark.parametrize(
    "path",
    [
        "gradio_api/file=/etc/passwd",
        "gradio_api/file=../../../../etc/passwd",
        "gradio_api/file=/proc/self/environ",
        "file=/etc/passwd",
        "static/../../../../../etc/passwd",
        "assets/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "gradio_api/file=https://example.com/",
        "gradio_api/upload",
    ],
)
def test_no_other_file_can_be_read(path, server):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(server.url + path, timeout=20)
    assert refused.value.code in (403, 404, 405)
    assert b"root:" not in refused.value.read()


def test_the_framework_behind_the_guard_refuses_too(server):
    """Were the guard to fail, the server's own settings still keep every file."""
    blocks = server._blocks
    assert blocks.allowed_paths == [] and blocks.blocked_paths == [os.path.abspath(os.sep)]
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert blocks.share is False and blocks.server_name == "127.0.0.1"


@pytest.mark.parametrize("path", ["https://example.com/a.png", "/etc/passwd"])
def test_nothing_is_fetched_for_a_visitor(path, server, monkeypatch):
    """An object that poses as a file has the framework fetch its address, or copy its path."""
    from gradio import processing_utils

    fetched = []

    async def fetch(url, **more):
        fetched.append(url)
        raise OSError("nothing is there")

    monkeypatch.setattr(processing_utils, "async_ssrf_protected_download", fetch)
    file = {"path": path, "url": path, "meta": {"_type": "gradio.FileData"}}
    for data in (file, [file], {"a": file}):
        visit = {"data": [data], "fn_index": 0, "session_hash": "stranger"}
        asked = urllib.request.Request(
            server.url + "gradio_api/queue/join", json.dumps(visit).encode(),
            {"content-type": "application/json"},
        )  # fmt: skip
        urllib.request.urlopen(asked, timeout=20).close()
        told = server.url + "gradio_api/queue/data?session_hash=stranger"
        with urllib.request.urlopen(told, timeout=20) as lines:
            ended = next(line for line in lines if b"process_completed" in line)
        assert b'"success":false' in ended.replace(b" ", b"")
    assert fetched == [] and list(server.folder.rglob("*.*")) == []


def test_a_page_that_others_reach_says_so(caplog):
    from retour.ui.desk import Desk
    from retour.ui.serve import Server

    with Server(Desk(), host="0.0.0.0", port=0) as running:
        assert running.url.startswith("http://127.0.0.1:")
    assert "whoever reaches this machine" in caplog.text and "no password" in caplog.text


def test_a_taken_port_is_said(server, capsys):
    assert cli.run(["ui", "--port", str(server.port)]) == 2
    assert "choose another --port" in capsys.readouterr().err


def test_without_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.run(["ui"]) == 2
    assert 'pip install "retour[ui]"' in capsys.readouterr().err


def test_an_older_framework_is_refused(monkeypatch, capsys):
    import gradio

    monkeypatch.setattr(gradio, "__version__", "6.5.1")
    assert cli.run(["ui"]) == 2
    assert "needs gradio 6.31 or newer, and 6.5.1 is installed" in capsys.readouterr().err


def test_a_wrong_model_is_said_at_the_start(capsys):
    assert cli.run(["ui", "--model", "emoji-unett"]) == 2
    assert "did you mean 'emoji-unet'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signals_end_it_and_leave_no_files(name, server, monkeypatch, capsys):
    """A second page, of the command line's own, is asked for once and then told to end."""
    seen = []

    def wait(running):
        with urllib.request.urlopen(running.url, timeout=30) as answer:
            seen.append((answer.status, running.folder, running.folder.is_dir()))
        signal.raise_signal(getattr(signal, name))

    monkeypatch.setattr("retour.ui.serve.Server.wait", wait)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.run(["ui", "--port", "0"]) == 130
    [(status, folder, was)] = seen
    assert status == 200 and was and not folder.exists()
    assert "retour is at http://127.0.0.1:" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
