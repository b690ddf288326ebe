"""MkDocs hook: links between pages and files of the repository hold on the site as they do in a checkout.

README.md, CONTRIBUTING.md and other Markdown files outside docs/ become pages of the site, configs the pages that
reference.py makes of them, and images are copied. No link of the site leaves it for a file of the repository, so that
the site is complete without a network.
"""

import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PAGES = {  # in the repository -> on the site, where docs/ is the root
    "README.md": "index.md",
    "docs/index.md": "index.md",  # the list of pages is the site's navigation
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "configs/README.md": "reference/configs.md",
    "configs/quickstart/grid.png": "configs/quickstart/grid.png",
    "LICENSE": "LICENSE",
}
SOURCES = {page: source for source, page in PAGES.items() if source != "docs/index.md"}
_LINK = re.compile(r"(?<=\]\()[^)#\s]+")


def on_files(files: Files, config: MkDocsConfig) -> None:
    files.remove(files.src_uris["index.md"])
    for page, source in SOURCES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    source = SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def on_site(link: re.Match) -> str:
        path = normpath(join(dirname(source), link[0]))
        if not (ROOT / path).exists():
            return link[0]  # an address, or an error that MkDocs reports
        target = PAGES.get(path) or (f"reference/{path[:-5]}.md" if path.endswith(".yaml") else path[len("docs/") :])
        return relpath(target, dirname(page.file.src_uri) or ".")

    return _LINK.sub(on_site, markdown)
