"""English sentences for the demo corpus: a small grammar over words of our own, the same on every machine."""

import hashlib
from collections.abc import Iterator

PATTERNS = (
    "{the} {adjective} {person} {did} {the} {thing} {place}.",
    "{the} {person} {did} {number} {things}.",
    "{name} {did} {a} {adjective} {thing} {when}.",
    "{when} {the} {animal} {moved} {place}.",
    "{name} and {name} {moved} {place} {when}.",
    "did {the} {person} {do} {the} {thing}?",
    "{please} {do} {the} {adjective} {thing} {place}.",
    "{the} {thing} {place} was {adjective} and {adjective}.",
    "nobody {did} {the} {thing} because {the} {animal} {moved} {how}.",
    "{the} {animal} {moved} {how} {place}.",
    "{name} {said} that {the} {thing} was {adjective}.",
    "there were {number} {adjective} {things} {place}.",
    "{the} {person} {moved} {how} {when}.",
    "where did {name} {do} {the} {things}?",
    "{name} will {do} {number} {things} {tomorrow}.",
    "i {said} that {name} could {do} {a} {thing}.",
)

WORDS = {
    "the": "the the the this that my our his her their every another",
    "a": "a",
    "adjective": """small large old young quiet loud bright dark heavy light warm cold green yellow silver purple
        broken clean dusty empty famous gentle hungry narrow wide plain proud rough smooth sharp simple strange thick
        thin tired useful wooden careful cheap clever crooked deep early foreign frozen honest""",
    "person": """farmer teacher doctor sailor baker painter singer driver lawyer judge soldier neighbour brother
        sister uncle daughter captain stranger builder officer student writer gardener waiter butcher dancer engineer
        mother father child""",
    "animal": """horse dog cat rabbit fox owl goat sheep tiger donkey pigeon mouse turtle bear wolf camel chicken
        eagle monkey swallow""",
    "thing": """basket bottle window letter ladder hammer jacket kettle mirror picture pillow saddle bucket candle
        carpet engine feather blanket button bridge shovel guitar helmet lantern map needle ticket wagon table chair cup
        knife spoon garden boat clock drum flag gate hat""",
    "things": """baskets bottles windows letters ladders hammers jackets kettles mirrors pictures pillows buckets
        candles carpets engines feathers blankets buttons shovels guitars helmets lanterns maps needles tickets tables
        chairs cups knives boats clocks drums flags gates hats apples oranges potatoes eggs shoes books stones""",
    "did": """carried found lost painted bought sold washed opened closed dropped borrowed noticed counted cleaned
        moved pulled pushed lifted hid mended packed praised showed stole touched wanted watched followed remembered
        kept brought forgot""",
    "do": """carry find lose paint buy sell wash open close drop borrow notice count clean move pull push lift hide
        mend pack praise show steal touch want watch follow remember keep bring forget""",
    "moved": """walked ran slept waited jumped danced hurried stopped turned worked rested returned arrived climbed
        travelled wandered stayed vanished laughed appeared""",
    "said": "said thought knew believed heard hoped agreed wrote",
    "how": """slowly quickly quietly gladly badly gently twice again alone together suddenly carefully loudly rarely
        easily early""",
    "place": """_at_the_market _in_the_kitchen _behind_the_house _near_the_river _on_the_hill _under_the_table
        _by_the_window _across_the_field _at_the_station _in_the_forest _along_the_road _beside_the_church
        _over_the_wall _at_school _in_the_village _on_the_beach _near_the_harbour _inside_the_tower _through_the_valley
        _in_town _around_the_corner _below_the_cliff _upon_the_roof _outside_the_theatre""",
    "when": """yesterday today _last_week _this_morning _on_monday _on_friday _at_noon _after_dinner _before_sunrise
        _last_winter _in_july _at_midnight _one_evening _once_more _years_ago _on_sunday _every_day""",
    "tomorrow": "tomorrow _next_week tonight soon _next_month _on_thursday _after_breakfast _this_afternoon",
    "number": "two three four five six seven eight nine ten eleven twelve twenty thirty fifty _a_hundred several many",
    "please": "please _you_should _we_must _never _try_to _let_us",
    "name": """Anna Peter Maria Thomas Helen Oscar Julia Victor Emma Walter Laura Martin Sophie George Alice Henry
        Clara Frank Nora Simon Ruth Edgar Paula Hugo Irene Jacob""",
}
"""Word classes; a word that starts with _ is a phrase whose other _ are blanks."""

_CHOICES = {kind: words.split() for kind, words in WORDS.items()}


def sentence(seed: str) -> str:
    """The sentence that belongs to `seed`: about four to eleven words, with its full stop or question mark."""
    draws = _draws(seed)
    pattern = PATTERNS[next(draws) % len(PATTERNS)]
    words = []
    for slot in pattern.split(" "):
        kind, closed, end = slot.removeprefix("{").partition("}")
        choices = _CHOICES[kind] if closed else [slot]
        words.append(choices[next(draws) % len(choices)].removeprefix("_").replace("_", " ") + end)
    text = " ".join("an" if word == "a" and after[:1] in "aeiou" else word for word, after in _pairs(words))
    return text[0].upper() + text[1:]


def _pairs(words: list[str]) -> Iterator[tuple[str, str]]:
    return zip(words, [*words[1:], "."], strict=True)


def _draws(seed: str) -> Iterator[int]:
    """Endless numbers that depend on `seed` alone; no library's random stream, which may change with a version."""
    number = 0
    while True:
        digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
        yield int.from_bytes(digest[:4])
        number += 1
