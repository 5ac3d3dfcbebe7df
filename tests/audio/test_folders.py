"""Folders of audio as they are: every file is listed, or said to be left out."""

from pathlib import Path

import pytest

from tests.support.audio_files import hide_pyav, save, tone
from wavlm_jax.audio.folders import walk


def test_every_file_of_audio_is_listed_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hide_pyav(monkeypatch)
    for name in ("a.wav", "b/c.Flac", "b/d.caf", "e.rf64", "f.aifc", "g.nist", "h.snd"):
        save(tmp_path / name, tone(500), kind={"nist": "NIST", "snd": "AU", "aifc": "AIFF"}.get(name[2:]))
    for name in ("x.m4a", "b/y.M4A", "z.webm", "a.txt", "._a.wav", ".Trash/old.wav", "__MACOSX/._a.wav", ".git/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    found = walk(tmp_path)
    assert found.audio == ["a.wav", "b/c.Flac", "b/d.caf", "e.rf64", "f.aifc", "g.nist", "h.snd"]
    assert found.others == ["a.txt", "b/y.M4A", "x.m4a", "z.webm"]
    assert found.unread == ["b/y.M4A", "x.m4a", "z.webm"]
    hidden, unread = found.notes
    assert hidden == f"{tmp_path}: left out as hidden: .Trash/, ._a.wav, .git/ and 1 more"
    cure = "pip install 'wavlm-jax[containers]', or convert them, for example to flac"
    assert unread == f"{tmp_path}: left out, not read: 2 .m4a, 1 .webm; {cure}"


def test_with_pyav_its_kinds_are_audio(tmp_path: Path):
    for name in ("a.m4a", "b.webm", "c.ape"):
        (tmp_path / name).touch()
    found = walk(tmp_path)
    assert found.audio == ["a.m4a", "b.webm"]
    assert found.notes == (f"{tmp_path}: left out, not read: 1 .ape; convert them, for example to flac",)


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch):
    def refuse(_root: Path, onerror):
        onerror(PermissionError(13, "Permission denied", "in/locked"))
        return iter(())

    monkeypatch.setattr("wavlm_jax.audio.folders.os.walk", refuse)
    assert walk(tmp_path).notes == ("in/locked: left out: Permission denied",)
