"""The vocabulary and transformers' own tokenizer: the same on valid input, and each trap of theirs avoided by name."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Wav2Vec2CTCTokenizer

from wavlm_jax.settings import read
from wavlm_jax.text.vocabulary import (
    UnknownCharactersError,
    Vocabulary,
    VocabularyError,
    count_characters,
    read_vocabulary,
    write_vocabulary,
)

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ'"
ENGLISH = Vocabulary.from_texts([LETTERS])
OTHERS = {
    "english": ENGLISH,
    "lower": replace(ENGLISH, do_lower_case=True),
    "xlsr": Vocabulary(tokens=("a", "ä", "[UNK]", "|", "[PAD]"), blank="[PAD]", unknown="[UNK]", begin=None, end=None),
    "fairseq": Vocabulary(tokens=("<s>", "<pad>", "</s>", "<unk>", "|", "E"), blank="<s>", begin=None),
    "no delimiter": Vocabulary(tokens=("<pad>", "<unk>", "一", "二"), delimiter=None, begin=None, end=None),
    "bare": Vocabulary(tokens=("<pad>", "|", "A"), unknown=None, begin=None, end=None),
    "units": Vocabulary(tokens=("<pad>", "|", "C", "H", "CH", "TSCH", "T", "S"), unknown=None, begin=None, end=None),
}


@pytest.fixture(scope="module")
def english(tmp_path_factory):
    folder = tmp_path_factory.mktemp("english")
    write_vocabulary(ENGLISH, folder)
    return Wav2Vec2CTCTokenizer.from_pretrained(folder)


words = st.lists(st.text(LETTERS, min_size=1, max_size=8), max_size=8).map(" ".join)


@given(text=words)
def test_a_text_gets_the_ids_that_transformers_gives_it(english, text):
    ids = ENGLISH.encode(text)
    assert ids.tolist() == english(text).input_ids
    assert ENGLISH.spell(ids) == text == english.decode(ids, group_tokens=False)


@given(text=st.text(max_size=60))
def test_any_text_is_encoded_or_its_unknown_characters_are_listed(text):
    strange = ENGLISH.unknown_characters(text)
    assert set(strange) == set(text) - set(LETTERS) - {c for c in text if c.isspace()}
    if strange:
        with pytest.raises(UnknownCharactersError) as caught:
            ENGLISH.encode(text)
        assert caught.value.characters == strange
    ids = ENGLISH.encode(text, replace_unknown=True)
    assert ENGLISH.blank_id not in ids
    assert len(ids) == len(" ".join(text.split()))


def test_a_vocabulary_of_a_training_text_is_ordered_by_frequency():
    texts = ["BA BA\tC", "  A\n", "", "É"]
    assert count_characters(texts) == {"A": 3, "B": 2, "C": 1, "É": 1}
    vocabulary = Vocabulary.from_texts(texts, min_count=2)
    assert vocabulary.tokens == ("<pad>", "<s>", "</s>", "<unk>", "|", "A", "B")
    assert vocabulary.blank_id == 0
    assert Vocabulary.from_texts(reversed(texts), min_count=2) == vocabulary
    assert vocabulary.fingerprint == Vocabulary.from_texts(texts, min_count=2).fingerprint != ENGLISH.fingerprint


def test_case_is_folded_like_in_transformers(tmp_path):
    folded = Vocabulary.from_texts(["Cat", "cAT"], do_lower_case=True)
    assert folded.tokens[5:] == ("A", "C", "T")
    assert folded.spell(folded.encode("cAt")) == "cat"
    write_vocabulary(folded, tmp_path)
    theirs = Wav2Vec2CTCTokenizer.from_pretrained(tmp_path)
    assert theirs("cAt a").input_ids == folded.encode("cAt a").tolist()
    assert theirs.decode(folded.encode("cAt a")) == "cat a"


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_written_reads_back_the_same_here_and_in_transformers(tmp_path, name):
    vocabulary = OTHERS[name]
    write_vocabulary(vocabulary, tmp_path)
    assert read_vocabulary(tmp_path) == vocabulary
    theirs = Wav2Vec2CTCTokenizer.from_pretrained(tmp_path)
    assert theirs.pad_token_id == vocabulary.blank_id
    assert theirs.get_vocab().items() >= {token: i for i, token in enumerate(vocabulary.tokens)}.items()
    ids = np.random.default_rng(0).integers(len(vocabulary), size=200)
    assert theirs.decode(ids, group_tokens=False) == vocabulary.spell(ids)
    theirs.save_pretrained(tmp_path / "theirs")  # as a model on the hub has it: added_tokens.json, decoder, and so on
    assert read_vocabulary(tmp_path / "theirs").tokens[: len(vocabulary)] == vocabulary.tokens


def test_tokens_outside_vocab_json_are_read_where_transformers_keeps_them(tmp_path):
    (tmp_path / "vocab.json").write_text('\ufeff{"[PAD]": 1, "|": 0, "A": 2}')  # with a byte order mark
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": {"content": "[PAD]"}, "unk_token": null}')
    (tmp_path / "added_tokens.json").write_text('{"<s>": 3, "</s>": 4}')
    vocabulary = read_vocabulary(tmp_path)
    assert vocabulary.tokens == ("|", "[PAD]", "A", "<s>", "</s>")
    assert (vocabulary.blank_id, vocabulary.unknown, vocabulary.begin) == (1, None, "<s>")


def test_a_vocabulary_of_many_languages_gives_one(tmp_path):
    (tmp_path / "vocab.json").write_text('{"eng": {"<pad>": 0, "A": 1}, "deu": {"<pad>": 0, "A": 2, "Ä": 1}}')
    (tmp_path / "tokenizer_config.json").write_text('{"target_lang": "eng"}')
    assert read_vocabulary(tmp_path).tokens == ("<pad>", "A")
    assert read_vocabulary(tmp_path, "deu").tokens == ("<pad>", "Ä", "A")
    with pytest.raises(VocabularyError, match="2 languages, found 'fra'; expected one of deu, eng"):
        read_vocabulary(tmp_path, "fra")


def test_units_of_several_characters_do_not_glue_words_together(tmp_path):
    vocabulary = OTHERS["units"]
    assert vocabulary.encode("T CH TSCHH").tolist() == [6, 1, 4, 1, 5, 3]
    write_vocabulary(vocabulary, tmp_path)
    theirs = Wav2Vec2CTCTokenizer.from_pretrained(tmp_path)
    assert theirs("TCHC").input_ids == vocabulary.encode("TCHC").tolist()
    assert theirs("T CH T").input_ids == [6, 4, 6]  # their trap: the spaces are gone


def test_special_names_in_a_text_are_no_tokens(english):
    assert english("A<pad>B").input_ids[1] == ENGLISH.blank_id  # their trap: a blank among the labels
    assert set(ENGLISH.unknown_characters("A<pad>|")) == set("<pad>|")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"vocab.json: no such file"),
        ({"vocab.json": "{"}, "not readable as JSON"),
        ({"vocab.json": "[" * 100_000}, "not readable as JSON"),
        ({"vocab.json": "[]"}, "found a list, expected an object"),
        ({"vocab.json": "{}"}, "has 0 tokens"),
        ({"vocab.json": '{"<pad>": true}'}, "has id True"),
        ({"vocab.json": '{"<pad>": -1}'}, "has id -1"),
        ({"vocab.json": '{"<pad>": 1e9}'}, "has id 1000000000.0"),
        ({"vocab.json": '{"<pad>": 0, "A": 0}'}, "'<pad>' and 'A' both have id 0"),
        ({"vocab.json": '{"<pad>": 0, "A": 2}'}, "2 tokens, but none has id 1"),
        ({"vocab.json": '{"A": 0}'}, "blank is '<pad>', which is none of the 1 tokens"),
        ({"vocab.json": '{"": 0}'}, "token 0 is empty"),
        ({"vocab.json": '{"A": 0}', "tokenizer_config.json": '{"pad_token": null}'}, "CTC needs a blank"),
        ({"vocab.json": '{"A": 0}', "tokenizer_config.json": '{"pad_token": 3}'}, "pad_token is 3"),
        ({"vocab.json": '{"<pad>": 0}', "tokenizer_config.json": '{"do_lower_case": "no"}'}, "expected true or false"),
        ({"vocab.json": '{"<pad>": 0}', "tokenizer_config.json": '{"added_tokens_decoder": {"x": 1}}'}, "has 'x': 1"),
        ({"vocab.json": '{"<pad>": 0}', "tokenizer_config.json": '{"added_tokens_decoder": 1}'}, "expected an object"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(VocabularyError, match=message) as caught:
        read_vocabulary(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Vocabulary.from_texts(["", " \n"]), "found 0 characters"),
        (lambda: Vocabulary.from_texts(["A"], min_count=2), "none of them 2 times or more"),
        (lambda: Vocabulary.from_texts(["A|B"]), "has '|' 1 times"),
        (lambda: replace(ENGLISH, tokens=(*ENGLISH.tokens, "A")), "found 'A' twice"),
        (lambda: replace(ENGLISH, delimiter="_"), "delimiter is '_', which is none of the 32 tokens"),
        (lambda: replace(ENGLISH, delimiter="<pad>"), "expected different tokens"),
        (lambda: ENGLISH.show(32), "id 32: found in a vocabulary of 32 tokens"),
    ],
)
def test_an_impossible_vocabulary_is_refused(make, message):
    with pytest.raises(VocabularyError, match=message.replace("|", r"\|")):
        make()


def test_a_vocabulary_survives_a_config():
    section = json.loads(json.dumps(asdict(OTHERS["xlsr"])))
    assert read(section, Vocabulary, "vocabulary") == OTHERS["xlsr"]
