"""What speaker verification has to beat: the mean log-mel spectrum of an utterance as its embedding, no learning.

    python -m bench.speaker_baseline --train CORPUS --evaluation CORPUS --trials LIST [LIST ...]

80 log-mel energies of Kaldi's filter bank (25 ms every 10 ms), averaged over the utterance, compared by cosine: as they
are, and without the mean over the training corpus and divided by its deviation. One JSON line per list.
"""

import argparse
import json
from pathlib import Path

import kaldi_native_fbank
import numpy as np

from wavlm_jax.data.corpus import Corpus
from wavlm_jax.shapes import SAMPLE_RATE
from wavlm_jax.tasks.speaker import VerificationScores, place_trials


def main() -> None:
    """Print the scores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--trials", nargs="+", required=True)
    options = parser.parse_args()
    corpus, known = Corpus.open(options.evaluation), means(Corpus.open(options.train))
    found, everyone = means(corpus), np.arange(len(corpus))
    kinds = {"raw": found, "normed": (found - known.mean(axis=0)) / known.std(axis=0)}
    for path in options.trials:
        score = VerificationScores(place_trials([path], {"evaluation": corpus}))
        for kind, embeddings in kinds.items():
            values = score("evaluation", {"id": everyone, "embedding": embeddings})
            print(json.dumps({"trials": path, "embedding": f"log-mel mean, {kind}", "scores": dict(values)}))


def means(corpus: Corpus) -> np.ndarray:
    """The mean log-mel spectrum of every utterance, (utterances, 80)."""
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.samp_freq = SAMPLE_RATE
    options.frame_opts.dither = 0.0
    options.mel_opts.num_bins = 80
    rows = []
    for index in range(len(corpus)):
        computer = kaldi_native_fbank.OnlineFbank(options)
        computer.accept_waveform(SAMPLE_RATE, (corpus.wave(index).astype(np.float32) / 32768).tolist())
        computer.input_finished()
        rows.append(np.mean([computer.get_frame(frame) for frame in range(computer.num_frames_ready)], axis=0))
    return np.stack(rows)


if __name__ == "__main__":
    main()
