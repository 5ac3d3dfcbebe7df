"""The model tower: WavLM as pure functions of parameters, waveforms and keys."""
