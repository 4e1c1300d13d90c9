"""The page in a real browser, at phone and desktop widths."""

import pytest

from browsers import FLAGS, MISSING, chromium
from evaluate.bench_folder import build, rows_of, write
from retour.evaluate.report import report

pytestmark = pytest.mark.skipif(chromium() is None, reason=MISSING)
WIDTHS = {"phone": (390, 844), "desktop": (1440, 1000)}
HOSTILE = (
    "</script><script>document.title='taken'</script><img src=x onerror=document.title='taken'>"
)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = build(tmp_path_factory.mktemp("bench"), limit=14, steps=(10, 20))
    return report(folder).path.as_uri()


@pytest.fixture(params=WIDTHS)
def page(browser, url, request):
    """The page at one width; whatever the browser complains of fails the test."""
    yield from opened(browser, url, WIDTHS[request.param])


@pytest.fixture
def wide(browser, url):
    yield from opened(browser, url, WIDTHS["desktop"])


def opened(browser, url, size, **options):
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
    page, complaints, requests = context.new_page(), [], []
    page.set_default_timeout(10_000)
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(url)
    yield page
    context.close()
    assert complaints == []
    assert [r for r in requests if not r.startswith("data:")] == [url]


def seen(page):
    """Scroll to the pictures."""
    page.locator("#images").evaluate("(section) => section.scrollIntoView()")
    page.wait_for_selector(".card.filled")


def column(page, k):
    """Texts of one column, row by row."""
    return page.eval_on_selector_all(
        "#runs tbody tr",
        "(rows, k) => rows.map((r) => r.cells[k].querySelector('span').textContent)",
        k,
    )


def numbers(texts):
    return [float(t.replace("−", "-").replace("∞", "inf")) for t in texts if t != "n/a"]


def head(page, title):
    return page.get_by_role("columnheader").filter(has_text=title).get_by_role("button")


def test_the_page_is_never_wider_than_the_screen(page):
    for part in ("table", "compare", "plots", "images"):
        page.evaluate("(id) => document.getElementById(id).scrollIntoView()", part)
        page.wait_for_timeout(50)
        wide = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide[0] <= wide[1]
    page.click("#columns summary")
    boxes = page.locator("#columns fieldset").bounding_box()
    assert boxes["x"] >= 0 and boxes["x"] + boxes["width"] <= wide[1]
    # What is wider scrolls inside of its own box, with the names of the rows held in place.
    inner = page.evaluate(
        "(() => { const b = document.querySelector('#table .scroll'); "
        "b.scrollLeft = 80; return [b.scrollWidth, b.clientWidth]; })()"
    )
    if wide[1] == 390:
        assert inner[0] > inner[1]
        assert page.locator("#runs tbody .first").first.bounding_box()["x"] < 40


def test_a_click_sorts_best_first_and_the_next_one_turns_around(page):
    psnr, truth = head(page, "Background PSNR"), head(page, "Distance to truth")
    psnr.click()
    assert numbers(column(page, 1)) == sorted(numbers(column(page, 1)), reverse=True)
    sorts = page.locator("th[aria-sort]")
    assert sorts.count() == 1 and sorts.get_attribute("aria-sort") == "descending"
    truth.focus()
    page.keyboard.press("Enter")  # Lower is better.
    assert sorts.count() == 1 and sorts.get_attribute("aria-sort") == "ascending"
    k = page.evaluate("data.columns.findIndex((c) => c.key === 'truth_distance')") + 1
    assert numbers(column(page, k)) == sorted(numbers(column(page, k)))
    page.keyboard.press("Space")
    assert sorts.get_attribute("aria-sort") == "descending"
    assert numbers(column(page, k)) == sorted(numbers(column(page, k)), reverse=True)


def test_runs_sort_by_name(wide):
    head(wide, "Run").click()
    assert column(wide, 0) == sorted(column(wide, 0))


def test_a_kind_filters_every_section(page):
    whole = column(page, 1)
    dots = page.eval_on_selector_all(
        ".point", "(all) => all.map((p) => p.getAttribute('transform'))"
    )
    page.select_option("#kind", "add_object")
    assert column(page, 1) != whole
    wanted = page.evaluate(
        "data.cells.add_object.map((row) => figure(number(row[0].mean), data.columns[0].digits))"
    )
    assert column(page, 1) == wanted
    assert page.inner_text("#count") == "2 edits"
    kinds = page.eval_on_selector_all(".card .tag b", "(all) => all.map((b) => b.textContent)")
    assert kinds == ["add object"] * 2
    moved = page.eval_on_selector_all(
        ".point", "(all) => all.map((p) => p.getAttribute('transform'))"
    )
    assert len(moved) == len(dots) and moved != dots
    page.select_option("#kind", "")
    assert column(page, 1) == whole and page.inner_text("#count") == "14 edits"


