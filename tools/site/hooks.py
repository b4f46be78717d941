"""What mkdocs calls while it builds the site: pages made of the code, links that lead out of docs/, formulas, the drawing."""

import html
import json
import logging
import re
from pathlib import Path
from typing import Any

import site_formulas
import site_links
import site_notebooks
import site_pages
from mkdocs.structure.files import File, Files

log = logging.getLogger("mkdocs.hooks.site")
_places: dict[str, str] = {}
_origins: dict[str, str] = {}
_left_out: set[str] = set()


def on_config(config: Any) -> Any:
    """Lays out where everything stands; the navigation gains what the repository has many of, and loses what is not there."""
    _places.clear()
    _origins.clear()
    _left_out.clear()
    docs = site_pages.ROOT / "docs"
    for path in sorted(docs.rglob("*")):
        if path.is_file():
            _places[path.relative_to(site_pages.ROOT).as_posix()] = path.relative_to(docs).as_posix()
    _places.update(site_pages.attached())
    _places.update(site_pages.copied())
    _places.update(
        {
            "README.md": "index.md",
            "docs": "index.md",
            "docs/decisions": "project/index.md",
            "benchmarks/results": "results/index.md",
            "recipes": "results/index.md",
            "examples/notebooks": "how-to/index.md",
        }
    )
    _places.update({f"docs/{page}": page for page in site_pages.GENERATED})
    _origins.update({page: origin for origin, page in _places.items() if origin not in ("README.md", "docs")})
    _origins.update(
        {page: f"docs/{page}" for page in ("index.md", "results/index.md", "project/index.md", "how-to/index.md")}
    )
    there = set(_places.values())
    config.nav = _kept([_more(entry) for entry in config.nav], there)
    return config


def _more(entry: dict[str, Any]) -> dict[str, Any]:
    (title, below), *_ = entry.items()
    if title == "Results":
        names = [_places[f"benchmarks/results/{path.name}"] for path in site_pages.introduced()]
        recipes = [page for origin, page in _places.items() if re.fullmatch(r"recipes/[^/]+/README\.md", origin)]
        return {title: [*below, {"Measured": names}, {"Recipes": recipes}]}
    if title == "Project":
        own = [f"decisions/{path.name}" for path in sorted((site_pages.ROOT / "docs" / "decisions").glob("[0-9]*.md"))]
        others = [
            {"Security policy": "project/security-policy.md"},
            {"Contributing": "project/contributing.md"},
            {"Changelog": "project/changelog.md"},
        ]
        return {title: [*below, *others, {"Decisions": own}]}
    return entry


def _kept(entries: list[Any], there: set[str]) -> list[Any]:
    kept = []
    for entry in entries:
        ((title, target),) = entry.items() if isinstance(entry, dict) else ((None, entry),)
        if isinstance(target, list):
            inner = _kept(target, there)
            kept += [{title: inner}] if inner else []
        elif target in there:
            kept.append(entry)
        else:
            log.info("left out of the navigation, as it is not there: %s", target)
            notebook = re.sub(r"^notebooks/(.*)\.md$", r"examples/notebooks/\1.ipynb", target)
            _left_out.add(f"docs/{target}" if notebook == target else notebook)
    return kept


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are not below docs/."""
    for page, make in site_pages.GENERATED.items():
        files.append(File.generated(config, page, content=make()))
    for origin, page in site_pages.copied().items():
        path = site_pages.ROOT / origin
        text = site_notebooks.page(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    for origin, place in site_pages.attached().items():
        files.append(File.generated(config, place, content=(site_pages.ROOT / origin).read_bytes()))
    return files


MARKS = {
    "<!-- made: results -->": site_pages.machines,
    "<!-- made: decisions -->": site_pages.decisions,
}


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Fills in what is made of the repository, and turns links to its files into links to the site's pages."""
    uri = page.file.src_uri
    if uri in ("index.md", "tutorial.md", "comparison.md"):  # they stand alone: a list of one page is no navigation
        page.meta["hide"] = ["navigation"]
    for mark, make in MARKS.items():
        if mark in markdown:
            markdown = markdown.replace(mark, make())
    origin = _origins.get(uri, f"docs/{uri}")
    places = {**_places, **_made_here(uri)}

    def missing(link: str, wanted: str) -> bool:
        if wanted in _left_out:
            log.info("%s: '%s' is not there yet", origin, link)
            return True
        log.warning("%s: the link '%s' leads to nothing that the site has", origin, link)
        return False

    return site_links.mended(markdown, origin, uri, places, missing)


def _made_here(uri: str) -> dict[str, str]:
    """What a filled-in mark links to beside its page in the site stands beside it in the repository, too, for the links' sake."""
    if uri == "results/index.md":
        return {f"docs/{page}": page for page in _places.values() if page.startswith("results/")}
    return {}


def on_page_content(content: str, page: Any, config: Any, files: Files) -> str:
    """Draws formulas, and puts the drawing of the first page into it, so that it has the page's colours."""
    return re.sub(
        r"<th([^>]*)></th>", r"<td\1></td>", _inlined(site_formulas.drawn(content))
    )  # a header says something


SHIM = "https://unpkg.com/iframe-worker/shim"


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Has the page load the search's worker for folders from beside it, and names its parts."""
    return _named(output.replace(SHIM, site_links.relative("assets/worker.js", page.file.dest_uri)))


def on_post_template(output_content: str, template_name: str, config: Any) -> str:
    """The same on the page that a server shows for what it does not have, whose addresses begin at the site's root."""
    return _named(output_content.replace(SHIM, "/assets/worker.js"))


SECTION = re.compile(
    r'aria-labelledby="(__nav_[0-9_]+)_label"([^>]*>\s*<label class="md-nav__title" for="\1">\s*<span [^>]*></span>\s*)([^<]+)'
)


def _named(output: str) -> str:
    """Names what the theme leaves without a name for those who do not see it: the search, and sections that are pages, too."""
    search = 'data-md-component="search" role="dialog"'
    output = output.replace(search, f'{search} aria-label="Search"')
    return SECTION.sub(lambda found: f'aria-label="{found[3].strip()}"{found[2]}{found[3]}', output)


def on_post_build(config: Any) -> None:
    """Has the search find what is written λ by its name, too, in the index for servers and in the one for folders."""
    for path in sorted((Path(config.site_dir) / "search").glob("search_index.js*")):
        before, _, index = path.read_text(encoding="utf-8").rpartition("var __index = ")
        start = "var __index = " if path.suffix == ".js" else ""
        tree = json.loads(index)
        for entry in tree["docs"]:
            entry.update({field: _spelled(entry[field]) for field in ("title", "text")})
        path.write_text(before + start + json.dumps(tree, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def _spelled(text: str) -> str:
    """The first λ of a text with its name behind it."""
    return text if re.search(r"\blambda\b", text) else re.sub(r"λ(?!\w)", "λ (lambda)", text, count=1)


def _inlined(content: str) -> str:
    def one(found: re.Match[str]) -> str:
        drawing = (site_pages.ROOT / "docs" / "assets" / f"{found.group('name')}.svg").read_text(encoding="utf-8")
        said = html.escape(html.unescape(found.group("alt")), quote=True)
        drawn = drawing.replace("<svg ", f'<svg role="img" aria-label="{said}" ', 1).strip()
        return f'<span class="drawing" tabindex="0">{drawn}</span>'

    return re.sub(r'<img alt="(?P<alt>[^"]*)" src="(?:\.\./)*assets/(?P<name>[a-z-]+)\.svg" ?/?>', one, content)
