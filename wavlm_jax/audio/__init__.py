"""Sound in: decoding, down-mixing, resampling, and the arithmetic between samples and frames."""
