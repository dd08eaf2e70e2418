"""What a tar archive says and no tree has here: counted by kind, so that nothing goes unsaid.

Owners and the times of access and change are no part of a tree, and are not counted. All other
records of extended headers either mean something to the reader or are counted by their name.
"""

import tarfile

XATTR, _ACL = "SCHILY.xattr.", "SCHILY.acl."
_PLAIN = {
    "path", "linkpath", "size", "mtime", "atime", "ctime", "uid", "gid", "uname", "gname",
    "hdrcharset", "charset", "comment", "SCHILY.dev", "SCHILY.ino", "SCHILY.nlink",
    "SCHILY.devmajor", "SCHILY.devminor", "SCHILY.filetype", "LIBARCHIVE.creationtime",
    "GNU.sparse.major", "GNU.sparse.minor", "GNU.sparse.name", "GNU.sparse.realsize",
    "GNU.sparse.size", "GNU.sparse.numblocks", "GNU.sparse.map", "GNU.sparse.offset",
    "GNU.sparse.numbytes",
}  # fmt: skip
"""Records that are read, or that tell of nothing which a tree could have."""
_TWICE = "LIBARCHIVE.xattr."
"""libarchive writes attributes a second time, in base64."""


def count_records(member: tarfile.TarInfo, counts: dict[str, int]) -> None:
    """Counts the records of a member that are not understood, and attributes that are not kept."""
    found = []
    for key in member.pax_headers.keys() - _PLAIN:
        if key.startswith((XATTR, _ACL)):
            continue  # what a file loses of these the reader counts
        if key.startswith(_TWICE):
            if XATTR + key[len(_TWICE) :] not in member.pax_headers:
                found.append(f"attribute {key[len(_TWICE) :][:80]}")
        else:
            found.append(f"record {key[:80]}")
    for kind in found:
        counts[kind] = counts.get(kind, 0) + 1


def unknown_holes(member: tarfile.TarInfo) -> bool:
    """Tells whether a member is said to have holes in a form that is not known."""
    records = member.pax_headers
    if member.issparse():
        return False
    return "SCHILY.realsize" in records or any(key.startswith("GNU.sparse.") for key in records)
