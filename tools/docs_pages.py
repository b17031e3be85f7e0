"""Pages of the documentation that lie beside `docs/`: mkdocs calls these hooks.

README, CONTRIBUTING, the model card and the bench notes are pages too; links between all of them are made to fit.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "models/tinyworld/README.md": "tinyworld.md",
    "bench/NOTES.md": "notes.md",
}
SOURCES = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point links at pages, relative to the file's own place in the repository."""
    folder = posixpath.dirname(SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}"))

    def fitted(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[2]))
        return link[1] + PAGES.get(target, target.removeprefix("docs/")) + link[3]

    return LINK.sub(fitted, markdown).replace("[LICENSE](LICENSE)", "the file LICENSE")
