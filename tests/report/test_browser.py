"""The report of a network that was really compressed, in a real browser."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from convpare.report import Network, Report, render
from convpare.report.network import Sheet

DESKTOP, PHONE = (1280, 900), (390, 844)


@dataclass
class Opened:
    """A page, with what it said on the console, what went wrong, and what it asked for."""

    page: Page
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def open_page(browser: Browser) -> Iterator:
    contexts = []

    def open_(path: Path, size: tuple[int, int] = DESKTOP, scheme: str = "light") -> Opened:
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
        contexts.append(context)
        opened = Opened(context.new_page())
        opened.page.on("console", lambda message: opened.said.append(message.text))
        opened.page.on("pageerror", lambda error: opened.said.append(str(error)))
        opened.page.on("request", lambda request: opened.asked.append(request.url))
        opened.page.goto(path.as_uri())
        return opened

    yield open_
    for context in contexts:
        context.close()


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_is_there_and_nothing_is_asked_for(made, open_page, size, scheme):
    opened = open_page(made.page, size, scheme)
    page = opened.page
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith("data:image/png")] == [made.page.as_uri()]
    network = Network.from_json(json.loads((made.artifact / "plan.json").read_text())["origin"]["network"])
    assert page.locator(".tile").count() == len(network.layers) == page.locator(".sheet").count() == 8
    assert page.locator(".spectrum").count() == sum(len(sheet.spectra) for sheet in network.layers)
    assert page.locator(".dot").count() == 12  # the network as it is, ten plans, and the one that was taken
    assert page.locator(".trio .gone img").count() > 0
    widths = "[...document.images].map(image => image.complete && image.naturalWidth > 0)"
    assert all(page.evaluate(widths))
    assert page.evaluate("document.documentElement.scrollWidth") == size[0]
    page.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") == size[0]


def test_tiles_have_the_area_of_their_macs(made, open_page):
    page = open_page(made.page).page
    network = Network.from_json(json.loads((made.artifact / "plan.json").read_text())["origin"]["network"])
    largest = max(range(len(network.layers)), key=lambda n: network.layers[n].macs)
    whole = page.locator(f"#tile{largest} > i").bounding_box()
    for number, sheet in enumerate(network.layers):
        box = page.locator(f"#tile{number} > i").bounding_box()
        left = page.locator(f"#tile{number} > i > i").bounding_box()
        if box["width"] > 5.5:  # smaller ones are drawn at the least size that can be seen
            share = sheet.macs / network.layers[largest].macs
            assert box["width"] * box["height"] == pytest.approx(share * whole["width"] * whole["height"], rel=0.02)
        left_over = left["width"] * left["height"] / (box["width"] * box["height"])
        assert left_over == pytest.approx(sheet.macs_after / sheet.macs, abs=0.02)


def test_pointer_click_and_keys(made, open_page):
    opened = open_page(made.page)
    page = opened.page
    tip, shown = page.locator("#tip"), page.locator(".sheet:visible")
    assert not tip.is_visible()
    page.hover("#tile2")
    assert tip.is_visible()
    assert tip.inner_text().splitlines()[0] == "block1.conv2"
    assert re.search(r"→ .* MACs \(\d+\s%\)", tip.inner_text())
    page.click("#tile2")
    assert (shown.count(), shown.locator("h3").inner_text()) == (1, "block1.conv2")
    assert page.get_attribute("#tile2", "aria-pressed") == "true"
    page.mouse.move(0, 0)
    assert not tip.is_visible()
    page.focus("#tile2")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tile3"
    assert shown.locator("h3").inner_text() == "block1.conv2"
    page.keyboard.press("Enter")
    assert shown.locator("h3").inner_text() == "separable.0"
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    assert (shown.count(), shown.locator("h3").inner_text()) == (1, "fc")
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    assert page.locator(".tile[tabindex='0']").count() == 1
    assert opened.said == []


def test_colours_of_the_map_switch(made, open_page):
    page = open_page(made.page).page
    fill = "getComputedStyle(document.querySelector('#tile2 > i'), '::before').backgroundColor"
    before = page.evaluate(fill)
    assert page.locator(".for-done").is_visible()
    page.check("input[value=redundancy]")
    assert page.evaluate(fill) != before
    assert page.locator(".for-redundancy").is_visible()
    assert not page.locator(".for-done").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_dark_and_light(made, open_page, scheme):
    page = open_page(made.page, scheme=scheme).page
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = "rgb(250, 249, 246)", "rgb(20, 23, 26)"
    first, second = (light, dark) if scheme == "light" else (dark, light)
    assert page.evaluate(ground) == first
    page.click("#theme")
    assert page.evaluate(ground) == second
    page.click("#theme")
    assert page.evaluate(ground) == first


def test_every_control_has_a_name_and_text_has_contrast(made, open_page):
    for scheme in ("light", "dark"):
        page = open_page(made.page, scheme=scheme).page
        unnamed = """[...document.querySelectorAll('button, input, img, svg, section, [role=region]')].filter(x =>
            !(x.getAttribute('aria-label') || x.getAttribute('aria-labelledby') || x.alt || x.textContent.trim()
              || x.labels?.[0]?.textContent.trim())).map(x => x.outerHTML.slice(0, 80))"""
        assert page.evaluate(unnamed) == []
        luminance = """name => { const probe = document.createElement('i'); probe.style.color = `var(${name})`;
            document.body.append(probe);
            const c = getComputedStyle(probe).color.match(/\\d+/g).map(Number);
            probe.remove();
            const [r, g, b] = c.map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
            return .2126 * r + .7152 * g + .0722 * b }"""
        of = {name: page.evaluate(luminance, name) for name in ("--page", "--card", "--ink", "--soft", "--accent")}
        for text in ("--ink", "--soft", "--accent"):
            for ground in ("--page", "--card"):
                high, low = max(of[text], of[ground]), min(of[text], of[ground])
                assert (high + 0.05) / (low + 0.05) >= 4.5, (scheme, text, ground)


def test_print_opens_the_tables_and_shows_no_controls(made, open_page):
    page = open_page(made.page, scheme="dark").page
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("[...document.querySelectorAll('details')].every(details => details.open)")
    assert not page.locator("#theme").is_visible()


def test_reports_of_inspect_and_truncate_open(made, open_page, tmp_path):
    assert made.run("inspect", *made.model, "--images", 32, "--report", tmp_path / "i.html") == 0
    few = ("--images", 100, "--fractions", "0.5,0.2")
    assert made.run("truncate", *made.model, *few, "--report", tmp_path / "t.html") == 0
    for name, selector in (("i.html", ".tile"), ("i.html", ".trio img"), ("t.html", ".panel circle")):
        for size in (DESKTOP, PHONE):
            opened = open_page(tmp_path / name, size)
            assert opened.said == []
            assert opened.page.locator(selector).count() > 0
            assert opened.page.evaluate("document.documentElement.scrollWidth") == size[0]


def test_hostile_names_are_text(open_page, tmp_path):
    """Names that would be markup, script or styles somewhere, in every place that shows one."""
    evil = '"\'><img src=x onerror="window.hacked=1"></script><script>window.hacked=1</script>{{ 7*7 }}'
    sheet = Sheet(evil, evil, (4, 4, 3, 3), 1, (8, 8), 100, 10, 50, 5, (2, 4, 3, 3), None, False, (evil,), (evil,))
    report = Report(evil, evil, evil, network=Network((sheet,)), made=((evil, evil),), notes=(evil,))
    (tmp_path / "evil.html").write_text(render(report))
    opened = open_page(tmp_path / "evil.html", PHONE)
    opened.page.hover("#tile0")
    opened.page.click("#tile0")
    assert opened.page.evaluate("window.hacked") is None
    assert opened.page.locator("img").count() == 0
    assert opened.page.locator("script").count() == 1
    assert opened.page.locator("h1").inner_text() == opened.page.locator(".sheet h3").inner_text() == evil
    assert (opened.said, len(opened.asked)) == ([], 1)
    assert opened.page.evaluate("document.documentElement.scrollWidth") == PHONE[0]
