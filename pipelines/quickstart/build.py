"""Make the quick-start corpus from a larger one of the same form: `build.py SOURCE [OUT]`.

SOURCE holds `{train,valid}/<domain>.parquet` (columns id, text; ids read domain/package/path) and
`manifest.json`, as made from the packages that README.md lists. A document is kept when its package
is named below and it passes the filters; then domains are cut to a budget, in the order they have.
The same SOURCE gives the same files, byte for byte (for one version of pyarrow).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

BUDGET_BYTES = {"train": 1_400_000, "valid": 120_000}

# domain -> package -> the file of LICENSES that covers it
PACKAGES = {
    "books": {"r-cran-janeaustenr": "janeaustenr", "sword-text-web": "sword-text-web"},
    "chat": {"chitchat-dataset": "chitchat-dataset"},
    "german": {"libreoffice-help-de": "libreoffice"},
    "go": {"golang-1.19-src": "golang"},
    "japanese": {"libreoffice-help-ja": "libreoffice"},
    "legal": {"licensedcode-data": "licensedcode-data"},
    "math": {"metamath-databases": "metamath-databases"},
    "python": {
        "libpython3.11-minimal": "python3.11",
        "libpython3.11-stdlib": "python3.11",
        "libpython3.11-testsuite": "python3.11",
        "sympy": "sympy",
    },
    "russian": {"libreoffice-help-ru": "libreoffice"},
    "techdoc": {
        "libreoffice-help-en-us": "libreoffice",
        "postgresql-doc-15": "postgresql",
        "python3.11-doc": "python3.11",
    },
}

EMAIL = re.compile(r"[\w.+-]+@[\w-]+(\.[\w-]+)+")
PHONE = re.compile(r"(?<![\w.])(\+\d[\d ().-]{8,}\d|\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4})(?!\w)")
# Chats are by private people: whatever could lead to one of them, and coarse language, is left out.
PRIVATE = re.compile(
    r"\d{7}|https?:|www\.|\.(com|net|org|edu)\b|@\w"
    r"|\b(instagram|insta|snapchat|snap ?chat|facebook|fb|twitter|venmo|whatsapp|linkedin|tinder)\b"
    r"|\b(my (full |last |first )?name( is|'s|s)|your (last |full )?name|last name|call me)\b"
    r"|\b(my|your) (phone|number|address|cell|email|e-mail|username|handle)\b|\btext me\b",
    re.IGNORECASE,
)
COARSE = re.compile(
    r"\b(shit\w*|f+u+c+k\w*|bitch\w*|whore|slut|rape\w*|porn\w*|sex(y|ual\w*)?|nazi\w*|suicid\w*"
    r"|retard\w*|nude\w*|kill myself|terroris\w*|racis\w*|drunk|drugs?)\b",
    re.IGNORECASE,
)
INTIMATE = re.compile(
    r"\b(gays?|lesbian|divorc\w*|abus\w*|depress\w*|cancer|pregnan\w*|anxiety|therap\w*"
    r"|miscarr\w*|opioid\w*|medicat\w*|immigrants?|trump)\b",
    re.IGNORECASE,
)
FULL_NAME = re.compile(r"\b[A-Z][a-z]+ [A-Z][a-z]+")
CONDITIONS = re.compile(r"proprietary|commercial|confidential", re.IGNORECASE)


def refused(domain: str, document: str, text: str) -> str | None:
    """Return why a document is left out, or None."""
    if EMAIL.search(text):
        return "e-mail address"
    if domain in {"chat", "legal", "techdoc"} and PHONE.search(text):
        return "telephone number"
    if domain == "chat" and PRIVATE.search(text):
        return "trace of a person"
    if domain == "chat" and COARSE.search(text):
        return "coarse language"
    if domain == "chat" and INTIMATE.search(text):
        return "intimate matter"
    if domain == "legal" and CONDITIONS.search(document):
        return "proprietary terms"
    return None


def cleaned(domain: str, text: str) -> str:
    """Return the text; from chats, without the lines that hold what reads as a full name."""
    if domain != "chat":
        return text
    return "\n".join(line for line in text.split("\n") if not FULL_NAME.search(line))


def chosen(source: Path, domain: str, split: str, seen: dict[str, int]) -> Iterator[dict[str, str]]:
    """Yield the documents kept, up to the budget; `seen` counts what was left out, by reason."""
    room = BUDGET_BYTES[split]
    for row in pq.read_table(source / split / f"{domain}.parquet").to_pylist():
        if row["id"].split("/")[1] not in PACKAGES[domain]:
            continue
        if reason := refused(domain, row["id"], row["text"]):
            seen[reason] = seen.get(reason, 0) + 1
            continue
        text = cleaned(domain, row["text"])
        size = len(text.encode())
        if size <= room:
            room -= size
            yield {"id": row["id"], "text": text}


def build(source: Path, out: Path) -> dict[str, Any]:
    """Write the Parquet files and return the provenance, one entry per domain and package."""
    manifest = json.loads((source / "manifest.json").read_text())
    sources, left_out = [], {}
    for domain, packages in PACKAGES.items():
        records = {s["package"]: s for s in manifest["domains"][domain]["sources"]}
        counts = {package: {"documents": 0, "bytes": 0} for package in packages}
        seen: dict[str, int] = {}
        for split in BUDGET_BYTES:
            rows = list(chosen(source, domain, split, seen))
            (out / split).mkdir(parents=True, exist_ok=True)
            pq.write_table(
                pa.Table.from_pylist(
                    rows, schema=pa.schema({"id": pa.string(), "text": pa.string()})
                ),
                out / split / f"{domain}.parquet",
                compression="zstd",
                compression_level=19,
                use_dictionary=False,
                write_statistics=False,
            )
            for row in rows:
                count = counts[row["id"].split("/")[1]]
                count["documents"] += 1
                count["bytes"] += len(row["text"].encode())
        left_out[domain] = seen
        for package, licence_file in packages.items():
            record = records[package]
            sources.append(
                {"domain": domain}
                | {key: record[key] for key in ("package", "version", "archive", "archive_sha256")}
                | {"licence_file": f"LICENSES/{licence_file}.txt"}
                | counts[package]
            )
    return {"sources": sources, "left_out_documents": left_out}


if __name__ == "__main__":
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent
    provenance = build(Path(sys.argv[1]), target)
    (target / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")
