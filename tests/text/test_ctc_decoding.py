"""CTC paths to text: equal to transformers' tokenizer with its offsets, and free of its HELO trap."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Wav2Vec2CTCTokenizer

from wavlm_jax.text.decoding import Span, decode, frames_needed, seconds
from wavlm_jax.text.vocabulary import Vocabulary, VocabularyError, write_vocabulary

SPOKEN = Vocabulary(tokens=("<pad>", "<s>", "</s>", "<unk>", "|", "H", "E", "L", "O"))
HELLO = [5, 5, 0, 6, 7, 7, 0, 7, 8, 8, 4, 4, 5]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spoken")
    write_vocabulary(SPOKEN, folder)
    return Wav2Vec2CTCTokenizer.from_pretrained(folder)


def test_the_vector_of_the_fact_sheet():
    heard = decode(HELLO, SPOKEN)
    assert heard.text == "HELLO H"
    spans = [("H", 0, 2), ("E", 3, 4), ("L", 4, 6), ("L", 7, 8), ("O", 8, 10), (" ", 10, 12), ("H", 12, 13)]
    assert heard.characters == tuple(Span(*span) for span in spans)
    assert heard.words == (Span("HELLO", 0, 10), Span("H", 12, 13))
    assert (seconds(heard.words[1].start), seconds(heard.words[1].end)) == (0.24, 0.26)


def test_dropping_special_tokens_keeps_doubled_letters(theirs):
    assert theirs.decode(HELLO[:10], skip_special_tokens=True) == "HELO"
    assert decode(HELLO[:10], SPOKEN, drop_special=True).text == "HELLO"
    assert decode([1, 5, 3, 5, 2], SPOKEN).text == "<s>H<unk>H</s>"
    assert decode([1, 5, 3, 5, 2], SPOKEN, drop_special=True).text == "HH"


@given(ids=st.lists(st.sampled_from([0, 0, 4, 5, 6, 7, 8, 8, 1, 2, 3]), max_size=40))
def test_text_characters_and_words_are_those_of_transformers(theirs, ids):
    heard = decode(np.array(ids, np.int32), SPOKEN)
    wanted = theirs.decode(ids, output_char_offsets=True, output_word_offsets=True)
    assert heard.text == wanted.text

    def spans(offsets, name):
        return [(o[name], o["start_offset"], o["end_offset"]) for o in offsets]

    assert [tuple(c) for c in heard.characters] == spans(wanted.char_offsets, "char")
    assert [tuple(w) for w in heard.words] == spans(wanted.word_offsets, "word")


@given(labels=st.lists(st.integers(5, 8), max_size=12), silence=st.integers(0, 3))
def test_labels_fit_into_the_frames_they_need_and_no_fewer(labels, silence):
    path = [labels[0]] if labels else []
    for before, label in itertools.pairwise(labels):
        path += [0, label] if before == label else [label]
    assert frames_needed(labels) == len(path)
    assert decode(path + [0] * silence, SPOKEN).text == SPOKEN.spell(labels)


def test_nothing_was_said():
    assert decode([], SPOKEN) == decode([0, 0], SPOKEN) == ("", (), ())
    assert decode([4, 0, 4], SPOKEN).words == ()
    with pytest.raises(VocabularyError, match="id 9"):
        decode([9], SPOKEN)


def test_lower_case_reaches_the_times():
    from dataclasses import replace

    heard = decode(HELLO, replace(SPOKEN, do_lower_case=True))
    assert (heard.text, heard.words[0]) == ("hello h", Span("hello", 0, 10))
