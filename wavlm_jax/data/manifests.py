"""Manifests: TSV or CSV with a header line, JSON lines, fairseq's .tsv (FACTS C4), or the metadata of an audiofolder.

Nothing is guessed: a duplicate id, a missing file, an empty line or a malformed number is an error that names the
line, before any work is done.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from wavlm_jax.data.entries import (
    Chosen,
    Entry,
    FileReader,
    PhoneTimes,
    SourceError,
    UtteranceSource,
    choose_columns,
    inside,
    listed,
    names_in,
    one_line,
    root_cure,
    stamp_of,
    text_of,
    value_at,
)
from wavlm_jax.data.layouts import Numbered, is_ljspeech, ljspeech, of_object
from wavlm_jax.files import open_regular

_MOST_DIGITS = 18
_MOST_NAME_BYTES = 255
_MOST_RATIO, _SLACK = 100, 1 << 16
"""What a compressed list may grow to: so many times its size and 64 KiB."""


def from_manifest(file: Path, root: Path | None = None, chosen: Chosen | None = None) -> UtteranceSource:
    """The utterances that a manifest lists.

    Args:
        file: a .tsv or .csv with a header line (columns path and, optional, id, samples, speaker, text), .jsonl (or
            .jsonl.gz) with the same keys and, optional, phones {symbols, starts, ends}; or fairseq's: root, then path
            TAB samples. Other usual names of these columns are accepted too (`COLUMNS`), and lists of lhotse, NeMo and
            LJSpeech.
        root: has all audio, also by absolute paths and links. None: the folder that paths are relative to. That is
            the first of these which has the first path: `root`, fairseq's first line, the folder of the manifest, its
            parent.
        chosen: columns that go before the usual names.

    Raises:
        SourceError: names the line.

    """
    text, chosen, notes = _text(file), chosen or {}, list[str]()
    first = text.partition("\n")[0].removesuffix("\r")
    folders = [*([] if root is None else [root]), file.parent, file.resolve().parent.parent, file.parent / "clips"]
    if is_ljspeech(file, first):
        lines = ljspeech(file, _lines(file, text))
        rows: Iterator[Numbered] = ((number, _known(row, chosen, f"{file}:{number}")) for number, row in lines)
    elif first.startswith("{"):
        rows = _json_rows(file, _lines(file, text), chosen, notes)
    elif file.suffix == ".csv":
        rows = _table_rows(file, csv.reader(io.StringIO(text, newline=""), strict=True), chosen, notes)
    elif "\t" in first:
        table = csv.reader(_lines(file, text), delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
        rows = _table_rows(file, table, chosen, notes)
    else:
        rows = _fairseq_rows(file, _lines(file, text)[1:])
        if root is None:
            folders = [_fairseq_root(file, first)]
            notes.append(f"{file}: paths are relative to {folders[0]}, as its first line says")
        else:
            folders.insert(1, file.parent / first)
    return from_rows(file, rows, root, folders, notes)


def from_rows(
    file: Path, rows: Iterable[Numbered], root: Path | None, folders: Sequence[Path], notes: Sequence[str] = ()
) -> UtteranceSource:
    """The utterances of a list whose rows are read, with paths relative to the first of `folders` that has them."""
    numbered = list(rows)
    if not numbered:
        raise SourceError(f"{file}: no utterance, expected one per line")
    folder = _find_folder(file, str(numbered[0][1]["path"]), folders).resolve()
    root = (root or folder).resolve()
    _check_paths(file, numbered, folder, root)
    home = file.parent.absolute()
    entries = [_entry({"id": _name(row["path"], home), **row}, folder, f"{file}:{number}") for number, row in numbered]
    _check_unique(file, [(number, entry.id) for (number, _), entry in zip(numbered, entries, strict=True)])
    return UtteranceSource(f"manifest {file}, root {root}", entries, FileReader(root, folder), tuple(notes))


def _text(file: Path) -> str:
    """A list's text, unpacked where it is a .gz, which may not grow without bound."""
    try:
        most = _MOST_RATIO * (file.stat().st_size + _SLACK)
        with open_regular(file) as handle:
            content = gzip.GzipFile(fileobj=handle).read(most + 1) if file.suffix == ".gz" else handle.readall()
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"{file}: cannot be read ({error})") from error
    if file.suffix == ".gz" and len(content) > most:
        raise SourceError(f"{file}: grows to more than {most} bytes, {_MOST_RATIO} times its size; unpack it first")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{file}: not UTF-8 text at byte {error.start}; expected a .tsv or .jsonl manifest"
        ) from error


