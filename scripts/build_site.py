"""Build the site into _docs.

nbdev turns the notebooks into pages (it adds the signatures and the links between names), then Quarto renders them, or
smalldocs where Quarto is missing. smalldocs keeps the numbers of the notebooks in its addresses and shows equations with
a script from elsewhere; both are mended here, so that the pages are as Quarto makes them and need no network.
"""
import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

ROOT, PAGES, SITE = Path.cwd(), Path("_proc"), Path("_docs")
# what smalldocs says of settings that only Quarto reads
EXPECTED = re.compile(r"html-math-method|html.grid|execute|output-file|broken link|not read by smalldocs")


def process() -> int:
    "Turn the notebooks into pages under _proc; return how many there are."
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs
    refresh_quarto_yml()
    try: proc_nbs(force=True, n_workers=2)
    except Exception as e: sys.exit(f"nbdev could not make a page: {e}\n{why(str(e.__cause__))}")
    shutil.copy("_quarto.yml", PAGES/"_quarto.yml")
    made, wanted = len(list(PAGES.rglob("*.ipynb"))), len([p for p in Path("nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts])
    for page in PAGES.rglob("*.ipynb"):
        notebook = json.loads(page.read_text(encoding="utf-8"))
        for output in (o for cell in notebook["cells"] for o in cell.get("outputs", [])):
            shown = output.get("data", {}).get("text/markdown")
            if shown: output["data"]["text/markdown"] = unlinked("".join(shown)).splitlines(keepends=True)
        page.write_text(json.dumps(notebook, ensure_ascii=False), encoding="utf-8")
    if made < wanted: sys.exit(f"only {made} of {wanted} notebooks became pages; is the checkout inside a folder whose name begins with a dot?")
    return made


def unlinked(markdown: str) -> str:
    "nbdev links the names in comments of signatures, which are code, where a link is not drawn: the names alone."
    return re.sub(r"^```.*?^```", lambda m: re.sub(r"\[(`[^`\]]+`)\]\([^)\s]+\)", r"\1", m[0]), markdown, flags=re.S | re.M)


def why(trace: str) -> str:
    "The error at the root of a trace, and what is mostly behind it."
    found = re.search(r"^\w+Error: .*$", trace, re.M)
    if not found: return trace
    hint = "\nThe names in a signature must be defined or imported above its cell." if found[0].startswith("NameError") else ""
    return found[0] + hint


def render_smalldocs() -> None:
    "Render _proc with smalldocs, then give the pages the addresses and the equations that Quarto gives them."
    from smalldocs.site import build
    site = build(PAGES, quiet=True)
    for warning in site.warnings:
        if not EXPECTED.search(warning): print("warning:", warning)
    built = PAGES/SITE.name
    renamed = {}
    for page in sorted(built.rglob("*.html")):
        if re.match(r"\d+[a-z]?_", page.name):
            new = page.with_name(re.sub(r"^\d+[a-z]?_", "", page.name))
            if new.exists(): sys.exit(f"two pages would have the address {new.relative_to(built)}: rename one of the notebooks.")
            page.rename(new)
            renamed[page.name] = new.name
    names = re.compile(r"\b(" + "|".join(map(re.escape, renamed)) + r")\b") if renamed else None
    for file in (f for f in built.rglob("*") if f.suffix in (".html", ".json", ".xml") and "site_libs" not in f.parts):
        text = file.read_text(encoding="utf-8")
        if names: text = names.sub(lambda m: renamed[m.group()], text)
        file.write_text(equations(text) if file.suffix == ".html" else text, encoding="utf-8")


def equations(page: str) -> str:
    "A page with its TeX as MathML, which browsers draw by themselves, and without the script that would be fetched for it."
    from latex2mathml.converter import convert
    def mathml(m: re.Match) -> str:
        drawn = convert(html.unescape(m[2]).strip(), display="block" if m[1] == "display" else "inline")
        drawn = re.sub(r"(<mi>(?:log|exp|det|max|min|tr|ln)</mi>)(?=<m(?!o))", r'\1<mspace width="0.17em"/>', drawn)
        return f'<span class="math {m[1]}">{drawn}</span>'
    page = re.sub(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', mathml, page, flags=re.S)
    return re.sub(r'<(link|script)\b[^>]*katex[^>]*>(</script>)?', "", page)


def own_links() -> None:
    "nbdev links names of the library to the published site; a copy of the site links to itself."
    from nbdev.config import get_config
    home = get_config().doc_host + get_config().doc_baseurl + "/"
    for page in SITE.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        up = "../"*(len(page.relative_to(SITE).parts) - 1)
        page.write_text(text.replace(f'<a href="{home}', f'<a href="{up}'), encoding="utf-8")


def render_quarto() -> None:
    "Render _proc with Quarto."
    subprocess.run(["quarto", "render", "--no-cache"], cwd=PAGES, check=True)


class Links(HTMLParser):
    "The addresses a page points to, and the places in it that can be pointed to."
    def __init__(self):
        super().__init__()
        self.targets, self.ids, self.text = [], set(), []
        self._skip = 0

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[k] for k in ("id", "name") if attrs.get(k)}
        self.targets += [attrs[k] for k in ("href", "src") if attrs.get(k)]
        self._skip += tag in ("code", "pre", "script", "style")

    def handle_endtag(self, tag): self._skip -= tag in ("code", "pre", "script", "style")

    def handle_data(self, data):
        if not self._skip: self.text.append(data)


def check() -> list[str]:
    "What is wrong with the built site: broken internal links, things fetched from elsewhere, references left unresolved."
    pages, wrong = {}, []
    for file in SITE.rglob("*.html"):
        if "site_libs" in file.parts: continue
        pages[file.relative_to(SITE).as_posix()] = page = Links()
        page.feed(file.read_text(encoding="utf-8"))
    for name, page in sorted(pages.items()):
        for target in page.targets:
            split = urlsplit(urljoin(f"http://site/{name}", target)) if not re.match(r"[a-z]+:", target) else None
            if split is None: continue
            path = unquote(split.path).lstrip("/")
            if path == "" or path.endswith("/"): path += "index.html"
            if not (SITE/path).is_file(): wrong.append(f"{name}: nothing is at {target}")
            elif split.fragment and path in pages and unquote(split.fragment) not in pages[path].ids:
                wrong.append(f"{name}: {path} has no place called #{split.fragment}")
        wrong += [f"{name}: the reference {ref} is not resolved" for ref in re.findall(r"@(?:fig|eq|tbl|sec)-\w+", " ".join(page.text))]
    return wrong


def main() -> None:
    made = process()
    quarto = shutil.which("quarto")
    render_quarto() if quarto else render_smalldocs()
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.move(PAGES/SITE.name, SITE)
    own_links()
    wrong = check()
    print(*wrong, sep="\n", end="\n" if wrong else "")
    print(f"_docs: {made} pages by {'Quarto' if quarto else 'smalldocs'}, {len(wrong)} broken links or references")
    sys.exit(bool(wrong))


if __name__ == "__main__": main()
