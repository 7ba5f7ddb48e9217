"""The pages in a real browser: they render, stay silent, sort, fit a phone and paper, and agree with report.json."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.predict.sample_predictions import sample_predictions
from tests.deploy.report.sample_report import sample_report
from tests.deploy.report.test_run_comparison import three_runs
from upvits.deploy.predict.views import save_page
from upvits.deploy.report.runs import compare_runs
from upvits.deploy.report.views import save_report
from upvits.deploy.report.views.runs import save_comparison

sync_api = pytest.importorskip("playwright.sync_api", reason="the Python package playwright is not installed")

ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PAGES = ("report.html", "comparison.html", "predictions.html")
PHONE, DESKTOP, PAPER = 390, 1280, 700


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next((path for path in map(shutil.which, BROWSERS) if path is not None), None)
    if found is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=found, args=list(ARGUMENTS))
        yield running
        running.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("run")
    save_report(made, sample_report())
    save_comparison(made / "comparison.html", compare_runs(three_runs()))
    save_page(made / "predictions.html", sample_predictions())
    return made


@pytest.fixture
def opened(browser: Any, folder: Path) -> Iterator[Callable[..., Any]]:
    """Opens a page in a window of its own; afterwards nothing was logged and nothing else was asked for."""
    contexts, heard, asked = [], [], set()

    def open_page(name: str = "report.html", width: int = DESKTOP, scheme: str = "light", **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
        context.set_default_timeout(10_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: heard.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("request", lambda request: asked.add(request.url.split("#")[0]))
        page.goto((folder / name).as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert heard == []
    assert {url for url in asked if not url.startswith("data:")} <= {(folder / name).as_uri() for name in PAGES}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_renders_silently_and_never_scrolls_sideways(
    opened: Callable[..., Any], name: str, width: int, scheme: str
) -> None:
    page = unfold(opened(name, width, scheme))
    assert page.locator("h1").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # nothing sticks out of the page except inside boxes that scroll on their own
    outside = page.evaluate(
        """(width) => [...document.querySelectorAll('main *')]
          .filter((e) => !e.closest('.table, .unseen') && e.getClientRects().length)
          .filter((e) => e.getBoundingClientRect().right > width + 1).map((e) => e.outerHTML.slice(0, 90))""",
        width,
    )
    assert outside == []


CONTRASTS = """() => {
  const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c[3] === 1) return c; }
  };
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.getClientRects().length || e.closest('script, style, title, desc, .unseen, .skip')) continue;
    const style = getComputedStyle(e);
    const [a, b] = [light(parse(e.closest('svg') ? style.fill : style.color)), light(behind(e))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), e.tagName + ' ' + e.textContent.trim().slice(0, 30)]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_all_text_can_be_read(opened: Callable[..., Any], name: str, scheme: str) -> None:
    found = unfold(opened(name, scheme=scheme)).evaluate(CONTRASTS)
    assert len(found) > 100
    assert [text for ratio, text in found if ratio < 4.5] == []


def test_light_and_dark_differ_and_the_button_changes_over(opened: Callable[..., Any]) -> None:
    def background(page: Any) -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    light, dark = opened(), opened(scheme="dark")
    before = background(light)
    assert before != background(dark)
    button = light.get_by_role("button", name="Use dark colours")
    button.focus()
    light.keyboard.press("Enter")
    assert background(light) == background(dark)
    light.get_by_role("button", name="Use light colours").click()
    assert background(light) == before


def unfold(page: Any) -> Any:
    """The page with all of its parts open."""
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    return page


def column(page: Any, section: str, number: int) -> list[str]:
    """Texts of one column of the first table of a section, from top to bottom."""
    rows = page.locator(f"table[data-section='{section}']").first.locator("tbody tr")
    return list(rows.evaluate_all("(rows, n) => rows.map((row) => row.cells[n].textContent.trim())", number))


def sort_button(page: Any, section: str, name: str) -> Any:
    return page.locator(f"table[data-section='{section}']").first.get_by_role("button", name=name, exact=True)


