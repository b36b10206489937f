"""The text that the small model learns from: Debian documentation packages, as plain prose.

Used by `train_model.py` alone: downloads packages, unpacks them and keeps whole English sentences.
"""

import argparse
import gzip
import html
import lzma
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

# The kind ("heading", "item" or "paragraph") and the text of each block of a page.
Blocks = Iterator[tuple[str, str]]

# Debian 12 "main" packages that hold much English prose.
PACKAGES = """
apache2-doc apt-doc aptitude-doc-en autoconf-doc bind9-doc buildbot-doc cinder-doc cmake-doc cython-doc db5.3-doc
debian-edu-doc-en debian-faq debian-handbook debian-policy debian-reference-en debmake-doc developers-reference
docutils-doc dpdk-doc erlang-doc exim4-doc-html freedombox-doc-en gimp-help-en git-doc glance-doc gnome-devel-docs
gnome-user-docs gnuradio-doc grass-doc imagemagick-6-doc installation-guide-amd64 keystone-doc kicad-doc-en
krb5-doc libboost1.81-doc libvirt-doc lilypond-doc-html linux-doc-6.1 llvm-16-doc maint-guide
manpages manpages-dev maxima-doc neutron-doc nodejs-doc nova-doc octave-doc openvswitch-doc perl-doc
png-definitive-guide postfix-doc postgresql-doc-15 povray-doc python-astropy-doc python-celery-doc python-click-doc
python-cryptography-doc python-dask-doc python-django-doc python-djangorestframework-doc python-flask-doc
python-ipython-doc python-pandas-doc python-requests-doc python-scipy-doc python-scrapy-doc python-setuptools-doc
python-skimage-doc python-sklearn-doc python-sqlalchemy-doc python-statsmodels-doc python-sympy-doc python-tornado-doc
python-werkzeug-doc python3.11-doc qtbase5-doc-html qtcreator-doc qtdeclarative5-doc-html r-doc-html racket-doc
renpy-doc rust-doc rust-web-doc sbcl-doc shorewall-doc slurm-wlm-doc sphinx-doc sqlite3-doc subversion
swi-prolog-doc swift-doc systemd twisted-doc varnish-doc wireshark-doc xen-doc zsh-doc
"""
# Between documents in text.xz; no document holds it.
DOCUMENT_END = "\f\n"

_DROP = re.compile(r"<!--.*?-->|<(head|script|style|pre|nav|footer|screen|programlisting)\b.*?</\1\s*>", re.S | re.I)
_BLOCK_TAGS = r'h[1-6]|p|li|dd|para|simpara|title|item|div(?= class="para")'
_OTHER_TAGS = r"div|section|td|th|tr|dt|dl|ul|ol|table|blockquote|note|steps|list|body|article|aside|hr"
_BLOCK = re.compile(rf"<({_BLOCK_TAGS})\b[^>]*>(.*?)(?=</?(?:{_BLOCK_TAGS}|{_OTHER_TAGS})\b)", re.S | re.I)
_TAG = re.compile(r"<[^>]*>")
_WORD = re.compile(r"[A-Za-z']+")
_COMMON = frozenset(
    re.findall(
        "[a-z]+", "the of to is a and in that for it as be this are with on not by or an you if can from which will"
    )
)
_PLAIN = str.maketrans({
    "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": " - ", "\u2026": "...",
    "\u00a0": " ", "\u00b6": "", "\uf0c1": "", "\u200b": "", "\u2022": "", "\f": " ",
})  # fmt: skip


def is_prose(text: str) -> bool:
    """Say whether a paragraph is an English sentence or more, and not code, a table or an index."""
    words = _WORD.findall(text)
    if len(words) < 6 or not text[0].isupper() or text[-1] not in ".:!?)" or "\\" in text:
        return False
    num_letters = sum(len(word) for word in words) + text.count(" ")
    num_common = sum(word.lower() in _COMMON for word in words)
    return num_letters > 0.87 * len(text) and num_common > 0.2 * len(words) and text.isascii()


def html_blocks(markup: str) -> Blocks:
    """Yield the blocks of an HTML, DocBook or Mallard page."""
    for match in _BLOCK.finditer(_DROP.sub(" ", markup)):
        tag = match[1].lower()
        kind = "heading" if tag[0] == "h" or tag == "title" else "item" if tag in ("li", "item") else "paragraph"
        yield kind, html.unescape(_TAG.sub("", match[2]))


