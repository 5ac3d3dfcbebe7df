"""Layouts of well-known corpora, as rows that a manifest could have: id, path, speaker, text, phones.

A function per layout. Those of folders say what stands beside each audio file; those of lists make rows of their own.
docs/data.md has the table.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from wavlm_jax.audio.folders import AudioFolder
from wavlm_jax.audio.wave import Span
from wavlm_jax.data.entries import SourceError, text_of
from wavlm_jax.files import read_json
from wavlm_jax.text.records import read_lines

Row: TypeAlias = dict[str, Any]
Beside: TypeAlias = dict[str, Row | None]
"""Path of an audio file -> its row; None: the file is a further copy of another one, and is left out."""
Numbered: TypeAlias = tuple[int, Mapping[str, Any]]
"""Number of a line, and its columns."""

_COUNT = re.compile(r"[0-9]{1,17}")
_VOXCELEB = re.compile(r"(?:^|/)(id\d{5})/[^/]+/[^/]+$")
_VCTK = re.compile(r"((?:.*/)?)wav48[^/]*/([^/]+)/([^/]+?)(_mic[12])?\.[^./]+$")
_INNER_EDGE = 0.05
"""Seconds by which a text may reach over the end of its piece: roundings of the list."""


def beside(folder: AudioFolder) -> tuple[list[str], Beside]:
    """Names of the layouts that a folder has, and what they say of its audio files."""
    names, rows = list[str](), Beside()
    layouts = {
        "LibriSpeech": _librispeech,
        "Libri-Light": _libri_light,
        "TIMIT": _timit,
        "VCTK": _vctk,
        "VoxCeleb": _voxceleb,
    }
    for name, layout in layouts.items():
        if found := layout(folder):
            names.append(name)
            rows = found | rows
    return names, rows


def _stem(path: str) -> str:
    return os.path.splitext(path)[0]  # noqa: PTH122  (Path would normalise odd names)


def _librispeech(folder: AudioFolder) -> Beside:
    """`SPEAKER-CHAPTER.trans.txt` beside `SPEAKER-CHAPTER-NUMBER.flac`: an id and its text per line."""
    paths, rows = {_stem(path): path for path in folder.audio}, Beside()
    for file in folder.others:
        if file.endswith(".trans.txt"):
            place = os.path.dirname(file)  # noqa: PTH120
            for _, line in read_lines(folder.root / file):
                name, _, text = line.strip().partition(" ")
                stem = os.path.join(place, name)  # noqa: PTH118
                speaker = name.partition("-")[0] if "-" in name else ""
                rows[paths.get(stem, stem)] = {"speaker": speaker, "text": text.strip()}
    return rows


def _libri_light(folder: AudioFolder) -> Beside:
    """`NAME.json` with a `speaker` beside NAME.flac."""
    paths, rows = {_stem(path): path for path in folder.audio}, Beside()
    for file in folder.others:
        if file.endswith(".json") and (path := paths.get(_stem(file))) is not None:
            with contextlib.suppress(
                ValueError, KeyError, OSError
            ):  # another program's file, of which nothing is known
                rows[path] = {"speaker": text_of(read_json(folder.root / file)["speaker"])}
    return rows


def _timit(folder: AudioFolder) -> Beside:
    """`NAME.PHN`, `.WRD` and `.TXT` beside NAME.WAV in the folder of a speaker; times in samples.

    Copies that others have made (NAME.WAV.wav) count where the original is not there.
    """
    others, rows = {path.lower(): path for path in folder.others}, Beside()
    originals = set(folder.audio)
    for path in folder.audio:
        stem = _stem(path)
        if stem in originals and stem.lower().endswith(".wav"):
            rows[path] = None
            continue
        name = (_stem(stem) if stem.lower().endswith(".wav") else stem).lower()
        phones, words, text = (others.get(name + ending) for ending in (".phn", ".wrd", ".txt"))
        if phones is None and words is None:
            continue
        row: Row = {"speaker": PurePosixPath(path).parent.name}
        if (said := words if text is None else text) is not None:
            row["text"] = " ".join(what for _, _, what in _timed(folder.root / said))
        if phones is not None and (found := _timed(folder.root / phones)):
            starts, ends, symbols = (list(column) for column in zip(*found, strict=True))
            row["phones"] = {"symbols": symbols, "starts": starts, "ends": ends}
        rows[path] = row
    return rows if any(rows.values()) else {}


def _timed(file: Path) -> list[tuple[int, int, str]]:
    """The lines `start end what` of a file; times in samples."""
    found = []
    for number, line in read_lines(file):
        cells = line.strip().split(" ", 2)
        if len(cells) != 3 or not all(_COUNT.fullmatch(cell) for cell in cells[:2]):  # noqa: PLR2004
            raise SourceError(f"{file}:{number}: found {line.strip()[:60]!r}, expected start end text, in samples")
        found.append((int(cells[0]), int(cells[1]), cells[2].strip()))
    return found


def _vctk(folder: AudioFolder) -> Beside:
    """`txt/SPEAKER/NAME.txt` beside `wav48*/SPEAKER/NAME[_mic1].*`; the second microphone counts where it is alone."""
    others, rows = set(folder.others), Beside()
    firsts = {_stem(path) for path in folder.audio}
    texts: dict[str, str] = {}
    for path in folder.audio:
        match = _VCTK.match(path)
        if match is None:
            continue
        place, speaker, name, microphone = match.groups()
        if microphone == "_mic2" and _stem(path).removesuffix("_mic2") + "_mic1" in firsts:
            rows[path] = None
            continue
        text = f"{place}txt/{speaker}/{name}.txt"
        if text in others:
            texts[path] = " ".join(line.strip() for _, line in read_lines(folder.root / text)).strip()
        rows[path] = {"speaker": speaker, "text": texts.get(path, "")}
    return rows if texts else {}


def _voxceleb(folder: AudioFolder) -> Beside:
    """`idNNNNN/VIDEO/NUMBER.*`: the speaker is a folder."""
    return {path: {"speaker": match[1]} for path in folder.audio if (match := _VOXCELEB.search(path))}


def common_voice(folder: Path) -> dict[str, Path]:
    """The table of each split beside `clips/`; nothing where it is not this layout."""
    tables = {}
    if (folder / "clips").is_dir():
        for file in sorted(folder.glob("*.tsv")):
            line = next(read_lines(file), (1, ""))[1]
            if {"client_id", "path"} <= set(line.split("\t")):
                tables[file.stem] = file
    return tables


def ljspeech(file: Path, lines: list[str]) -> Iterator[Numbered]:
    """`id|text|normalised text` per line, without a header; the audio is wavs/ID.wav."""
    for number, line in enumerate(lines, 1):
        cells = line.split("|")
        if len(cells) not in (2, 3):
            raise SourceError(
                f"{file}:{number}: found {len(cells)} columns, expected id|text or id|text|normalised text"
            )
        yield (
            number,
            {"id": cells[0], "path": f"wavs/{cells[0]}.wav", "raw_text": cells[1], "text": cells[-1] or cells[1]},
        )


def is_ljspeech(file: Path, first: str) -> bool:
    """Whether the first line of a list is one of LJSpeech."""
    name, bar, _ = first.partition("|")
    return bool(bar) and "/" not in name and (file.parent / f"wavs/{name}.wav").is_file()


def kaldi(folder: Path, *, whole: bool) -> tuple[Path, Iterator[Numbered]]:
    """The list of a Kaldi data folder and its rows: `segments` of recordings, or whole ones.

    Args:
        folder: has wav.scp and, optional, segments, text, utt2spk.
        whole: recordings as wholes, also where there are segments.

    Raises:
        SourceError: names the line. The commands of a wav.scp are refused, never run.

    """
    recordings = {}
    for number, name, path in _table(folder / "wav.scp"):
        if path.endswith("|") or path.startswith("|") or path == "-":
            raise SourceError(
                f"{folder / 'wav.scp'}:{number}: {name} is the output of a command ({path[:60]}), which is not run; "
                "make audio files of it first, for example with wav-copy scp:wav.scp"
            )
        recordings[name] = path
    cut = (folder / "segments").is_file() and not whole
    return folder / ("segments" if cut else "wav.scp"), _kaldi_rows(folder, recordings, cut=cut)


def _kaldi_rows(folder: Path, recordings: Mapping[str, str], *, cut: bool) -> Iterator[Numbered]:
    texts, speakers = (
        {name: rest for _, name, rest in _table(folder / part)} if (folder / part).is_file() else {}
        for part in ("text", "utt2spk")
    )
    file = folder / ("segments" if cut else "wav.scp")
    for number, name, rest in _table(file):
        row = {"id": name, "speaker": speakers.get(name, ""), "text": texts.get(name, "")}
        if not cut:
            yield number, row | {"path": rest}
            continue
        recording, start, end = [*rest.split(), "", "", ""][:3]
        if recording not in recordings:
            raise SourceError(f"{file}:{number}: recording {recording[:60]!r} is not in {folder / 'wav.scp'}")
        begin, stop = (_seconds(value, f"{file}:{number}") for value in (start, end))
        yield number, row | {"path": recordings[recording], "span": Span(begin, None if stop < 0 else stop - begin)}


def _table(file: Path) -> Iterator[tuple[int, str, str]]:
    """Line number, first word, and the rest of each line."""
    for number, line in read_lines(file):
        name, *rest = line.split(None, 1) or [""]
        if not name or not (rest or file.name == "text"):
            raise SourceError(f"{file}:{number}: found {line.strip()[:60]!r}, expected a name and its value")
        yield number, name, "".join(rest).strip()


def _seconds(value: Any, where: str) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = float("nan")
    if not abs(seconds) < 1e9:  # noqa: PLR2004  (NaN and infinity, too)
        raise SourceError(f"{where}: found the time {str(value)[:60]!r}, expected seconds")
    return seconds


def of_object(row: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], Span | None]:
    """A JSON line of lhotse or NeMo as columns of a manifest, and the part of the file that it means."""
    if "supervisions" in row or str(row.get("type", "")).endswith("Cut"):
        return _lhotse(row, where)
    if "audio_filepath" in row and (row.get("offset") or row.get("duration")):
        start, duration = (row.get(key) for key in ("offset", "duration"))
        return row, Span(_seconds(start or 0, where), None if duration is None else _seconds(duration, where))
    return row, None


def _lhotse(cut: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], Span | None]:
    """A MonoCut of a recording in a file. Its text is that of its supervisions, where all lie within the cut."""
    recording, said = cut.get("recording"), cut.get("supervisions") or []
    recording = recording if isinstance(recording, dict) else {}
    channel, sources = cut.get("channel"), recording.get("sources")
    if cut.get("type", "MonoCut") != "MonoCut" or not isinstance(channel, int) or not isinstance(sources, list):
        raise SourceError(
            f"{where}: found {cut.get('type')!r}, expected a MonoCut with a recording (lhotse: to_mono())"
        )
    if recording.get("transforms") or "tracks" in cut:
        raise SourceError(f"{where}: the cut changes its audio (transforms); write it first: cuts.save_audios(...)")
    held = [
        s for s in sources if isinstance(s, dict) and isinstance(s.get("channels"), list) and channel in s["channels"]
    ]
    if len(held) != 1 or held[0].get("type") != "file" or not isinstance(said, list):
        raise SourceError(f"{where}: channel {channel} is in no file (commands are not run; cuts.save_audios(...))")
    start, duration = _seconds(cut.get("start"), where), _seconds(cut.get("duration"), where)
    row = {"id": cut.get("id"), "path": held[0].get("source")}
    if said and all(isinstance(s, dict) and _lies_in(s, duration, where) for s in said):
        said = sorted(said, key=lambda s: _seconds(s.get("start"), where))
        if all(s.get("speaker") == said[0].get("speaker") for s in said):
            texts = [s["text"] for s in said if isinstance(s.get("text"), str)]
            row |= {"speaker": said[0].get("speaker"), "text": " ".join(texts)}
    return row, Span(start, duration, held[0]["channels"].index(channel))


def _lies_in(said: Mapping[str, Any], duration: float, where: str) -> bool:
    start, length = (_seconds(said.get(key), where) for key in ("start", "duration"))
    return start >= -_INNER_EDGE and start + length <= duration + _INNER_EDGE
