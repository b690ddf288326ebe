"""MkDocs hook: links between pages and files of the repository hold on the site as they do in a checkout.

README.md, CONTRIBUTING.md and other Markdown files outside docs/ become pages of the site, configs the pages that
reference.py makes of them; other files that a page links to are copied. No link of the site leaves it for a file of the
repository, so that the site is complete without a network.
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
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "configs/README.md": "reference/configs.md",
}
_SOURCES = {page: source for source, page in PAGES.items()}
_LINK = re.compile(r"(?<=\]\()[^)#\s]+")


def on_files(files: Files, config: MkDocsConfig) -> None:
    files.remove(files.src_uris["index.md"])  # the list of pages is the site's navigation
    for page, source in _SOURCES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    texts = {source: (ROOT / source).read_text(encoding="utf-8") for source in map(_source, _pages(files))}
    linked = {_target(source, link) for source, text in texts.items() for link in _LINK.findall(text)}
    for path in sorted(linked):
        if (ROOT / path).is_file() and _on_site(path) == path:
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    uri = page.file.src_uri

    def on_site(link: re.Match) -> str:
        path = _target(_source(uri), link[0])
        if not (ROOT / path).is_file():
            return link[0]  # an address, or an error that MkDocs reports
        return relpath(_on_site(path), dirname(uri) or ".")

    return _LINK.sub(on_site, markdown)


def _pages(files: Files) -> list[str]:
    """The pages that are not made by reference.py."""
    return [file.src_uri for file in files.documentation_pages() if (ROOT / _source(file.src_uri)).is_file()]


def _source(page: str) -> str:
    """The path of a page in the repository."""
    return _SOURCES.get(page, f"docs/{page}")


def _target(source: str, link: str) -> str:
    """The path of a link's target in the repository."""
    return normpath(join(dirname(source), link))


def _on_site(path: str) -> str:
    """The path on the site of a file of the repository."""
    if path == "docs/index.md":
        return "index.md"
    if path.endswith(".yaml"):
        return f"reference/{path.removesuffix('.yaml')}.md"
    return PAGES.get(path) or path.removeprefix("docs/")
