"""A corpus in memory with the attributes that labels need: noise and tones whose phones are known."""

import hashlib

import numpy as np

from pretrain.labels import FORMAT, LabelHeader, SplitHeader, SplitWriter, utterance_keys
from wavlm_jax.data.corpus import Corpus, Phones

SEGMENT = 3200


class FakeCorpus(Corpus):
    """Utterance i is made from (seed, i) when it is asked for: segments of 0.2 s, each one of four sounds or noise."""

    def __init__(self, lengths, seed=0, aligned=True):
        self.lengths = np.asarray(lengths, np.int64)
        self.ids = [f"speaker{i % 3}-{i:04d}" for i in range(len(self.lengths))]
        self.seed, self.aligned = seed, aligned
        self.means = np.zeros(len(self.lengths), np.float32)
        self.variances = np.ones(len(self.lengths), np.float32)
        for i in range(len(self.lengths)):
            scaled = self.wave(i) / 32768
            self.means[i], self.variances[i] = scaled.mean(), scaled.var()

    def __len__(self):
        return len(self.lengths)

    def __repr__(self):
        return f"FakeCorpus({len(self)} utterances)"

    @property
    def fingerprint(self):
        return hashlib.sha256(f"{self.seed} {self.lengths.tolist()}".encode()).hexdigest()

    def wave(self, index, start=0, num_samples=None):
        length, sounds = int(self.lengths[index]), self._sounds(index)
        rng = np.random.default_rng((self.seed, index, 1))
        wave = rng.normal(size=length) * 300
        time = np.arange(length) / 16000
        for number, sound in enumerate(sounds):
            part = slice(number * SEGMENT, (number + 1) * SEGMENT)
            wave[part] += sound * 4000 * np.sin(2 * np.pi * 250 * 2**sound * time[part])
        end = length if num_samples is None else start + num_samples
        return wave.astype(np.int16)[start:end]

    def phones(self, index):
        if not self.aligned:
            return None
        sounds, length = self._sounds(index), int(self.lengths[index])
        starts = np.arange(len(sounds), dtype=np.int32) * SEGMENT
        ends = np.minimum(starts + SEGMENT, length).astype(np.int32)
        return Phones([f"p{sound}" for sound in sounds], starts, ends)

    def _sounds(self, index):
        count = -(-int(self.lengths[index]) // SEGMENT)
        return np.random.default_rng((self.seed, index)).integers(0, 5, size=count).tolist()


def ragged(count, seed=0, low=6000, high=40000):
    return np.random.default_rng(seed).integers(low, high, size=count)


def write_store(folder, corpora, labels, num_clusters, rate_hz=50, **changes):
    """A store of the given labels (split -> list of label lists), written as the programme writes one."""
    splits = {}
    for split, corpus in corpora.items():
        utterances = [np.asarray(u, np.uint16) for u in labels[split]]
        counts = np.array([len(u) for u in utterances], np.int64)
        writer = SplitWriter(folder, split, counts, utterance_keys(corpus.ids), "test")
        writer.write(0, len(counts), np.concatenate(utterances))
        writer.finish()
        splits[split] = SplitHeader(
            corpus=corpus.fingerprint,
            kmeans="k1",
            utterances=len(counts),
            labels=int(counts.sum()),
            sha256=writer.join(),
            quality={},
        )
    values = {
        "format": FORMAT,
        "num_clusters": num_clusters,
        "rate_hz": rate_hz,
        "kmeans": "k1",
        "inertia": 1.0,
        "teacher": {"kind": "mfcc"},
        "seed": 0,
        "sample_share": 1.0,
        "sample_frames": 100,
        "request": "r",
        "splits": splits,
    }
    header = LabelHeader(**(values | changes))
    header.write(folder)
    return header
