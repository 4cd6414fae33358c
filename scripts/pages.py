"""What nbdev does not do before a commit.

A first cell with more than a title and its one line is split, as nbdev drops the rest from the site; nbs/sidebar.yml (what
the site lists) and README.md (nbs/index.ipynb) are written from the notebooks.
"""
import base64
import hashlib
import json
import re
from pathlib import Path

NBS = Path("nbs")
# The sections of the site in reading order; a folder that is not here comes last, under its own name.
SECTIONS = {".": "Pipeline and commands", "datasets": "Datasets", "models": "Models", "metrics": "Metrics", "runners": "Runners",
            "analysis": "Analysis", "reports": "Reports", "jobs": "Jobs", "tutorials": "Tutorials", "explanations": "Explanations"}
STAGES = ["pre_training", "inference", "evaluation", "report"]  # pages without a number that have an order
HEADER = "<!-- Made from nbs/index.ipynb by scripts/prepare: edit the notebook, not this file. -->\n"


def notebooks() -> list[Path]:
    "Every notebook that is a page, relative to nbs/, in the order of its number."
    found = [p.relative_to(NBS) for p in NBS.rglob("*.ipynb")]
    order = lambda p: (p.parent.as_posix(), STAGES.index(p.stem) if p.stem in STAGES else len(STAGES), p.name)
    return sorted((p for p in found if not any(part[0] in "._" for part in p.parts)), key=order)


def split_title(path: Path) -> None:
    "Leave `# Title` and its `> line` alone in the first cell; the prose that follows gets a cell of its own."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    first = notebook["cells"][0]
    found = re.fullmatch(r"(# [^\n]+)\n\n((?:> [^\n]+(?:\n|$))+)(.*)", "".join(first["source"]), re.S)
    if not found: return
    title, line, prose = found[1], " ".join(part.removeprefix(">").strip() for part in found[2].splitlines()), found[3].strip()
    if prose:
        new = {"cell_type": "markdown", "metadata": {}, "source": prose.splitlines(keepends=True)}
        if "id" in first: new["id"] = hashlib.sha256(prose.encode()).hexdigest()[:8]
        notebook["cells"].insert(1, new)
    elif "\n" not in found[2].strip(): return
    first["source"] = [f"{title}\n", "\n", f"> {line}"]
    path.write_text(json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def sidebar() -> str:
    "The sidebar as YAML: the landing page, then a section for each folder, holding the pages that exist."
    folders: dict[str, list[Path]] = {}
    for page in notebooks():
        if page != Path("index.ipynb"): folders.setdefault(page.parent.as_posix(), []).append(page)
    order = [*SECTIONS, *sorted(folders.keys() - SECTIONS)]
    out = ["# Made by scripts/prepare from the notebooks there are.", "website:", "  sidebar:", "    contents:", "      - index.ipynb"]
    # the pages at the top (the pipeline, the command line) need all of the library, so they come after it
    for folder in sorted((f for f in order if f in folders), key=lambda f: order.index("analysis") + .5 if f == "." else order.index(f)):
        out += [f"      - section: {SECTIONS.get(folder, folder)}", "        contents:"]
        out += [f"          - {page.as_posix()}" for page in folders[folder]]
    return "\n".join(out) + "\n"


def relative_links(text: str) -> str:
    "Links and pictures of a page in nbs/, as seen from the root."
    text = re.sub(r"(\]\()(?!\w+:|#|/)([^)\s]+)", r"\1nbs/\2", text)
    return re.sub(r'(<(?:img|a)\b[^>]*?(?:src|href)=")(?!\w+:|#|/)', r"\1nbs/", text).replace("nbs/../", "")


def fenced(text: str, language: str = "") -> str:
    "A fenced block of code or output."
    return f"```{language}\n{text.rstrip()}\n```"


def output(out: dict, alt: str, pictures: dict[str, bytes]) -> str:
    "One saved output as Markdown; a picture is described by `alt`, and added to `pictures` under the path that is linked."
    if out["output_type"] == "stream": return fenced("".join(out["text"]))
    data = out.get("data", {})
    if "image/png" in data:
        path = f"nbs/images/index_{len(pictures) + 1}.png"
        pictures[path] = base64.b64decode("".join(data["image/png"]))
        return f"![{alt}]({path})"
    if "text/markdown" in data: return relative_links("".join(data["text/markdown"]))
    return fenced("".join(data.get("text/plain", "")))


def readme() -> tuple[str, dict[str, bytes]]:
    "README.md and the pictures it shows."
    parts, pictures = [HEADER], {}
    for cell in json.loads((NBS/"index.ipynb").read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown": parts.append(relative_links(source))
        if cell["cell_type"] != "code": continue
        lines = source.splitlines()
        directives = dict((line.removeprefix("#|").strip().split(": ", 1) + [""])[:2] for line in lines if line.startswith("#|"))
        if "hide" in directives or directives.get("include") == "false": continue
        code = "\n".join(line for line in lines if not line.startswith("#|")).strip()
        if code and directives.get("echo") != "false":
            follows_code = parts[-1].startswith("```python")  # cells with nothing between them are one block
            parts.append(fenced(parts.pop()[len("```python\n"):-len("\n```")] + "\n" + code if follows_code else code, "python"))
        parts += [output(out, directives.get("fig-alt", "").strip('"'), pictures) for out in cell.get("outputs", [])]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n", pictures


if __name__ == "__main__":
    for page in notebooks(): split_title(NBS/page)
    (NBS/"sidebar.yml").write_text(sidebar(), encoding="utf-8")
    if (NBS/"index.ipynb").exists():
        text, pictures = readme()
        Path("README.md").write_text(text, encoding="utf-8")
        for path in NBS.glob("images/index_*.png"):
            if path.as_posix() not in pictures: path.unlink()
        for path, content in pictures.items():
            Path(path).parent.mkdir(exist_ok=True)
            Path(path).write_bytes(content)
