"""Files with flipped bits, cut short, or with a part set to zero: checkpoints, corpora, labels, weights, audio.

    python -m tests.attacks.hostile_files --seed 0 --count 220

Clean is: an error of ours (ValueError or OSError) that names the file or its folder, or the very content; where nothing
in the format has a checksum (safetensors, config.json, vocabularies, PCM), other content too. Not clean: a traceback,
more than a minute, more than 2 GiB, other content in spite of a checksum, cut audio taken as whole.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

import wavlm_jax
import wavlm_jax.inference.running
import wavlm_jax.loading
from pretrain.labels import LabelSettings
from pretrain.preflight import check_labels
from tests.attacks import Tally, attempt, made, options
from tests.support.toy_task import digest
from tests.support.train_flags import parsed
from wavlm_jax.audio.recordings import open_recordings
from wavlm_jax.data.corpus import Corpus
from wavlm_jax.settings import read
from wavlm_jax.text.vocabulary import Vocabulary, read_vocabulary
from wavlm_jax.training.checkpoint import load_stored

SOUND: list[Path] = []
"""Where the sound files are; forks know it."""


class Target(NamedTuple):
    """Files of one kind."""

    folder: str
    """What is copied before a file of it is damaged; may be a file."""
    pattern: str
    """Which files of it."""
    read: Callable[[Path], str]
    """From the folder to a digest of all that is in it."""
    checked: bool
    """Whether a checksum covers all of it."""


def checkpoint(run: Path) -> str:
    """The newest checkpoint that verifies: its step and parameters."""
    manifest, params = load_stored(run)
    return f"{manifest.step} {digest(params)}"


def corpus(folder: Path) -> str:
    """As the command `verify`, then every sample and column."""
    opened = Corpus.open(folder)
    opened.verify()
    total = hashlib.sha256(opened.fingerprint.encode())
    for index in range(len(opened)):
        total.update(opened.wave(index).tobytes())
    for column in (opened.lengths, opened.means, opened.variances):
        total.update(np.ascontiguousarray(column).tobytes())
    total.update(json.dumps([list(opened.ids), list(opened.texts)]).encode())
    return total.hexdigest()


def labels(folder: Path) -> str:
    """The preflight of training, then every label."""
    flags = json.loads((SOUND[0] / "flags.json").read_text())
    section = dict(parsed("configs/pretrain/demo.py", *flags).labels.items())
    settings = read({**section, "path": str(folder)}, LabelSettings, "labels")
    root = SOUND[0] / "corpus"
    stores = check_labels(settings, {split: Corpus.open(root / split) for split in ("train", "valid")})
    parts = (np.concatenate([store.labels(index) for index in range(len(store))]) for store in stores.values())
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def weights(place: Path) -> str:
    return digest(wavlm_jax.loading.load(place).params)


def vocabulary(folder: Path) -> str:
    found = read_vocabulary(folder)
    return repr(found) if isinstance(found, Vocabulary) else "none"


def audio(file: Path) -> str:
    (recording,) = open_recordings([file])
    return hashlib.sha256(recording.read().tobytes()).hexdigest()


TARGETS = {
    "manifest": Target("run", "checkpoints/4/manifest.json", checkpoint, True),
    "checkpoint": Target("run", "checkpoints/4/**/*", checkpoint, True),
    "corpus header": Target("corpus/valid", "header.json", corpus, False),
    "corpus shard": Target("corpus/valid", "*.arrow", corpus, True),
    "label header": Target("labels", "*.json", labels, False),
    "labels": Target("labels", "*labels*.npy", labels, True),
    "label offsets": Target("labels", "*offsets*.npy", labels, False),
    ".pt": Target("encoder.pt", "", weights, True),
    "safetensors": Target("encoder", "model.safetensors", weights, False),
    "config.json": Target("encoder", "config.json", weights, False),
    "vocabulary": Target("ctc", "*vocab*.json", vocabulary, False),
    "tokenizer": Target("ctc", "*token*.json", vocabulary, False),
    "wav": Target("a.wav", "", audio, False),
    "flac": Target("a.flac", "", audio, True),
    "mp3": Target("a.mp3", "", audio, False),
    "ogg": Target("a.ogg", "", audio, True),
    "aiff": Target("a.aiff", "", audio, False),
    "w64": Target("a.w64", "", audio, False),
}
SHARES = [name for name in TARGETS for _ in range(3 if name in ("checkpoint", "manifest", ".pt", "wav") else 2)]


def damage(content: bytes, random: np.random.Generator) -> tuple[bytes, str]:
    """The content with one kind of damage, and its name."""
    kind = random.choice(["bit", "bit in the head", "bits", "cut", "zeros"])
    changed, size = bytearray(content), len(content)
    if kind == "cut":
        kept = int(random.integers(size))
        return content[:kept], f"cut to {kept} of {size}"
    if kind == "zeros":
        at = int(random.integers(size))
        changed[at : at + 16] = bytes(len(changed[at : at + 16]))
        return bytes(changed), f"zeros at {at} of {size}"
    reach = min(size, 64) if kind == "bit in the head" else size
    places = random.integers(reach, size=8 if kind == "bits" else 1)
    for place in places:
        changed[place] ^= 1 << int(random.integers(8))
    return bytes(changed), f"{kind} at {', '.join(map(str, places))} of {size}"


def say(target: Target, place: Path) -> None:
    """The digest on stdout; what a command would have as message on stderr, and its exit code."""
    try:
        print(target.read(place))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def damaged_copy(root: Path, target: Target, place: Path, random: np.random.Generator) -> tuple[Path, str]:
    """A copy with one damaged file, and what was done."""
    source, copy = root / target.folder, place / Path(target.folder).name
    if source.is_file():
        shutil.copy(source, copy)
        file = copy
    else:
        shutil.copytree(source, copy)
        files = sorted(path for path in copy.glob(target.pattern) if path.is_file() and path.stat().st_size)
        file = files[int(random.integers(len(files)))]
    content, what = damage(file.read_bytes(), random)
    file.write_bytes(content)
    return copy, f"{file.relative_to(place)} {what}"


def main() -> int:
    given, tally = options(__doc__, 220), Tally()
    root = given.work / "in"
    root.mkdir(exist_ok=True)
    SOUND.append(root)
    if not (root / "flags.json").exists():
        made.all_in(root, given.work)
    sound: dict[str, set[str]] = {}
    for name, target in TARGETS.items():
        came = attempt(partial(say, target, root / target.folder), given.work)
        if came.code:
            raise SystemExit(f"{name}: the sound one is refused: {came.err}")
        sound[name] = {came.out}
    params = attempt(lambda: print("2", digest(load_stored(root / "run", 2)[1])), given.work).out
    sound["manifest"].add(params)
    sound["checkpoint"].add(params)
    for number in range(given.count):
        name = SHARES[number % len(SHARES)]
        if given.only not in name:
            continue
        random = np.random.default_rng((given.seed, number))
        target, place = TARGETS[name], given.work / "damaged" / f"{number:03d}"
        place.mkdir(parents=True, exist_ok=True)
        copy, what = damaged_copy(root, target, place, random)
        came = attempt(partial(say, target, copy), place, seconds=60)
        fault, same = came.fault(), came.out in sound[name]
        if not fault and came.code and copy.name not in came.err:
            fault = f"does not name {copy.name}: {came.err[:200]}"
        if (
            not fault
            and not came.code
            and not same
            and (target.checked or (target.read is audio and " cut to" in what))
        ):
            fault = "other content, in spite of a checksum" if target.checked else "cut, and nothing said"
        answer = came.err.strip().splitlines()[0][:140] if came.code and came.err.strip() else ""
        end = answer or ("the very content" if same else "other content, no checksum")
        tally.add(
            f"{number} {name}: {what}", name, f"{came.seconds:.1f} s, {came.memory / 2**20:.0f} MiB: {end}", fault
        )
        shutil.rmtree(place)
    return tally.close()


if __name__ == "__main__":
    sys.exit(main())
