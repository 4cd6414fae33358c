"The built site, page by page, in a real browser. With CAUSAL_META_SCREENSHOTS=1, pictures of the pages are left in .site-screenshots."
import http.server
import os
import shutil
import threading
from functools import partial
from pathlib import Path

import pytest
import yaml
from browser import Browser, find_chromium, problems

ROOT = Path(__file__).parents[1]
SITE, SHOTS = ROOT/"_docs", ROOT/".site-screenshots"
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed (Debian: apt-get install chromium)"),
    pytest.mark.skipif(not (SITE/"index.html").exists(), reason="the site is not built: run scripts/docs"),
]


def listed(contents: list) -> list[str]:
    "The pages of a sidebar, in order."
    return [page for entry in contents for page in ([entry] if isinstance(entry, str) else listed(entry["contents"]))]


def address(notebook: str) -> str:
    "The address nbdev gives a notebook's page: its number is dropped."
    path = Path(notebook)
    head, _, tail = path.stem.partition("_")
    return path.with_name((tail if tail and head[:1].isdigit() else path.stem) + ".html").as_posix()


PAGES = [address(page) for page in listed(yaml.safe_load((ROOT/"nbs/sidebar.yml").read_text())["website"]["sidebar"]["contents"])]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope="module")
def origin():
    "The site on a free port of this machine."
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    shutil.rmtree(SHOTS, ignore_errors=True)
    with Browser() as tab: yield tab


def test_the_sidebar_lists_every_notebook():
    notebooks = {p.relative_to(ROOT/"nbs") for p in (ROOT/"nbs").rglob("*.ipynb")}
    assert set(PAGES) == {address(str(p)) for p in notebooks if not any(part[0] in "._" for part in p.parts)}


@pytest.mark.parametrize("page", PAGES)
def test_page(browser, origin, page):
    events = browser.open(f"{origin}/{page}")
    # pictures below the fold may be loaded lazily: ask for each, and wait
    broken = browser.js("""Promise.all([...document.images].map(i => { i.loading = 'eager'; return i.decode().catch(() => 0) }))
        .then(() => [...document.images].filter(i => !i.naturalWidth).map(i => i.src.slice(0, 100)))""")
    if os.environ.get("CAUSAL_META_SCREENSHOTS"): browser.screenshot(SHOTS/page.replace("/", "-").replace(".html", ".png"), height=6000)
    assert problems(events, origin) == []
    assert broken == []
    assert browser.js("document.querySelector('h1')?.innerText.trim() || ''") != ""
    assert browser.js("[...document.querySelectorAll('#quarto-sidebar a.active, #quarto-sidebar .active a')].length") >= 1
    wide = browser.js("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0, f"the page is {wide} pixels wider than the window"
    text = browser.js("document.querySelector('main').innerText")
    assert "Traceback (most recent call last)" not in text
    assert "environ({" not in text and f"{ROOT}/" not in text, "the page tells of the machine it was built on"
    assert "[`" not in text, "a link in code is not drawn"
    assert "$$" not in text and "\\(" not in text, "an equation is not drawn"


def test_search(browser, origin):
    "What is typed into the search box finds the page that is about it."
    browser.open(f"{origin}/index.html")
    if not browser.js("!!document.querySelector('.smalldocs-search')"): pytest.skip("Quarto's own search box is Quarto's to test")
    found = browser.js("""new Promise(done => {
        const box = document.querySelector('#quarto-search input'), end = Date.now() + 8000;
        box.focus(); box.value = 'pigeonhole bootstrap'; box.dispatchEvent(new Event('input', {bubbles: true}));
        const look = () => { const hits = [...document.querySelectorAll('.search-result')].map(a => a.href);
                             hits.length || Date.now() > end ? done(hits) : setTimeout(look, 100); };
        look(); })""")
    assert any("analysis/statistics.html" in href for href in found), found


@pytest.mark.slow  # scripts/docs follows the links that are in the files; here are those that scripts make, too
def test_links_inside_the_site(browser, origin):
    "Every link between pages leads to a page, and to a place that is on it."
    links: dict[str, str] = {}
    for page in PAGES:
        browser.open(f"{origin}/{page}")
        for href in browser.js("[...document.querySelectorAll('a[href]')].map(a => a.href)"):
            if href.startswith(origin): links.setdefault(href, page)
    broken = []
    for href, page in links.items():
        path, _, place = href.removeprefix(origin).lstrip("/").partition("#")
        file = SITE/(path.partition("?")[0] or "index.html")
        if file.is_dir(): file = file/"index.html"
        if not file.is_file(): broken.append(f"{page} -> {href}")
        elif place and file.suffix == ".html":
            from urllib.parse import unquote
            if f'id="{unquote(place)}"' not in file.read_text(encoding="utf-8"): broken.append(f"{page} -> {href}")
    assert broken == []


def test_on_a_telephone(origin):
    "On a narrow screen the text still fits the window."
    with Browser(width=500, height=900) as phone:
        phone.open(f"{origin}/index.html")
        phone.screenshot(SHOTS/"index-narrow.png", height=2000)
        assert phone.js("document.documentElement.scrollWidth") <= 500
