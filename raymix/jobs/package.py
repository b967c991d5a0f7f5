"""Archive of a project: equal files give equal bytes, so the cluster stores one copy."""

from __future__ import annotations

import stat
import zipfile
from pathlib import Path

from raymix.errors import RecipeError
from raymix.jobs.files import Listing

# Ray's control store refuses messages above 512 MB; files that large are data, not a project.
MAX_ARCHIVE_BYTES = 256_000_000
_EPOCH = (1980, 1, 1, 0, 0, 0)
_MAX_NAMED = 3


def pack(listing: Listing, archive: Path) -> int:
    """Write all files of `listing` to the zip file `archive`, and return its size in bytes.

    Args:
        listing: The files to ship.
        archive: The file to write; it must end in `.zip`.

    Raises:
        RecipeError: If the files are larger than a cluster accepts; names the largest.
    """
    sizes = {name: (listing.root / name).stat().st_size for name in listing.files}
    total = sum(sizes.values())
    if total > MAX_ARCHIVE_BYTES:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:_MAX_NAMED]
        named = ", ".join(f"{name} ({sizes[name] / 1e6:,.0f} MB)" for name in largest)
        raise RecipeError.at(
            "project",
            str(listing.root),
            f"{total / 1e6:,.0f} MB of files; the largest are {named}",
            allowed=f"A job may ship {MAX_ARCHIVE_BYTES / 1e6:,.0f} MB",
            fix="Name data in .gitignore or .rayignore and give its URL, or a path of the cluster",
        )
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as writer:
        for name in listing.files:
            source = listing.root / name
            # Ray names packages by the hash of their bytes: times would make every archive new.
            entry = zipfile.ZipInfo(name, _EPOCH)
            executable = source.stat().st_mode & stat.S_IXUSR
            entry.external_attr = (stat.S_IFREG | (0o755 if executable else 0o644)) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            writer.writestr(entry, source.read_bytes())
    return archive.stat().st_size
