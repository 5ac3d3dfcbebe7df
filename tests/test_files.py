"""A file is the old one or the new one, and nothing is left beside it; JSON is read within bounds."""

import os
from pathlib import Path

import pytest

from wavlm_jax.files import open_regular, read_json, replacing, write_json
from wavlm_jax.settings import SettingsError
from wavlm_jax.text.records import RecordError, read_rttm


def test_new_content_takes_the_place_of_the_old(tmp_path):
    path = tmp_path / "folder" / "answers.json"
    for content in ("old", "new"):
        with replacing(path) as draft:
            draft.write_text(content)
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("stop", [OSError("No space left on device"), KeyboardInterrupt(), SystemExit(143)])
def test_what_stops_the_writer_leaves_the_old_file(tmp_path, stop):
    path = tmp_path / "answers.json"
    path.write_text("old")

    def write_half():
        with replacing(path) as draft:
            draft.write_text("half of the n")
            raise stop

    with pytest.raises(type(stop)):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_who_reads_before_the_end_finds_the_old_file(tmp_path):
    path = tmp_path / "answers.json"
    path.write_text("old")
    with replacing(path) as draft:
        draft.write_text("new")
        assert path.read_text() == "old"
        assert isinstance(draft, Path)
        assert draft.parent == tmp_path


def test_json_comes_back(tmp_path):
    values = {"name": "Ünïcode", "sizes": [1, 2.5, None], "inner": {"flag": True}}
    write_json(tmp_path / "a.json", values)
    assert read_json(tmp_path / "a.json") == values
    assert list(tmp_path.iterdir()) == [tmp_path / "a.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b" " * (64 * 2**20 + 1)])
def test_what_is_no_json_object_is_named(tmp_path, content):
    (tmp_path / "b.json").write_bytes(content)
    with pytest.raises(SettingsError, match=r"b\.json: "):
        read_json(tmp_path / "b.json")


def test_a_pipe_is_refused_at_once_where_anything_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "link", tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match="expected a file"):
            open_regular(path)
    with pytest.raises(OSError, match="expected a file"):
        read_json(tmp_path / "pipe")
    with pytest.raises(RecordError, match=r"pipe: a folder, pipe or device, expected a file"):
        read_rttm(tmp_path / "pipe")
