"""The archive of a project: the same files give the same bytes, so a cluster keeps one copy."""

from __future__ import annotations

import stat
import zipfile
from pathlib import Path

from raymix.errors import RecipeError
from raymix.jobs.files import Listing

# The cluster's control store takes no message above 512 MB; what nears it is data, not a project.
MOST_BYTES = 256_000_000
_EPOCH = (1980, 1, 1, 0, 0, 0)
_NAMED = 3


def pack(listing: Listing, archive: Path) -> int:
    """Return the bytes of the zip file written to `archive`, all files of `listing` in it.

    Args:
        listing: What travels.
        archive: The file to write; it must end in `.zip`.

    Raises:
        RecipeError: If the files are more than a cluster takes; names the largest.
    """
    sizes = {name: (listing.root / name).stat().st_size for name in listing.files}
    total = sum(sizes.values())
    if total > MOST_BYTES:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:_NAMED]
        named = ", ".join(f"{name} ({sizes[name] / 1e6:,.0f} MB)" for name in largest)
        raise RecipeError.at(
            "project",
            str(listing.root),
            f"{total / 1e6:,.0f} MB of files; the largest are {named}",
            allowed=f"A job may ship {MOST_BYTES / 1e6:,.0f} MB",
            fix="Name data in .gitignore or .rayignore and give its URL, or a path of the cluster",
        )
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as writer:
        for name in listing.files:
            source = listing.root / name
            # Neither the time nor the owner of a file is of any use there.
            entry = zipfile.ZipInfo(name, _EPOCH)
            executable = source.stat().st_mode & stat.S_IXUSR
            entry.external_attr = (stat.S_IFREG | (0o755 if executable else 0o644)) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            writer.writestr(entry, source.read_bytes())
    return archive.stat().st_size