def test_tables_sort_by_number_by_text_and_by_keyboard(opened: Callable[..., Any]) -> None:
    page = unfold(opened())
    as_written = column(page, "latency", 3)
    button = sort_button(page, "latency", "dense ms")
    button.click()
    rising = [float(text) for text in column(page, "latency", 3)]
    assert rising == sorted(rising)
    assert rising != [float(text) for text in as_written]
    assert sorted(rising) != [float(text) for text in sorted(as_written)]  # by number, not by letter
    button.press("Enter")
    assert [float(text) for text in column(page, "latency", 3)] == rising[::-1]
    heads = page.locator("table[data-section='latency'] th[aria-sort]")
    assert (heads.count(), heads.first.get_attribute("aria-sort")) == (1, "descending")
    sort_button(page, "latency", "precision").press("Space")
    assert column(page, "latency", 1) == sorted(column(page, "latency", 1))
    assert (heads.count(), heads.first.inner_text().strip()) == (1, "precision")


def test_rows_stay_whole_and_empty_cells_stay_last(opened: Callable[..., Any]) -> None:
    page = opened()
    page.get_by_role("heading", name="Time per layer").click()
    page.locator("#chapter-layers details summary").first.click()
    table = page.locator("details details table[data-section='layers-0']")
    rows = table.locator("tbody tr")
    before = sorted(rows.all_inner_texts())
    for direction in ("ascending", "descending"):
        table.get_by_role("button", name="pruned ms", exact=True).click()
        assert table.locator(f"th[aria-sort='{direction}']").count() == 1
        assert rows.last.locator("th").inner_text() == "reformat of images"  # the pruned model does not have it
        assert sorted(rows.all_inner_texts()) == before


def test_the_page_shows_the_values_of_report_json(opened: Callable[..., Any], folder: Path) -> None:
    page = opened()
    written = json.loads((folder / "report.json").read_text())

    def shown(section: str) -> list[list[Any]]:
        rows = page.locator(f"table[data-section='{section}']").first.locator("tbody tr")
        read = "rows => rows.map((row) => [...row.cells].map((c) => c.dataset.value ?? c.textContent.trim()))"
        return list(rows.evaluate_all(read))

    for runtime, precision, batch, dense, pruned, faster, *_ in shown("latency"):
        for model, value in (("dense", dense), ("pruned", pruned)):
            assert float(value) == written[model]["latency_ms"][runtime][precision][f"b{batch}"]["median"]
        assert float(faster) == written["speedup"][runtime][precision][f"b{batch}"]
    assert len(shown("latency")) == 12
    result = {row[0]: row for row in shown("result")}
    assert [int(value) for value in result["parameters"][1:3]] == [written[m]["params"] for m in ("dense", "pruned")]
    assert [int(value) for value in result["MACs per image"][1:3]] == [written[m]["macs"] for m in ("dense", "pruned")]
    assert float(result["top-1 after pruning, %"][2]) == written["pruned"]["top1_after_prune"]
    for row, figures in zip(shown("accuracy"), written["accuracy"], strict=True):
        assert row[:3] == [figures["model"], figures["runtime"], figures["precision"]]
        assert [float(v) for v in row[3:7]] == [figures[k] for k in ("top1", "drop", "agreement", "sqnr_db")]
    for row, figures in zip(shown("engines"), written["engines"], strict=True):
        assert (int(row[4]), row[6]) == (figures["bytes"], figures["path"])
    for row, figures in zip(shown("best"), written["best"], strict=True):
        assert [float(v) for v in row[4:7]] == [figures[k] for k in ("dense_ms", "pruned_ms", "speedup")]
    tile = page.locator("[data-tile='faster']")
    assert float(tile.get_attribute("data-value")) == written["best"][1]["speedup"]
    points = page.locator("[data-choice]").evaluate_all("all => all.map((p) => [p.dataset.choice, p.dataset.ms])")
    for name, ms in points:
        model, runtime, precision = name.split(" ")
        assert float(ms) == written[model]["latency_ms"][runtime][precision]["b8"]["median"]


