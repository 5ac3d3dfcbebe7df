"""A file is the old one or the new one, and nothing is left beside it."""

from pathlib import Path

import pytest

from wavlm_jax.files import replacing


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
