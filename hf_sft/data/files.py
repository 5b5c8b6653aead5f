"""From files, folders and data sets of the hub to records.

``READERS`` is the table of file endings. All of them read in pieces, so memory does not grow with the file.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hf_sft.data.cache import cache_key, hash_files
from hf_sft.data.json_files import json_layout, read_json
from hf_sft.data.records import (
    GZIP,
    BadRecord,
    Record,
    both_parts,
    choose_list,
    decoder,
    ending,
    in_list,
    open_bytes,
    shorten,
)
from hf_sft.data.tables import (
    is_saved,
    load_hub,
    load_saved,
    read_arrow,
    read_csv,
    read_dataset,
    read_parquet,
    sizes_of,
)

__all__ = [
    "BadRecord",
    "Record",
    "check_file",
    "content_hash",
    "decoder",
    "parts_of",
    "read_records",
    "shorten",
    "size_of",
]

logger = logging.getLogger(__name__)

READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    **dict.fromkeys((".jsonl", ".json", ".ndjson", ".txt"), read_json),
    ".csv": read_csv,
    ".tsv": functools.partial(read_csv, delimiter="\t"),
    ".parquet": read_parquet,
    **dict.fromkeys((".arrow", ".feather"), read_arrow),
}
_TABLES = {b"PAR1": ".parquet", b"ARROW1": ".arrow", b"\xff\xff\xff\xff": ".arrow"}  # first bytes say more than a name
_PICKLE = "a pickle, which can run code when it is opened"
_ARCHIVE = "an archive; unpack it"
_FOREIGN = {  # first bytes of files that are something else
    b"\x80": _PICKLE,
    b"PK\x03\x04": "a zip archive (or a PyTorch checkpoint, or an Excel sheet)",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it, or compress it by gzip",
    b"\xfd7zXZ\x00": "compressed by xz; unpack it, or compress it by gzip",
    b"BZh": "compressed by bzip2; unpack it, or compress it by gzip",
    b"\x04\x22\x4d\x18": "compressed by lz4; unpack it, or compress it by gzip",
    b"7z\xbc\xaf\x27\x1c": _ARCHIVE,
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
    b"version https://git-lfs": "a pointer of Git LFS to the file; fetch the file itself with git lfs pull",
}
_FOREIGN_ENDINGS = {
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".pth", ".bin"), _PICKLE),
    **dict.fromkeys((".zip", ".7z", ".tar", ".tgz"), _ARCHIVE),
    **{
        name: _FOREIGN[magic]
        for name, magic in ((".zst", b"\x28\xb5\x2f\xfd"), (".xz", b"\xfd7zXZ\x00"), (".bz2", b"BZh"))
    },
}
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # of data, no data
_WAY_OUT = "Write the records as JSON lines in UTF-8, one per line."
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SPLIT_NAME = re.compile(r"(?:^|[-_.])(train|validation|valid|val|dev|eval|test)(?=[-_.]|$)")


def read_records(
    path: str | Path,
    *,
    part: str | None = None,
    texts: bool = False,
    config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
) -> Iterator[Record]:
    """The records of a file, a folder or a data set of the hub.

    Files: JSON lines (blank lines are skipped), one JSON array, one JSON object with ``train`` and ``validation`` lists, CSV
    and TSV with a header, Parquet, Arrow, in UTF-8 with or without BOM; what is text may be compressed by gzip. Folders: of
    ``datasets.save_to_disk``, or of such files, which are read in the order of their names; hidden files and other endings
    are left out. If every file or its folder is named train, validation, test or the like, the folder holds those lists. A
    record that cannot be read is a :class:`BadRecord`; the caller decides whether to stop.

    Args:
        path: a file, a folder, or the name of a data set ("owner/name") if there is no file or folder of that name.
        part: ``train`` (also None) or ``eval``: which list is read where there are several. ``eval`` is the first of
            validation, valid, val, dev, eval and test; without any of them everything is read.
        texts: a ``.txt`` file is one record, its whole text; else it holds JSON lines.
        config, revision: of a data set of the hub.
        streaming: do not download a data set of the hub, but read it as it is used.
        split: name of the list in place of ``part``; for a data set of the hub also a slice, such as "train[:10%]".

    Raises:
        ValueError: see :func:`check_file`; also data without any record, a broken array, an object over several lines, text
            that is no JSON, a damaged file, no list for ``part`` or ``split``, a data set that cannot be loaded.
    """
    if part not in (None, "train", "eval"):
        raise ValueError(f"part is {part!r}; it is train, eval or None")
    place = _find(path, config, split, revision, streaming)
    if place.data is not None:
        records = read_dataset(place.data, path, part, split if place.is_saved else None)
    elif place.files is not None:
        records = _read_folder(Path(path), place.files, part, split, texts)
    else:
        records = _read_file(check_file(path), part, split, texts)
    empty = True
    for record in records:
        empty = False
        yield record
    if empty:
        raise ValueError(f"{path} holds no record, only blank text or an empty list. {_WAY_OUT}")


def parts_of(
    path: str | Path, *, config: str | None = None, split: str | None = None, revision: str | None = None
) -> frozenset[str]:
    """{"train", "eval"} if a file, folder or data set holds records for both; nothing if it is one list.

    Raises:
        ValueError: as :func:`read_records`, as far as that shows without reading everything.
    """
    if split is not None:
        return frozenset()
    place = _find(path, config, split, revision)
    if place.data is not None:
        return both_parts(sizes_of(place.data))
    if place.files is not None:
        return both_parts({name: len(files) for name, files in place.files.items()})
    file = check_file(path)
    if _reader(file) is not read_json or ending(file) == ".txt":
        return frozenset()
    with _reading(file):
        return both_parts(json_layout(file).sizes)


def content_hash(
    path: str | Path,
    *,
    config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
) -> str:
    """A hash of all that the records come from: contents and names of files, or what the hub says about a data set.

    Args:
        streaming: sizes and times of files in place of contents: nothing is read twice.

    Raises:
        ValueError: as :func:`read_records`.
    """
    place = _find(path, config, split, revision, streaming)
    if place.data is not None and not place.is_saved:
        data = place.data if isinstance(place.data, dict) else {"": place.data}
        return cache_key({"hub": {name: _fingerprint(rows) for name, rows in data.items()}, "revision": revision})
    if place.data is None and place.files is None:
        file = check_file(path)
        with _reading(file):
            return hash_files([file], contents=not streaming)
    folder = Path(path)
    files = sorted(_all_files(folder)) if place.files is None else [f for group in place.files.values() for f in group]
    names = [file.relative_to(folder).as_posix() for file in files]
    with _reading(folder):
        return cache_key({"names": names, "contents": hash_files(files, contents=not streaming)})


def size_of(path: str | Path) -> int:
    """Bytes of a file or of all files of a folder; 1 for a data set of the hub, whose size is not known."""
    place = Path(path)
    if place.is_dir():
        return sum(file.stat().st_size for file in _all_files(place)) or 1
    return place.stat().st_size or 1 if place.is_file() else 1


def _fingerprint(rows: Any) -> str:
    """Of a data set of the hub; a stream has no other than what the hub says about it."""
    return getattr(rows, "_fingerprint", None) or f"{rows.info.dataset_name} {rows.info.version} {rows.info.splits}"


# ---------------------------------------------------------------------------------------------------------------------
# Where the records are


class _Place(NamedTuple):
    """A data set, a folder's files by the list that they belong to, or (neither) a file."""

    data: Any = None
    files: dict[str, list[Path]] | None = None
    is_saved: bool = False


