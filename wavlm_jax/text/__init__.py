"""Text of CTC models: vocabulary, decoding, alignment, and the files of transcripts and turns."""
