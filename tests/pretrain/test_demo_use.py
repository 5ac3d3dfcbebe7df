"""The recordings that the demo compares."""

from hypothesis import given
from hypothesis import strategies as st

from pretrain.demo import triple


@given(st.lists(st.sampled_from(["", "a", "b", "c"]), max_size=12))
def test_two_of_one_voice_and_one_of_another(voices):
    found = triple(voices)
    possible = any(voice and voices.count(voice) > 1 and len(set(voices)) > 1 for voice in voices)
    assert (found is not None) == possible
    if found is not None:
        one, again, other = found
        assert voices[one] == voices[again] != voices[other]
        assert one != again
        assert voices[one]