def test_columns_are_chosen(wide):
    title = wide.locator("#runs thead th", has_text="NFE inversion")
    assert title.is_hidden()
    wide.click("#columns summary")
    wide.get_by_role("checkbox", name="NFE inversion").check()
    assert title.is_visible()
    wide.keyboard.press("Escape")
    assert wide.locator("#columns fieldset").is_hidden()


def test_stars_stand_where_the_interval_excludes_zero(wide):
    wide.select_option("#first", label="ddim+p2p-10")
    wide.select_option("#second", label="ddim+p2p-20")
    rows = wide.eval_on_selector_all(
        "#differences tbody tr",
        "(all) => all.map((r) => [...r.cells].map((c) => c.textContent))",
    )
    assert len(rows) == 5 and {"★" in row[3] for row in rows} == {True, False}
    for row in rows:
        low, high = numbers(row[5].replace("+", "").split(" to "))
        # Ends that print as zero may be on either side.
        if low and high:
            assert ("★" in row[3]) == (low > 0 or high < 0)
        assert (row[4] == "not told apart") == ("★" not in row[3])
    verdicts = [row[4] for row in rows]
    wide.click("#swap")
    swapped = wide.eval_on_selector_all(
        "#differences .verdict", "(all) => all.map((c) => c.textContent)"
    )[1:]
    turned = {"A is better": "B is better", "B is better": "A is better"}
    assert swapped == [turned.get(v, v) for v in verdicts]
    wide.select_option("#first", label="ddim+p2p-20")
    wide.select_option("#second", label="ddim+p2p-20")
    assert "two different runs" in wide.inner_text("#differences tbody")


def test_plots_show_every_run_on_the_axes_one_chooses(page):
    plots = page.locator(".plot")
    assert plots.count() == 2
    first = plots.first
    assert first.locator(".point").count() == 8
    title = first.locator(".point title").first.text_content()
    assert title.startswith("copy-input\nBackground PSNR: ∞ dB")
    assert first.locator(".hint").is_visible()  # The infinite point stands on the edge.
    first.get_by_label("Across").select_option(label="NFE")
    assert "NFE" in first.locator(".axis-name").first.text_content()
    assert first.locator(".hint").is_hidden()
    assert first.locator(".path").count() == 3  # Each pair's two step counts are joined.
    inside = page.evaluate(
        "[...document.querySelectorAll('.plot')].every((box) => [...box.querySelectorAll('.point')]"
        ".every((p) => p.getBoundingClientRect().right <= box.getBoundingClientRect().right))"
    )
    assert inside


def test_titles_of_axes_stay_within_their_plots(page):
    """However long a metric's name is, and however narrow the screen."""
    page.evaluate("data.columns.forEach((c) => (c.title += ', of the edited region alone'))")
    page.select_option("#kind", "add_object")
    outside = page.evaluate(
        "[...document.querySelectorAll('.plot svg')].flatMap((svg) => { "
        "const box = svg.getBoundingClientRect(); "
        "return [...svg.querySelectorAll('.axis-name')].map((t) => t.getBoundingClientRect())"
        ".filter((t) => t.top < box.top || t.bottom > box.bottom || t.right > box.right); })"
    )
    assert outside == []


def test_the_verdict_is_seen_without_scrolling(page):
    page.locator("#compare").evaluate("(section) => section.scrollIntoView()")
    boxes = [c.bounding_box() for c in page.locator("#differences td.verdict").all()]
    assert boxes and all(b["x"] + b["width"] <= page.viewport_size["width"] for b in boxes)


def test_points_differ_without_colour(wide):
    shapes = wide.eval_on_selector_all(
        ".plot:first-child .point",
        "(all) => all.map((p) => p.getAttribute('d') + p.getAttribute('fill'))",
    )
    assert len(set(shapes[2:])) == 3 and shapes[0] == shapes[1]
    named = wide.eval_on_selector_all(
        ".plot:first-child .name", "(all) => all.map((t) => t.textContent)"
    )
    assert len(named) >= 6


def test_pictures_come_when_they_are_seen(page):
    def filled():
        return page.locator(".card.filled").count()

    page.wait_for_timeout(200)
    assert filled() < 10 and page.locator(".card").count() == 14
    page.locator(".card").last.scroll_into_view_if_needed()
    page.wait_for_selector(".card.filled:last-child")
    sizes = page.eval_on_selector_all(
        ".card:last-child .shot:not([hidden]) img:first-child",
        "(all) => all.map((i) => i.naturalWidth)",
    )
    assert sizes == [64] * (2 + 7)  # The copied input is hidden at first.
    style = page.eval_on_selector(".card.filled img", "(i) => getComputedStyle(i).imageRendering")
    assert style == "pixelated"