def roff_blocks(source: str) -> Blocks:
    """Yield the blocks of a manual page: font changes undone, every other request taken as the end of a paragraph."""
    source = re.sub(r"\\f(\(..|\[\w*\]|\w)|\\\*\(C.|\\[&/,|^]|\\s[-+]?\d", "", source)
    source = re.sub(r"\\\*?[(]([acol]q|rq|L\"|R\")", "'", source, flags=re.I)
    source = re.sub(r"\\\*?\((em|--)|\\-", "-", source)
    lines: list[str] = []
    for line in [*source.split("\n"), "."]:
        request, _, rest = line.partition(" ")
        if not line.startswith((".", "'")):
            lines.append(line)
        elif request in (".B", ".I"):
            lines.append(rest.replace('"', ""))
        elif request in (".BR", ".IR", ".RB", ".RI", ".BI", ".IB"):
            lines.append("".join(quoted or bare for quoted, bare in re.findall(r'"([^"]*)"|(\S+)', rest)))
        else:
            yield "paragraph", " ".join(lines)
            lines = []
            if request in (".SH", ".SS"):
                yield "heading", rest.strip('"').capitalize()


def plain_blocks(source: str) -> Blocks:
    """Yield the paragraphs of plain text or of Perl's POD."""
    source = re.sub(r"[BCFILSX]<+\s?([^<>|]*)[^<>]*>+", r"\1", source)
    for paragraph in re.split(r"\n\s*\n", source):
        head = re.match(r"=head\d (.*)", paragraph)
        yield ("heading", head[1].capitalize()) if head else ("paragraph", paragraph)


def read_document(path: Path, seen: set[int]) -> str:
    """Return a file's prose, or "" when there is too little; skip paragraphs that any earlier file had."""
    name = path.name.removesuffix(".gz")
    if path.is_symlink() or not path.is_file() or {"_sources", "licenses"} & set(path.parts):
        return ""
    if re.search(r"\.(x?html?|page|docbook)$", name):
        blocks_of: Callable[[str], Blocks] = html_blocks
    elif re.search(r"\.[1-8][a-z]*$", name) and "/man/man" in str(path):
        blocks_of = roff_blocks
    elif name.endswith((".txt", ".pod")):
        blocks_of = plain_blocks
    else:
        return ""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", errors="replace") as file:
        return join_blocks(blocks_of(file.read(4_000_000)), seen)


def join_blocks(blocks: Blocks, seen: set[int]) -> str:
    """Join the prose blocks of one document; a heading stays where prose follows it."""
    out: list[str] = []
    heading = ""
    for kind, raw in blocks:
        text = " ".join(raw.translate(_PLAIN).split()).removesuffix(" #")
        if kind == "heading":
            text = re.sub(r"^(Chapter |Appendix )?[\dA-Z.]*\d\.?\d* ", "", text)
            heading = text if 3 < len(text) < 80 and text.isascii() else ""
        elif text and hash(text) not in seen and is_prose(text):
            seen.add(hash(text))
            out += [heading, "- " + text if kind == "item" else text]
            heading = ""
    document = "\n\n".join(filter(None, out)).replace(".\n\n- ", ".\n- ")
    return document if len(document) > 600 else ""


def package_text(package: str, max_chars: int, seen: set[int]) -> list[str]:
    """Download and unpack one Debian package and return its documents; none, with a warning, where that fails."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(["apt-get", "-q", "download", package], cwd=folder, check=True, capture_output=True)
            (archive,) = Path(folder).glob("*.deb")
            subprocess.run(["dpkg", "-x", archive.name, "root"], cwd=folder, check=True, capture_output=True)
        except subprocess.CalledProcessError as error:
            print(f"skipped {package}: {error.stderr.decode(errors='replace').strip()[-200:]}")
            return []
        documents: list[str] = []
        for path in sorted(Path(folder, "root").rglob("*")):
            if max_chars > 0 and (document := read_document(path, seen)):
                documents.append(document[:max_chars])
                max_chars -= len(document)
        return documents


def fetch_text(args: argparse.Namespace) -> None:
    """Write ``text.xz``: the prose of all packages, documents ended by a form feed."""
    args.work.mkdir(parents=True, exist_ok=True)
    seen: set[int] = set()
    total_chars = 0
    with lzma.open(args.work / "text.xz", "wt", encoding="utf-8", preset=3) as out:
        for package in (bar := tqdm(args.packages, unit="package")):
            documents = package_text(package, args.max_package_mb * 1_000_000, seen)
            num_chars = sum(map(len, documents))
            total_chars += num_chars
            tqdm.write(f"{package}: {len(documents)} documents, {num_chars / 1e6:.2f} MB")
            bar.set_postfix_str(f"{total_chars / 1e6:.0f} MB of prose")
            out.writelines(document + DOCUMENT_END for document in documents)


# ------------------------------------------------------------------------------------------- tokenizer
