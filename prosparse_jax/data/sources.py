"""Reads the corpus that `DataConfig.paths` names: JSON Lines files, text files, folders of them, or the default."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from prosparse_jax.config import DataConfig
from prosparse_jax.data.documents import Document, is_validation, stable_fraction
from prosparse_jax.data.embedded import standard_library_documents
from prosparse_jax.errors import DataError

__all__ = [
    "CorpusInfo",
    "Document",
    "corpus_info",
    "is_validation",
    "read_documents",
    "source_names",
    "stable_fraction",
]

JSON_LINES_SUFFIXES = frozenset({".jsonl", ".ndjson"})
PROSE_SUFFIXES = frozenset({".csv", ".html", ".md", ".rst", ".tex", ".text", ".tsv", ".txt", ".xml"})
CODE_SUFFIXES = frozenset(
    {
        ".c",
        ".cc",
        ".cpp",
        ".cs",
        ".css",
        ".cu",
        ".cuh",
        ".go",
        ".h",
        ".hpp",
        ".hs",
        ".java",
        ".jl",
        ".js",
        ".jsx",
        ".kt",
    }
    | {".lua", ".ml", ".php", ".pl", ".py", ".pyi", ".r", ".rb", ".rs", ".scala", ".sh", ".sql", ".swift", ".toml"}
    | {".ts", ".tsx", ".yaml", ".yml"}
)

# A longer text file becomes several documents, so that memory stays bounded and one big file can be split.
PIECE_CHARACTERS = 256 * 1024

# Up to this size a corpus is recognised by its content, which takes a fraction of a second; a larger one by the path,
# size and modification time of its files.
HASHED_BYTES = 256 * 2**20

_log = logging.getLogger(__name__)


def source_names(data: DataConfig) -> tuple[str, ...]:
    """Names of the sources in the order of a batch's `source`; one, "all", without a mixture."""
    return tuple(source.name for source in data.sources) or ("all",)


class CorpusInfo(NamedTuple):
    """What tells one corpus from another without reading all of it as text."""

    fingerprint: str
    """Changes when a file is added, removed, renamed or changed."""
    size: int
    """Bytes on disk."""


class _SourceFile(NamedTuple):
    name: str
    path: Path


def read_documents(data: DataConfig) -> Iterator[Document]:
    """Streams the documents of the corpus in a fixed order; blank ones are left out.

    A record of a JSON Lines file is a document named `file:line`; a text file is one named by its path, or several
    when it is long. Names start at the folder or file that `data.paths` gives, not at the root of the disk.

    Raises:
      FileNotFoundError: a path that does not exist.
      DataError: a file that cannot be read, a line that is not JSON, a record without text, no text at all.
    """
    empty = True
    for document in _all_documents(data):
        if document.text.strip():
            empty = False
            yield document
    if empty:
        raise DataError(f"data.paths={_shown(data)}: the files hold no text. Give files that do.")


def corpus_info(data: DataConfig) -> CorpusInfo:
    """Fingerprint and size of the corpus.

    Raises:
      FileNotFoundError, DataError: as `read_documents`, for what can be seen without reading the text.
    """
    digest = hashlib.blake2b(digest_size=16)
    if not data.paths:
        size = 0
        for document in standard_library_documents():
            digest.update(repr((document.name, document.text)).encode())
            size += document.size
        return CorpusInfo(digest.hexdigest(), size)
    files = _source_files(data)
    stats = [_stat(file.path) for file in files]
    size = sum(stat.st_size for stat in stats)
    digest.update(repr(data.text_field).encode())
    for file, stat in zip(files, stats, strict=True):
        digest.update(repr((file.name, stat.st_size)).encode())
        if size <= HASHED_BYTES:
            digest.update(_content_digest(file.path))
        else:
            digest.update(repr((str(file.path.resolve()), stat.st_mtime_ns)).encode())
    return CorpusInfo(digest.hexdigest(), size)


def _all_documents(data: DataConfig) -> Iterator[Document]:
    if not data.paths:
        yield from standard_library_documents()
        return
    for file in _source_files(data):
        try:
            if file.path.suffix.lower() in JSON_LINES_SUFFIXES | {".json"}:
                yield from _json_lines_documents(file, data.text_field)
            else:
                yield from _text_documents(file)
        except OSError as error:
            raise _unreadable(file.path, error) from error


