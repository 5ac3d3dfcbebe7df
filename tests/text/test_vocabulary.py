"""The vocabulary and transformers' own tokenizer: the same on valid input, and each trap of theirs avoided by name."""

import hashlib
import json
import re
import unicodedata
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2PhonemeCTCTokenizer

from wavlm_jax.settings import read
from wavlm_jax.text.decoding import align, decode
from wavlm_jax.text.vocabulary import (
    UnknownCharactersError,
    Vocabulary,
    VocabularyError,
    count_characters,
    normal_form,
    parse_vocabulary,
    read_vocabulary,
    tokenizer_files,
    write_vocabulary,
)

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ'"
NO_ROLES = {"unknown": None, "begin": None, "end": None}
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
    read = normal_form(text)
    assert set(strange) == set(read) - set(LETTERS) - {c for c in read if c.isspace()}
    if strange:
        with pytest.raises(UnknownCharactersError) as caught:
            ENGLISH.encode(text)
        assert caught.value.characters == strange
    ids = ENGLISH.encode(text, replace_unknown=True)
    assert ENGLISH.blank_id not in ids
    assert len(ids) == len(" ".join(read.split()))


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


@pytest.mark.parametrize("letters", ["abc", "ABC", "aBc", "οδς", "ΟΔΣ", "οδσ", "straße"])
def test_what_is_heard_in_lower_case_can_be_spelt_whatever_the_case_of_the_tokens(letters):
    vocabulary = Vocabulary(tokens=("<pad>", "|", *dict.fromkeys(letters)), do_lower_case=True, **NO_ROLES)
    heard = decode([2, 0, 3, 4, 1, 3, 0, 3, 0, 4], vocabulary)
    assert heard.text == heard.text.lower() == " ".join(word.text for word in heard.words)
    assert heard.words[0].text == "".join(character.text for character in heard.characters[:3])
    assert vocabulary.encode(heard.text).tolist() == vocabulary.encode(heard.text.upper()).tolist()
    assert len(vocabulary.encode(heard.text)) == 7


def test_the_last_sigma_of_a_word_is_one_in_text_words_and_characters(tmp_path):
    greek = Vocabulary.from_texts(["οδος μας"], do_lower_case=True)
    heard = decode([i for one in greek.encode("ΟΔΟΣ ΜΑΣ").tolist() for i in (one, 0)], greek)
    assert heard.text == "οδος μας" == greek.spell(greek.encode("οδος μας"))
    assert [word.text for word in heard.words] == heard.text.split()
    write_vocabulary(greek, tmp_path)
    assert Wav2Vec2CTCTokenizer.from_pretrained(tmp_path).decode(greek.encode("σας")) == "σας"


@given(text=st.text("aéàạ한국ộK\u0301\u0323 ", max_size=12))
def test_a_text_has_the_same_labels_in_every_normal_form(text):
    spelt = {form: unicodedata.normalize(form, text) for form in ("NFC", "NFD")}
    for made_from in spelt.values():
        vocabulary = Vocabulary.from_texts([made_from, "x"])
        first, second = (vocabulary.encode(one).tolist() for one in spelt.values())
        assert first == second
        assert vocabulary.spell(first) == " ".join(spelt["NFC"].split())
    apart = Vocabulary(
        tokens=("<pad>", "|", *dict.fromkeys(spelt["NFD"].replace(" ", ""))), **NO_ROLES
    )  # as on the hub
    assert apart.encode(spelt["NFC"]).tolist() == apart.encode(spelt["NFD"]).tolist()


def test_a_vocabulary_of_letters_outside_normal_form_c_keeps_them():
    hindi = Vocabulary(tokens=("<pad>", "|", "\u0958", "\u0915", "\u093c"), **NO_ROLES)
    assert hindi.encode("\u0958").tolist() == [2]
    assert hindi.encode("\u0915\u093c").tolist() == [3, 4]


def test_invisible_characters_are_no_tokens_unless_the_vocabulary_has_them():
    invisible = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) in ("Cf", "Cc") and not c.isspace()]
    seen = {0x600, 0x601, 0x602, 0x603, 0x604, 0x605, 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0xFFF9, 0xFFFA, 0xFFFB}
    seen |= {0x110BD, 0x110CD, *range(0x13430, 0x13440)}  # signs that are printed round others
    text = "a" + "".join(c for c in invisible if ord(c) not in seen) + "\ufe0f\u3164\u034fb"
    assert Vocabulary.from_texts([text]).tokens[5:] == ("a", "b")
    assert Vocabulary.from_texts(["ab"]).encode(text).tolist() == [5, 6]
    persian = Vocabulary(tokens=("<pad>", "|", "a", "\u200c", "b"), **NO_ROLES)
    assert persian.encode("a\u200c\u200db").tolist() == [2, 3, 4]