def test_cards_are_sorted_by_a_metric_of_a_run(wide):
    wide.select_option("#sort-metric", "truth_distance")
    wide.select_option("#sort-run", label="direct+p2p-20")
    script = """() => { const run = data.runs.findIndex((r) => r.label === 'direct+p2p-20');
        const k = data.columns.findIndex((c) => c.key === 'truth_distance');
        const value = (card) => data.items[card.dataset.item].values[run][k];
        return [...document.querySelectorAll('.card')].map(value); }"""
    values = wide.evaluate(script)
    assert values == sorted(values, reverse=True) and len(values) == 14
    wide.select_option("#sort-order", "best")
    assert wide.evaluate(script) == sorted(values)
    seen(wide)
    shown = wide.locator(".card.filled .value").first.text_content()
    assert numbers([shown])


def test_masks_and_runs_are_switched(wide):
    seen(wide)
    mask = wide.locator(".card.filled .mask").first
    assert mask.is_hidden()
    about = wide.get_by_text("Inside the dashed line the edit may change")
    assert about.is_hidden()
    wide.check("#show-mask")
    assert mask.is_visible() and about.is_visible()
    shot = wide.locator(".card.filled figure", has_text="ddim+p2p-10").first
    assert shot.is_visible()
    wide.click("#shown-runs summary")
    wide.locator("#shown-runs").get_by_label("ddim+p2p-10").uncheck()
    assert shot.is_hidden()
    assert wide.locator("#show-attention").is_hidden()  # There is none in this folder.


def test_the_viewer_enlarges_and_walks_from_run_to_run(page):
    seen(page)
    page.locator(".card.filled figure button").nth(1).click()
    viewer = page.locator("dialog")
    assert viewer.is_visible()
    first = page.inner_text("#viewer-title")
    assert page.locator("#viewer-pictures img:not(.layer)").count() == 3
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#viewer-title") != first
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#viewer-title") == first
    box = viewer.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= page.viewport_size["width"]
    page.keyboard.press("Escape")
    assert viewer.is_hidden()


def test_the_command_is_copied(wide):
    wide.click("#copy")
    wide.wait_for_function("document.getElementById('copy').textContent !== 'Copy'")
    wide.evaluate("getSelection().removeAllRanges()")


def test_dark_follows_the_system(browser, url):
    grounds = {}
    for scheme in ("light", "dark"):
        for page in opened(browser, url, WIDTHS["phone"], color_scheme=scheme):
            grounds[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert grounds == {"light": "rgb(245, 246, 248)", "dark": "rgb(16, 19, 24)"}


def test_print_leaves_controls_out_and_says_what_is_cut(wide):
    wide.evaluate("dispatchEvent(new Event('beforeprint'))")
    wide.emulate_media(media="print")
    assert wide.locator(".bar").is_hidden() and wide.locator("#copy").is_hidden()
    assert wide.locator(".card:visible").count() == 12
    assert wide.inner_text("#print-note") == "The first 12 edits are printed."
    wide.evaluate("dispatchEvent(new Event('afterprint'))")
    wide.emulate_media(media="screen")
    assert wide.locator(".card").last.evaluate("(c) => getComputedStyle(c).display") == "block"


def test_the_table_stands_without_script(browser, url):
    for page in opened(browser, url, WIDTHS["phone"], java_script_enabled=False):
        assert page.locator("#runs tbody tr").count() == 8
        assert "Without JavaScript" in page.inner_text("header")


def test_hostile_text_is_shown_and_does_nothing(browser, tmp_path):
    folder = build(tmp_path, limit=2, prompts=(HOSTILE, f"{HOSTILE} b"), plan={"command": HOSTILE})
    texts = {"kind": HOSTILE, "split": HOSTILE, "editor": HOSTILE}
    write(folder, [{**row, **texts, "run": f"{row['run']} {HOSTILE}"} for row in rows_of(folder)])
    for page in opened(browser, report(folder).path.as_uri(), WIDTHS["desktop"]):
        seen(page)
        page.locator(".card.filled figure button").nth(1).click()
        page.wait_for_timeout(100)
        assert page.title() == "paired on emoji-unet: retour report"
        assert HOSTILE in page.locator(".card .prompts").first.text_content()
        assert page.text_content("#command") == HOSTILE
        assert HOSTILE in page.inner_text("#viewer-title")
