"""What `make docs` (mkdocs.yml) makes a site of: the pages where they lie in this repository, so that links between
them hold there and on GitHub alike, and the notebooks as `make demo` ran them, where it did."""
import logging
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "notebooks/*.ipynb")
SHOWN = ("docs/*.png", "docs/screenshots/*.png", "batches/*.yaml", "CITATION.cff", "LICENSE")
LINK = re.compile(r'(?:href|src)="(?![a-z]+:|[/#])([^"#?]+)')            # to another file of the site
RUNS = ("runs/demo", "runs/demo-all")           # the first of them that has a notebook


def on_config(config: Any) -> Any:
    """The notebooks of the navigation, one by one."""
    for entry in config.nav:
        if entry == {"Notebooks": "notebooks"}:
            entry["Notebooks"] = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("notebooks/*.ipynb"))]
    return config


@event_priority(100)                            # before the plugin that looks for notebooks among them
def on_files(files: Files, config: Any) -> Files:
    """All that is shown, under the names that it has in the repository."""
    theme = [file for file in files if file.src_dir != config.docs_dir]
    names = [path.relative_to(ROOT) for pattern in PAGES + SHOWN for path in sorted(ROOT.glob(pattern))]
    return Files([*theme, *(File(name.as_posix(), str(_where(name)), config.site_dir, config.use_directory_urls)
                            for name in names)])


def _where(name: Path) -> Path:
    runs = [ROOT / run for run in RUNS] if name.suffix == ".ipynb" else []
    return next((run for run in runs if (run / name).is_file()), ROOT)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """A notebook's links to other notebooks, as links to their pages."""
    return re.sub(r'href="(\w+)\.ipynb"', r'href="../\1/"', html) if page.file.src_uri.endswith(".ipynb") else html


def on_post_build(config: Any) -> None:
    """A warning, which --strict refuses, for each link to what is not in the site."""
    site = Path(config.site_dir)
    for page in sorted(site.rglob("*.html")):
        for link in sorted(set(LINK.findall(page.read_text(encoding="utf-8")))):
            target = page.parent / unquote(link)
            if not (target / "index.html" if link.endswith("/") or target.is_dir() else target).is_file():
                logging.getLogger("mkdocs").warning("%s: no such page or file: %s", page.relative_to(site), link)