def _lines(file: Path, text: str) -> list[str]:
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise _empty(file, number)
    return lines


def _empty(file: Path, number: int) -> SourceError:
    return SourceError(f"{file}:{number}: empty line, expected an utterance; remove it")


def _json_rows(file: Path, lines: list[str], chosen: Chosen, notes: list[str]) -> Iterator[Numbered]:
    silent = 0
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{file}:{number}: not JSON ({error})") from error
        where, span = f"{file}:{number}", None
        if isinstance(row, dict):
            said, (row, span) = row.get("supervisions"), of_object(row, where)
            silent += bool(said) and "text" not in row
            if number == 1 and said is None:
                notes += _unused(file, row, choose_columns(names_in(row), chosen, where))
        known = _known(row, chosen, where) if isinstance(row, Mapping) else {}
        if not isinstance(known.get("path"), str):
            raise SourceError(f"{file}:{number}: expected an object with a text under 'path', found {line[:80]!r}")
        yield number, known | {"span": span}
    if silent:
        notes.append(
            f"{file}: {silent} cuts are of several speakers or reach into other texts, and have no text here; in "
            "lhotse, cuts.trim_to_supervisions() gives one cut per text"
        )


def _known(row: Mapping[str, Any], chosen: Chosen, where: str) -> dict[str, Any]:
    """The known columns under our names."""
    cells = {key: value_at(row, name) for key, name in choose_columns(names_in(row), chosen, where).items()}
    return {key: value for key, value in cells.items() if value is not None}


def _unused(file: Path, columns: Iterable[str], taken: Mapping[str, str]) -> list[str]:
    """A note on columns that nothing is made of."""
    used = {name.partition(".")[0] for name in taken.values()} | {"offset", "duration"}
    names = [name for name in columns if name not in used]
    cure = "--text-column, --speaker-column and --id-column name others"
    return [f"{file}: columns not used: {listed(names)} ({cure})"] if names else []


def _table_rows(file: Path, table: Any, chosen: Chosen, notes: list[str]) -> Iterator[Numbered]:
    """Rows of a csv.reader; in a TSV, a quote is an ordinary character."""
    cells = _cells(file, table)
    columns = next(cells, (1, []))[1]
    taken = choose_columns(columns, chosen, f"{file}:1")
    if len(set(columns)) < len(columns) or "path" not in taken:
        raise SourceError(
            f"{file}:1: found columns {listed(columns)}; expected path and, optional, id, samples, speaker, text, "
            "each once (or fairseq's form: the root folder alone on the first line)"
        )
    notes += _unused(file, columns, taken)
    for number, row in cells:
        if len(row) != len(columns):
            raise SourceError(f"{file}:{number}: found {len(row)} columns, the header has {len(columns)}")
        named = dict(zip(columns, row, strict=True))
        yield number, {key: named[name] for key, name in taken.items()}