@pytest.mark.parametrize("delimiter", [None, "|"])
def test_phones_have_the_spaces_of_transformers(tmp_path, delimiter):
    tokens = ("<pad>", "<s>", "</s>", "<unk>", "ʃ", "i\u02d0", "h", "æ", "d", *([delimiter] if delimiter else []))
    write_vocabulary(Vocabulary(tokens=tokens, delimiter=delimiter, phones=True), tmp_path)
    theirs = Wav2Vec2PhonemeCTCTokenizer.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "theirs")
    vocabulary = read_vocabulary(tmp_path / "theirs")
    assert vocabulary == read_vocabulary(tmp_path)
    path = np.random.default_rng(0).integers(len(vocabulary), size=99)
    heard = decode(path, vocabulary)
    assert heard.text == theirs.decode(path) == " ".join(word.text for word in heard.words)
    assert vocabulary.spell(path) == theirs.decode(path, group_tokens=False)
    text = "ʃ i\u02d0 h æ d" if delimiter is None else "ʃ i\u02d0 | h æ d"
    assert vocabulary.encode(text).tolist() == theirs(text).input_ids
    assert vocabulary.spell(vocabulary.encode(text)) == "ʃ i\u02d0 h æ d"
    assert vocabulary.unknown_characters("ʃ hæ") == ("hæ",)
    [*_, last] = align(np.log(np.full((9, len(vocabulary)), 0.1, np.float32)), text, vocabulary).transcript.characters
    assert last.text == "d"


def test_fingerprints_of_earlier_runs_stay():
    fields = {name: value for name, value in asdict(OTHERS["xlsr"]).items() if name != "phones"}
    assert OTHERS["xlsr"].fingerprint == hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    assert replace(OTHERS["xlsr"], phones=True).fingerprint != OTHERS["xlsr"].fingerprint


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


LACKING = {"<pad>": 0, "<unk>": 1, "|": 2, "A": 3, "B": 4}
WITH_A_GAP = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "A": 5, "B": 7}


@pytest.mark.parametrize(
    ("ids", "num_outputs"), [(LACKING, 5), (LACKING, 6), (LACKING, 7), (LACKING, 10), (WITH_A_GAP, 8), (WITH_A_GAP, 10)]
)
def test_tokens_fit_the_outputs_of_the_head_and_spell_as_transformers_does(tmp_path, ids, num_outputs):
    """Tokens that transformers adds by itself, a gap in the ids, and outputs that no token has.

    But for runs of spaces, which are one space here (docs/parity.md).
    """
    (tmp_path / "vocab.json").write_text(json.dumps(ids))
    Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json")).save_pretrained(tmp_path)  # adds <s> and </s> where they lack
    theirs = Wav2Vec2CTCTokenizer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["WavLMForCTC"], "vocab_size": num_outputs}))
    found = read_vocabulary(tmp_path)
    assert found == parse_vocabulary(tokenizer_files(tmp_path), tmp_path, num_outputs=num_outputs)
    assert len(found) == num_outputs
    path = np.random.default_rng(0).integers(num_outputs, size=200)
    assert decode(path, found).text == re.sub(" +", " ", theirs.decode(path))
    for token_id in range(num_outputs):
        assert found.spell([ids["A"], token_id, ids["A"]]) == theirs.decode(
            [ids["A"], token_id, ids["A"]], group_tokens=False
        )
    assert (found.begin is None) == ("<s>" not in ids and num_outputs == len(ids))
    for name in (token for token in found.tokens if token not in theirs.get_vocab()):
        with pytest.raises(UnknownCharactersError):
            found.encode(name)
    write_vocabulary(found, tmp_path / "again")
    assert parse_vocabulary(tokenizer_files(tmp_path / "again"), tmp_path, num_outputs=num_outputs) == found


@pytest.mark.parametrize(
    ("num_outputs", "message"),
    [
        (4, r"5 tokens, the model 4 outputs, 'B' has id 4; it belongs to another"),
        (8, "5 tokens, the model 8 outputs; it"),
    ],
)
def test_a_vocabulary_of_another_head_is_refused(tmp_path, num_outputs, message):
    (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "<unk>": 1, "|": 2, "A": 3, "B": 4}))
    with pytest.raises(VocabularyError, match=message):
        parse_vocabulary(tokenizer_files(tmp_path), tmp_path, num_outputs=num_outputs)


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
