"""Tiny n-gram models, and what they say of a text, computed here from the ARPA file's own numbers."""

import base64
from pathlib import Path

CHARACTERS = """\\data\\
ngram 1=6
ngram 2=4

\\1-grams:
-1.0	<unk>
-99	<s>	-0.3
-0.8	</s>
-0.5	A	-0.2
-0.7	B	-0.1
-0.9	|	-0.2

\\2-grams:
-0.2	<s> A
-0.3	A B
-0.4	B |
-0.1	B </s>

\\end\\
"""
WORDS = """\\data\\
ngram 1=6
ngram 2=3

\\1-grams:
-1.5	<unk>
-99	<s>	-0.2
-0.9	</s>
-0.6	AB	-0.3
-0.8	BA	-0.1
-0.4	A	-0.2

\\2-grams:
-0.1	<s> BA
-0.2	A BA
-0.3	AB </s>

\\end\\
"""
CHARACTERS_BINARY = (
    "bW1hcCBsbSBodHRwOi8va2hlYWZpZWxkLmNvbS9jb2RlIGZvcm1hdCB2ZXJzaW9uIDUKAAAAAAAAAAAAAACAPwAAAL8BAAAA////"
    "/wAAAAABAAAAAAAAAAIAAAAAAMA/AgAAAAEAAAABAAAABgAAAAAAAAAEAAAAAAAAAAAAAAAFAAAAAAAAAHB+Ib05hnUABpr8vhVv"
    "EgIHgIpP0goVN7QOF70oSwxjCmz38X1z4GsAAAAAAAAAAAAAgL8AAACAAAAAAAAAAAAAAMbCmpmZvgAAAAAAAAAAMzMzv83MzL0A"
    "AAAAAAAAAAAAAL/NzEy+AQAAAAAAAABmZma/zcxMvgIAAAAAAAAAzcxMvwAAAIADAAAAAAAAAAAAAAAAAAAABAAAAAAAAAAAAAAA"
    "AAAAAAAAAAAAAAAA08zM9KWZmcmnZmZmn5qZmXsAAAAAAAAAAAAAAAAAPHVuaz4APHM+AEIAQQB8ADwvcz4A"
)
"""CHARACTERS in KenLM's binary format 5, a trie, as KenLM 0.3.0 wrote it (`build_binary trie`)."""
WORDS_BINARY = (
    "bW1hcCBsbSBodHRwOi8va2hlYWZpZWxkLmNvbS9jb2RlIGZvcm1hdCB2ZXJzaW9uIDUKAAAAAAAAAAAAAACAPwAAAL8BAAAA/////wAA"
    "AAABAAAAAAAAAAIAAAAAAMA/AgAAAAEAAAABAAAABgAAAAAAAAADAAAAAAAAAAAAAAAFAAAAAAAAAHB+Ib05hnUAB4CKT9IKFTf5xu0G"
    "x/eaSgps9/F9c+BrJ3MoM9CXjHsAAAAAAAAAAAAAwL8AAACAAAAAAAAAAAAAAMbCzcxMvgAAAAAAAAAAzczMvs3MTL4AAAAAAAAAAJqZ"
    "Gb+amZm+AAAAAAAAAABmZma/AAAAgAAAAAAAAAAAzcxMv83MzL0BAAAAAAAAAAAAAAAAAAAAAwAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
    "08zM9KWZmbmnZmYmHwAAAAAAAAAAAAAAADx1bms+ADxzPgBBAEFCADwvcz4AQkEA"
)
"""WORDS, in the same way."""


def write_models(folder: Path) -> dict[str, Path]:
    paths = {name: folder / name for name in ("characters.arpa", "words.arpa", "characters.bin", "words.bin")}
    paths["characters.arpa"].write_text(CHARACTERS)
    paths["words.arpa"].write_text(WORDS)
    paths["characters.bin"].write_bytes(base64.b64decode(CHARACTERS_BINARY))
    paths["words.bin"].write_bytes(base64.b64decode(WORDS_BINARY))
    return paths


def log10_prob(arpa: str, words: list[str]) -> float:
    """log10 p of a sentence, its end included, under a bigram model with back-off."""
    unigram: dict[str, tuple[float, float]] = {}
    bigram: dict[tuple[str, str], float] = {}
    for line in arpa.splitlines():
        fields = line.split("\t")
        if len(fields) < 2:
            continue
        match fields[1].split():
            case [word]:
                unigram[word] = (float(fields[0]), float(fields[2]) if len(fields) > 2 else 0.0)
            case [before, word]:
                bigram[before, word] = float(fields[0])
    total, before = 0.0, "<s>"
    for word in [*words, "</s>"]:
        known = word if word in unigram else "<unk>"
        total += bigram.get((before, known), unigram.get(before, (0, 0))[1] + unigram[known][0])
        before = known
    return total