def _find(
    path: str | Path, config: str | None, split: str | None, revision: str | None, streaming: bool = False
) -> _Place:
    if not str(path):
        raise ValueError("the path of the data is empty; name a file, a folder or a data set of the hub")
    folder = Path(path)
    with _reading(folder):
        is_folder, exists = folder.is_dir(), folder.exists()
    if not exists and _HUB_NAME.fullmatch(str(path)) and not _is_data_name(folder):
        return _Place(data=load_hub(str(path), config, split, revision, streaming))
    for name, value in (("config", config), ("revision", revision)):
        if value is not None:
            raise ValueError(
                f"{name} is {value!r}, which is for data sets of the hub, and {path} is none. Leave it out."
            )
    if is_folder and is_saved(folder):
        return _Place(data=load_saved(folder), is_saved=True)
    return _Place(files=_groups(folder)) if is_folder else _Place()


def _is_data_name(path: Path) -> bool:
    return path.suffix.lower() == ".gz" or ending(path) in READERS | _FOREIGN_ENDINGS


def check_file(path: str | Path) -> Path:
    """The path, if it names a file that can hold records.

    Raises:
        ValueError: no such file, a folder, an empty file, or a file of another kind, such as a pickle.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, but a data file is wanted. Name one file of JSON lines or a JSON array.")
    if not path.is_file():
        raise ValueError(f"{path}: no such data file. Check the path; a relative one starts at {Path.cwd()}.")
    kind = _FOREIGN_ENDINGS.get(path.suffix.lower()) or _FOREIGN_ENDINGS.get(ending(path))
    packed, head = _head(path)
    if kind is None:
        kind = next((text for magic, text in _FOREIGN.items() if head.startswith(magic)), None)
    if kind is None and packed and _table_ending(head):
        kind = f"a {_table_ending(head)} file compressed by gzip, which cannot be read in pieces; unpack it with gunzip"
    if kind is not None:
        raise ValueError(f"{path} is {kind}; such files are not read. {_WAY_OUT}")
    if not head and not packed:
        raise ValueError(f"{path} is empty (0 bytes), but at least one record is needed. {_WAY_OUT}")
    return path


def _head(path: Path) -> tuple[bool, bytes]:
    """Whether a file is compressed by gzip, and its first bytes, unpacked."""
    with _reading(path):
        with path.open("rb") as file:
            packed = file.read(len(GZIP)) == GZIP
        with open_bytes(path) as file:
            return packed, file.read(32)


def _table_ending(head: bytes) -> str | None:
    return next((name for magic, name in _TABLES.items() if head.startswith(magic)), None)


def _reader(path: Path) -> Callable[..., Iterator[Record]]:
    return READERS.get(_table_ending(_head(path)[1]) or ending(path), read_json)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Errors of the system name the file and the way out."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is compressed by gzip and damaged: {error}. Make it again.") from error
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read: {error.strerror or error}. Check the path and its permissions."
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Files and folders


def _read_file(path: Path, part: str | None, split: str | None, texts: bool) -> Iterator[Record]:
    reader = _reader(path)
    if reader is read_json and not (texts and ending(path) == ".txt"):
        records = read_json(path, part, split)
    elif split is not None:
        raise ValueError(f"{path} is one list and has no split {split!r}; leave split out")
    else:
        records = _read_document(path) if reader is read_json else reader(path)
    with _reading(path):
        yield from records


def _read_document(path: Path) -> Iterator[Record]:
    """One record, the whole text."""
    with open_bytes(path) as file:
        data = file.read()
    try:
        yield Record(1, data.decode("utf-8-sig"), "document")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None


def _read_folder(
    folder: Path, groups: dict[str, list[Path]], part: str | None, split: str | None, texts: bool
) -> Iterator[Record]:
    if list(groups) != [""]:
        name = choose_list({name: len(files) for name, files in groups.items()}, part, split, folder)
        return in_list(_read_folder(folder, {"": groups[name]}, None, None, texts), name)
    if split is not None:
        raise ValueError(f"the files in {folder} are one list, and there is no split {split!r}; leave split out")
    return (
        record._replace(file=file.relative_to(folder).as_posix())
        for file in groups[""]
        for record in _read_member(file, texts)
    )


def _read_member(path: Path, texts: bool) -> Iterator[Record]:
    if _reader(path) is read_json and not (texts and ending(path) == ".txt"):
        with _reading(path):
            kind = json_layout(path).kind
        if kind == "lists":
            raise ValueError(f"{path} holds several lists; in a folder each file is one. Name the file by itself.")
    return _read_file(check_file(path), None, None, texts)


def _groups(folder: Path) -> dict[str, list[Path]]:
    """The data files of a folder in order, by the list that their names say; all under "" if not all are named so.

    Raises:
        ValueError: no data file, or one of a kind that is not read.
    """
    files: list[Path] = []
    others: list[Path] = []
    for file in sorted(_all_files(folder), key=lambda file: file.relative_to(folder).as_posix()):
        if kind := _FOREIGN_ENDINGS.get(file.suffix.lower()) or _FOREIGN_ENDINGS.get(ending(file)):
            raise ValueError(f"{file} is {kind}; such files are not read. Take it out of the folder, or name files.")
        known = ending(file) in READERS and file.name not in _DESCRIPTIONS
        (files if known else others).append(file)
    files = [file for file in files if file.stat().st_size]
    if not files:
        raise ValueError(f"{folder} holds no data file. Name a folder with files that end in {', '.join(READERS)}.")
    if others:
        _warn(f"{folder}: {len(others)} files of other kinds are not read: {_names(others, folder)}")
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(_list_name(file.relative_to(folder)), []).append(file)
    if "" not in groups and len(groups) > 1:
        return groups
    meant = [file for name, group in groups.items() if name not in ("", "train") for file in group]
    if meant and len(groups) > 1:
        _warn(
            f"{folder}: all {len(files)} files are read as one list, also {_names(meant, folder)}. If they are meant for "
            "evaluation, name the others train, or keep them apart."
        )
    return {"": files}


def _all_files(folder: Path) -> Iterator[Path]:
    """Every file that is not hidden, behind links to folders too."""
    seen = set()

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}. Check its permissions.") from error

    for root, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in (Path(root) / name for name in names if not name.startswith(".")):
            if not file.exists():
                raise ValueError(f"{file} is a link to nothing. Mend it, or take it out of the folder.")
            if file.is_file():
                yield file


def _list_name(path: Path) -> str:
    """The list that a file belongs to by its name, else by the nearest folder's, or ""."""
    names = [path.name.lower().removesuffix(".gz").rsplit(".", 1)[0], *(p.name.lower() for p in path.parents)]
    for name in names:
        found = set(_SPLIT_NAME.findall(name))
        if len(found) == 1:
            return str(found.pop())
    return ""


def _names(files: list[Path], folder: Path) -> str:
    more = f" and {len(files) - 5} more" if len(files) > 5 else ""
    return ", ".join(file.relative_to(folder).as_posix() for file in files[:5]) + more


@functools.lru_cache(maxsize=256)
def _warn(text: str) -> None:
    """Once, though a folder is looked at several times."""
    logger.warning(text)
