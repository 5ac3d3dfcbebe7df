"""The picture of a run is a picture of its numbers."""

import json

import pytest

from pretrain.curves import draw, main, names, read_records, series

RECORDS = [
    {"step": 10, "masked_loss": 4.0, "masked_accuracy": 0.1, "grad_norm": 2.0},
    {"step": 20, "masked_loss": 3.0, "masked_accuracy": 0.2, "grad_norm": 1.0, "label_entropy": 4.5},
    {"step": 20, "kind": "eval/valid", "masked_accuracy": 0.15},
]


def test_series_and_names_are_found_in_the_records(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    records = read_records(path)
    assert series(records, "masked_loss") == ([10, 20], [4.0, 3.0])
    assert names(records, ("masked_accuracy",)) == ["masked_accuracy", "valid/masked_accuracy"]


def test_a_png_with_content_is_drawn(tmp_path):
    from matplotlib import image

    records = [RECORDS[0], RECORDS[1], {"step": 20, "valid/masked_accuracy": 0.15}]
    draw({"a": records, "b": records}, tmp_path / "deep" / "curves.png", {"unigram": 0.05})
    pixels = image.imread(tmp_path / "deep" / "curves.png")
    assert pixels.shape[:2] == (770, 1210)
    assert pixels[..., :3].std() > 0.05


def test_any_metrics_are_drawn_a_panel_each(tmp_path, monkeypatch, capsys):
    from matplotlib import image

    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text('{"step": 10, "loss": 3.0, "kind": "train"}\n{"step": 10, "cer": 0.5, "kind": "eval/valid"}\n')
    ask = ["curves", str(path), "--out", str(tmp_path / "two.png"), "--panels", "loss", "cer"]
    monkeypatch.setattr("sys.argv", ask)
    main()
    pixels = image.imread(tmp_path / "two.png")
    assert pixels.shape[:2] == (385, 1210)
    assert all(half.std() > 0.05 for half in (pixels[:, :605, :3], pixels[:, 605:, :3]))
    monkeypatch.setattr("sys.argv", [*ask, "wer"])
    with pytest.raises(SystemExit):
        main()
    assert "wer: in none of" in capsys.readouterr().err


@pytest.mark.parametrize(("line", "message"), [('{"step": 1', "2: not a JSON line"), ("[1]", "2: found list")])
def test_a_damaged_line_is_named(tmp_path, line, message):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_records(path)
    path.write_bytes(b"RIFF\x80")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: not UTF-8 text"):
        read_records(path)