def test_charts_have_a_title_and_a_description(opened: Callable[..., Any]) -> None:
    images = unfold(opened()).locator("svg[role=img]")
    assert images.count() == 7  # accuracy over latency, two learning curves, two runtimes at two batch sizes
    for image in images.all():
        assert len(image.locator("> desc").text_content()) > 40
        assert image.locator("> title").text_content()
        box = image.bounding_box()
        assert box["width"] > 300
        assert box["height"] > 100


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_labels_in_charts_do_not_cover_each_other(opened: Callable[..., Any], width: int) -> None:
    covered = unfold(opened(width=width)).evaluate(
        """() => [...document.querySelectorAll('svg[role=img]')].flatMap((svg) => {
          const all = [...svg.querySelectorAll('text')].map((e) => [e.textContent, e.getBoundingClientRect()]);
          const cover = (p, q) => p.left < q.right - 1 && q.left < p.right - 1
            && p.top < q.bottom - 3 && q.top < p.bottom - 3;
          return all.flatMap(([a, p], i) => all.slice(i + 1).filter(([, q]) => cover(p, q)).map(([b]) => a + ' ' + b));
        })"""
    )
    assert covered == []


@pytest.mark.parametrize("name", PAGES)
def test_paper_is_white_whole_and_without_buttons(opened: Callable[..., Any], name: str) -> None:
    page = opened(name, PAPER, "dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("#theme").is_hidden()
    assert page.evaluate("document.documentElement.scrollWidth") <= PAPER
    cut = "all => all.filter((e) => e.scrollWidth > e.clientWidth + 1).length"
    assert page.locator(".table").evaluate_all(cut) == 0
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 0
    assert page.pdf().startswith(b"%PDF")


def test_a_phone_shows_the_main_table_whole(opened: Callable[..., Any]) -> None:
    box = unfold(opened(width=PHONE)).locator(".table:has(table[data-section='result'])")
    assert box.evaluate("(e) => e.scrollWidth - e.clientWidth") <= 0


def test_everything_can_be_read_without_scripts(opened: Callable[..., Any]) -> None:
    with_scripts, without = opened(), opened(java_script_enabled=False)
    assert without.locator("#theme").is_hidden()
    assert without.locator("button:visible").count() == 0
    assert with_scripts.locator("th button").count() > 50
    assert without.locator("tr").count() == with_scripts.locator("tr").count() > 150


def test_pictures_are_drawn_and_tables_fold_out_without_scripts(opened: Callable[..., Any]) -> None:
    page = opened(java_script_enabled=False)
    assert page.locator(".samples img").count() == 3
    assert [image.bounding_box()["width"] for image in page.locator(".samples img").all()] == [112, 112, 112]
    table = page.locator("table[data-section='result']")
    assert table.is_hidden()
    page.get_by_role("heading", name="Dense against pruned").click()
    assert table.is_visible()
    words = page.locator("details.terms").first
    words.get_by_text("What the words mean").click()
    assert words.get_by_text("The share of images whose right class").is_visible()


def test_pictures_decode_in_the_browser(opened: Callable[..., Any]) -> None:
    sizes = opened().locator(".samples img").evaluate_all("all => all.map((image) => image.naturalWidth)")
    assert sizes == [64, 64, 64]


def test_paper_shows_what_is_folded_without_scripts(opened: Callable[..., Any]) -> None:
    page = opened(width=PAPER, java_script_enabled=False)
    page.emulate_media(media="print")
    assert page.locator("table[data-section='result']").is_visible()
    assert page.locator("summary:visible").count() == page.locator(".fold > summary").count()


def test_values_stand_on_hover(opened: Callable[..., Any]) -> None:
    page = unfold(opened())
    told = page.locator("svg[role=img] g > title").all_text_contents()
    assert any("dense openvino fp32: 98.92 % (95 % interval " in text and "80 % of calls" in text for text in told)
    assert any(text == "epoch 3: 98.00 %" for text in told)
    assert any("int8 pruned: median" in text for text in told)


def test_the_keyboard_reaches_the_skip_link_first_and_scrolling_boxes(opened: Callable[..., Any]) -> None:
    page = opened(width=PHONE)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the result"
    assert page.locator(".table:not([tabindex='0'])").count() == 0
    assert page.locator(".table").evaluate_all(
        "all => all.every((e) => document.getElementById(e.getAttribute('aria-labelledby')))"
    )
