"""Pages of the documentation: links, navigation, plain words, no gaps; each test prints all offenders."""

import re
from pathlib import Path

import pytest

import lm2_jax

ROOT = Path(__file__).parents[1]
TOP = ("README.md", "AGENTS.md", "CONTRIBUTING.md")

# Words for which the field has a better one, and how often a page may use them in their ordinary sense.
WORDS = ("behind", "beside", "told", "twin", "twins", "lies", "stands", "goes on", "carries on")
ALLOWED = {
    ("docs/reliability.md", "beside"): 1,
    ("docs/tpu.md", "stands"): 1,  # "2xv5e:16x16 stands for two slices"
}
PLACEHOLDERS = ("FIGURES", "TBD", "LOREM")


def pages() -> dict[str, str]:
    """Text of each page by its path."""
    files = [ROOT / name for name in TOP] + sorted((ROOT / "docs").rglob("*.md"))
    return {str(file.relative_to(ROOT)): file.read_text() for file in files}


def without_code(text: str) -> str:
    """A page without fenced and indented code, and without code in its lines."""
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
    text = re.sub(r"^(?: {4,}|\t).*$", "", text, flags=re.M)
    return re.sub(r"`[^`\n]*`", "", text)


def links(text: str) -> list[str]:
    """Targets of the links and pictures of a page that are no addresses of the web."""
    found = re.findall(r"\]\(([^)\s]+)\)", without_code(text))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub and MkDocs make them."""
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
    titles = re.findall(r"^#+ +(.+?) *$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_links_lead_to_files_and_headings():
    offenders = []
    for page, text in pages().items():
        for link in links(text):
            path, _, anchor = link.partition("#")
            target = (ROOT / page).parent / path if path else ROOT / page
            if not target.exists():
                offenders.append(f"{page}: {link}: there is no such file")
            elif anchor and anchor not in anchors(target.read_text()):
                offenders.append(f"{page}: {link}: there is no such heading")
            elif page.startswith("docs/") and not target.resolve().is_relative_to(ROOT / "docs"):
                offenders.append(f"{page}: {link}: outside of docs/, where the site does not find it")
    assert not offenders, "\n".join(offenders)


def test_navigation_has_every_page_once():
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    listed = re.findall(r"^ *- .+: (\S+\.md)$", nav, re.M)
    existing = {str(file.relative_to(ROOT / "docs")) for file in (ROOT / "docs").rglob("*.md")}
    assert listed, "mkdocs.yml has no navigation"
    assert sorted(listed) == sorted(existing), f"without an entry or a file: {sorted(set(listed) ^ existing)}"


def test_words_are_plain():
    offenders = []
    for page, text in pages().items():
        prose = without_code(text).lower()
        for word in WORDS:
            count = len(re.findall(rf"\b{word}\b".replace(" ", r"\s+"), prose))
            if count > ALLOWED.get((page, word), 0):
                offenders.append(f"{page}: {word!r} {count} times")
    assert not offenders, "the field has other words for these:\n" + "\n".join(offenders)


def test_nothing_is_left_to_fill_in():
    offenders = [f"{page}: {word}" for page, text in pages().items() for word in PLACEHOLDERS if word in text]
    assert not offenders, "\n".join(offenders)


def test_modules_of_the_api_page_exist():
    modules = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs/api.md").read_text(), re.M)
    missing = [m for m in modules if not any((ROOT / m.replace(".", "/")).with_suffix(s).exists() for s in (".py", ""))]
    assert modules, "docs/api.md names no module"
    assert not missing, f"docs/api.md: {missing}"


def test_the_api_page_names_every_public_name():
    page = (ROOT / "docs/api.md").read_text()
    missing = [name for name in (*lm2_jax._NAMES, *lm2_jax._MODULES, "build_model") if f"`{name}`" not in page]
    assert not missing


@pytest.mark.parametrize("name", ["README.md", "docs/experiments.md"])
def test_tables_have_equal_rows(name):
    """A row with another number of cells would be cut or shifted."""
    offenders = []
    for table in re.findall(r"(?:^\|.*\n)+", (ROOT / name).read_text(), re.M):
        rows = table.splitlines()
        offenders += [f"{name}: {row}" for row in rows if row.count("|") != rows[0].count("|")]
    assert not offenders, "\n".join(offenders)
