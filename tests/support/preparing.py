"""`python -m wavlm_jax.data` on generated speech, in this process."""

import json
from pathlib import Path

import pytest

from tests.support.audio_files import save, tone
from wavlm_jax.audio.wave import to_int16
from wavlm_jax.data.__main__ import main


def speech(root: Path, count: int = 8, length: int = 3000) -> Path:
    """A folder of FLAC files of different lengths."""
    for number in range(count):
        save(root / f"{number:04d}.flac", to_int16(tone(length + 10 * number, number)))
    return root


def run(*words: object) -> int:
    return main([str(word) for word in words] + ["--workers", "1"])


def failure(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The message of a run that has to fail."""
    capsys.readouterr()
    assert run(*words) == 2
    return capsys.readouterr().err


def bad_files(corpus: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in (corpus / "bad_files.jsonl").read_text().splitlines()]
    assert all(set(row) == {"id", "path", "fault", "detail"} for row in rows)
    return {row["id"]: row["fault"] for row in rows}