def _source_files(data: DataConfig) -> list[_SourceFile]:
    files: list[_SourceFile] = []
    for given in data.paths:
        path = Path(given).expanduser()
        if not given.strip() or not path.exists():
            raise FileNotFoundError(
                f"data.paths: {given!r} does not exist (looked in {Path.cwd()}). Correct the path; "
                "leave data.paths empty to use the Python standard library."
            )
        if path.is_dir():
            files.extend(_files_of_folder(path))
        else:
            files.append(_SourceFile(path.name, path))
    return files


def _files_of_folder(root: Path) -> list[_SourceFile]:
    known = JSON_LINES_SUFFIXES | PROSE_SUFFIXES | CODE_SUFFIXES
    files, skipped, visited = [], 0, set()
    for folder, folders, names in os.walk(root, onerror=_raise_unreadable, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # a link back to a folder above
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if Path(name).suffix.lower() in known and not name.startswith("."):
                path = Path(folder, name)
                files.append(_SourceFile(f"{root.resolve().name}/{path.relative_to(root).as_posix()}", path))
            else:
                skipped += 1
    if not files:
        raise DataError(
            f"data.paths: the folder {root} has no text files ({skipped} of other kinds). It is searched for "
            f"{', '.join(sorted(known))}; a file of another kind has to be named itself."
        )
    if skipped:
        _log.info("%s: %d files read, %d hidden or of other kinds left out", root, len(files), skipped)
    return sorted(files)


def _json_lines_documents(file: _SourceFile, field: str) -> Iterator[Document]:
    with open(file.path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield Document(f"{file.name}:{number}", _record_text(line, f"{file.path}:{number}", field), len(line))


def _record_text(line: bytes, where: str, field: str) -> str:
    try:
        record = json.loads(line.rstrip(b"\r\n"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start + 1} of the line). Save the file as UTF-8.") from None
    except ValueError as error:
        detail = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(
            f"{where}: invalid JSON ({detail}). Each line must be one JSON object; mend or remove this line."
        ) from None
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: a JSON {type(record).__name__} where an object is needed. Each line must be one JSON object "
            f"with a field {field!r}."
        )
    if field not in record:
        fields = ", ".join(repr(key) for key in record) or "none"
        raise DataError(
            f"{where}: no field {field!r} (fields: {fields}). Set data.text_field to the one that holds the text."
        )
    text = record[field]
    if not isinstance(text, str):
        raise DataError(
            f"{where}: field {field!r} is {json.dumps(text)[:40]}, not a string. Mend or remove this line, or set "
            "data.text_field to the field that holds the text."
        )
    _refuse_surrogates(text, where)
    return text


def _refuse_surrogates(text: str, where: str) -> None:
    """JSON can escape half of a surrogate pair, which no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {text[error.start]!r} is half of a surrogate pair, not a character. Mend or remove this line."
        ) from None


def _text_documents(file: _SourceFile) -> Iterator[Document]:
    try:
        with open(file.path, encoding="utf-8-sig") as stream:
            index = 0
            # A piece ends at the end of a line, unless that line alone is longer than a piece.
            while text := stream.read(PIECE_CHARACTERS) + stream.readline(PIECE_CHARACTERS):
                yield Document(f"{file.name}#{index}" if index else file.name, text, len(text.encode()))
                index += 1
    except UnicodeDecodeError:
        raise DataError(
            f"{file.path}:{_first_undecodable_line(file.path)}: not UTF-8 text. Save the file as UTF-8, convert it to "
            "JSON Lines, or take it out of data.paths."
        ) from None


def _first_undecodable_line(path: Path) -> int:
    with open(path, "rb") as lines:
        number = 0
        for number, line in enumerate(lines, 1):  # noqa: B007
            try:
                line.decode()
            except UnicodeDecodeError:
                break
    return number


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error


def _content_digest(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "blake2b").digest()
    except OSError as error:
        raise _unreadable(path, error) from error


def _raise_unreadable(error: OSError) -> None:
    raise _unreadable(Path(str(error.filename)), error) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{path} cannot be read: {error.strerror or error}. Correct its permissions or take it out of data.paths."
    )


def _shown(data: DataConfig) -> str:
    return ", ".join(repr(path) for path in data.paths)