def _cells(file: Path, table: Any) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and cells of a csv.reader, whose own errors do not name the line."""
    try:
        for cells in table:
            if not "".join(cells).strip() and len(cells) <= 1:
                raise _empty(file, table.line_num)
            yield table.line_num, cells
    except csv.Error as error:
        raise SourceError(f"{file}:{table.line_num}: {error}") from error


def _fairseq_rows(file: Path, lines: list[str]) -> Iterator[Numbered]:
    for number, line in enumerate(lines, 2):
        cells = line.split("\t")
        if len(cells) != 2:  # noqa: PLR2004
            raise SourceError(f"{file}:{number}: found {len(cells)} columns, expected path TAB samples")
        yield number, {"path": cells[0], "samples": cells[1]}


def _fairseq_root(file: Path, line: str) -> Path:
    """The folder in the first line of fairseq's .tsv; if relative, to the manifest's folder."""
    root = file.parent / line
    if not root.is_dir():
        raise SourceError(f"{file}:1: root {line!r} is not a folder; pass --root FOLDER")
    return root


def _find_folder(file: Path, first: str, folders: Sequence[Path]) -> Path:
    """The one of `folders` that has the first path of a manifest; of an absolute path, that it lies in."""
    if len(folders) == 1:
        return folders[0]
    _check_name(first, f"{file}, first utterance")
    having = [folder for folder in folders if (folder / first).exists()]
    for folder in having:
        if inside(folder / first, folder.resolve()):
            return folder
    if having:
        return having[0]
    raise SourceError(
        f"{file}: first path {first!r} is neither under {' nor under '.join(map(str, folders))}; pass --root FOLDER"
    )


def _check_name(path: str, where: str) -> None:
    pure = PurePosixPath(path)
    too_long = any(len(part.encode("utf-8", "replace")) > _MOST_NAME_BYTES for part in pure.parts)
    if pure.name in ("", "..") or "\0" in path or too_long:
        raise SourceError(f"{where}: path {path[:_MOST_NAME_BYTES]!r} names no file")


def _check_paths(file: Path, numbered: list[Numbered], folder: Path, root: Path) -> None:
    """All paths have to exist, inside of the root."""
    for number, row in numbered:
        _check_name(row["path"], f"{file}:{number}")
        if not inside(folder / row["path"], root):
            cure = root_cure(folder / row["path"] for _, row in numbered)
            raise SourceError(f"{file}:{number}: path {row['path']!r} leads out of {root}; {cure}")
        if not (folder / row["path"]).exists():
            raise SourceError(
                f"{file}:{number}: path {row['path']!r} does not exist under {folder} (columns swapped? blank at the "
                "end?)"
            )


def _name(path: str, home: Path) -> str:
    """The id of a row without one: its path without suffix, an absolute one from the manifest's folder or / on."""
    pure = PurePosixPath(path).with_suffix("")
    return str(pure.relative_to(home) if pure.is_relative_to(home) else pure).lstrip("/")


def _entry(row: Mapping[str, Any], folder: Path, where: str) -> Entry:
    texts = {}
    for key, value in (("id", row["id"]), ("speaker", row.get("speaker")), ("text", row.get("text"))):
        try:
            texts[key] = text_of(value)
        except ValueError as error:
            raise SourceError(f"{where}: {key} {error}; --{key}-column names another column") from error
    texts["text"] = one_line(texts["text"])
    if not texts["id"] or texts["id"] != texts["id"].strip():
        raise SourceError(f"{where}: id is {texts['id']!r}, expected text without blanks at its ends")
    samples = _samples(row.get("samples"), where)
    phones = alignment(row.get("phones"), samples, where)
    path = row["path"]
    return Entry(
        **texts, audio=path, stamp=stamp_of(folder / path), samples=samples, phones=phones, span=row.get("span")
    )


def _samples(value: Any, where: str) -> int | None:
    if value is None or value == "":
        return None
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < _MOST_DIGITS:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise SourceError(f"{where}: samples is {value!r}, expected a whole number (columns swapped?)")
    return value


def alignment(value: Any, samples: int | None, where: str) -> PhoneTimes | None:
    """The phones of an utterance, checked; `where` it stands is for messages."""
    if value is None:
        return None
    if not isinstance(value, dict) or set(value) != set(PhoneTimes._fields):
        raise SourceError(f"{where}: phones has to be an object with symbols, starts, ends (in samples)")
    if not all(isinstance(column, list) for column in value.values()):
        raise SourceError(f"{where}: phones: symbols, starts and ends have to be lists")
    phones = PhoneTimes(**value)
    numbers = [*phones.starts, *phones.ends]
    texts = all(_is_text(symbol) for symbol in phones.symbols)
    if not texts or not all(isinstance(number, int) for number in numbers):
        raise SourceError(f"{where}: phones: expected texts under symbols, whole numbers under starts and ends")
    spans = sorted(numbers) == [n for pair in zip(phones.starts, phones.ends, strict=False) for n in pair]
    if not len(phones.symbols) == len(phones.starts) == len(phones.ends) or not spans or min(numbers, default=0) < 0:
        raise SourceError(f"{where}: phones: expected as many starts and ends as symbols, ascending, none overlapping")
    if samples is not None and max(numbers, default=0) > samples:
        raise SourceError(f"{where}: phones end at sample {max(numbers)}, the utterance has {samples}")
    return phones


def _is_text(value: Any) -> bool:
    try:
        return isinstance(value, str) and value == text_of(value)
    except ValueError:
        return False


def _check_unique(file: Path, names: list[tuple[int, str]]) -> None:
    seen: dict[str, int] = {}
    for number, name in names:
        if name in seen:
            raise SourceError(
                f"{file}:{number}: id {name!r} stands in line {seen[name]} already; ids have to be unique "
                "(--id-column names a column that is, such as the path's)"
            )
        seen[name] = number
