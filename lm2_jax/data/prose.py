"""Little stories without end: generated English prose for noise that needs no download.

A small grammar over a few hundred words. No word of it is a person, a place, an object or an animal of a bAbI task.
Paragraph number i is always the same text, so nothing has to be stored.
"""

import functools

from lm2_jax.data.philox import Draws

SENTENCES = 6  # of one paragraph
_KEY = 5_150  # any number: makes these draws unlike all others

HEROES = (
    "clockmaker", "lighthouse keeper", "baker", "ferryman", "beekeeper", "cartographer", "violinist", "astronomer",
    "chimney sweep", "librarian", "fisherman", "puppeteer", "juggler", "widow", "postman", "shepherd", "tortoise",
    "badger", "heron", "hedgehog", "raven", "otter", "fox", "owl", "donkey", "magpie", "captain", "general",
    "poet", "inventor", "tailor", "bell ringer",
)  # fmt: skip
TRAITS = (
    "old", "patient", "forgetful", "cheerful", "stubborn", "clever", "lonely", "proud", "gentle", "curious",
    "sleepy", "famous", "shy", "restless", "solemn", "tiny", "enormous", "absent-minded", "honest", "polite",
)  # fmt: skip
TOWNS = (
    "Marlow", "Westerby", "Oakhollow", "Pennyfield", "Saltmarsh", "Tarrow", "Quillon", "Harrowgate", "Dunmere",
    "Ashby", "Lindenau", "Copperhill",
)  # fmt: skip
SCENES = (
    "harbour", "market", "mill", "forest", "river", "bridge", "tower", "valley", "meadow", "island", "station",
    "theatre", "orchard", "mountain", "lighthouse", "workshop", "cellar", "attic", "inn", "courtyard",
)  # fmt: skip
THINGS = (
    "lantern", "umbrella", "compass", "teapot", "map", "letter", "drum", "trumpet", "ladder", "kite", "barrel",
    "basket", "hat", "telescope", "coin", "feather", "candle", "mirror", "key", "blanket", "wheel", "rope",
    "spoon", "clock", "book", "needle", "bottle", "whistle",
)  # fmt: skip
LOOKS = (
    "rusty", "golden", "broken", "wooden", "silver", "curious", "crooked", "painted", "heavy", "borrowed",
    "secret", "beautiful", "dusty", "emerald", "crimson", "striped", "magical", "worthless", "precious", "second-hand",
)  # fmt: skip
SKIES = (
    "rain", "fog", "snow", "thunder", "moonlight", "wind", "frost", "sunshine", "drizzle", "starlight",
)  # fmt: skip
TIMES = (
    "One evening", "Early in spring", "Long ago", "On a cold morning", "Toward midnight", "Every autumn",
    "At the end of summer", "After a long silence", "Some years later", "Before the bells rang",
    "On the day of the fair", "In the middle of winter",
)  # fmt: skip
ADVERBS = (
    "quietly", "carefully", "slowly", "happily", "bravely", "sadly", "suddenly", "politely", "secretly", "proudly",
)  # fmt: skip
DEEDS = (
    "repaired", "admired", "polished", "painted", "hid", "buried", "sold", "invented", "borrowed", "examined",
    "remembered", "described", "wrapped", "hung up", "counted", "promised",
)  # fmt: skip
FEELINGS = (
    "nobody was surprised", "everyone laughed", "the children clapped", "the neighbours shook their heads",
    "the whole street fell silent", "even the mayor smiled", "the birds stopped singing", "it was quite enough",
)  # fmt: skip
SAYINGS = (
    "There is always another ship", "A good soup needs time", "Nothing is lost that is written down",
    "The sea never asks for directions", "I was young once and it did not help", "We shall see about that",
    "It is a fine night for mistakes", "My grandmother would have known", "Tomorrow is soon enough",
    "One should never argue with the weather", "That is exactly what the moon said", "You may keep the change",
)  # fmt: skip
OPENINGS = (
    "{time} the {trait} {hero} of {town} found {a_look} {thing} near the {scene}.",
    "{time} there lived {a_trait} {hero} who owned nothing but {a_look} {thing}.",
    "In {town} people still speak of the {hero} who {deed} the {look} {thing}.",
    "The {hero} of {town} was {trait}, and the {scene} was the only home that {hero} knew.",
    "{time} a letter arrived in {town}, and it was meant for the {trait} {hero}.",
)
MIDDLES = (
    "The {hero} {adverb} {deed} the {look} {thing} while the {sky} covered the {scene}.",
    'Said the {hero} {adverb}: "{saying}, and {a_thing} is only {a_thing}."',
    '"{saying}," said the {other}, and {adverb} {deed} the {thing} again.',
    "Nobody in {town} believed it, but the {other} had {adverb} {deed} every {thing} in the {scene}.",
    "There was {sky} over the {scene}, and somewhere {a_trait} {other} played on {a_look} {thing}.",
    "For three days the {hero} and the {other} talked about the {thing} and about the {sky}.",
    "When the {other} {deed} the {thing}, {feeling}, for it was {look} and rather {trait}.",
    "It was said that the {thing} had once belonged to {a_trait} {other} from {town}.",
    "The {other} wanted to know why anyone would carry {a_look} {thing} through the {sky}.",
    "Under the {scene} of {town} the {hero} kept {a_look} {thing}, and {feeling}.",
)
ENDINGS = (
    "And so the {hero} {adverb} {deed} the {thing} once more, and {feeling}.",
    "From that day on the {hero} was never without the {look} {thing} again.",
    "The {other} went away in the {sky}, and the {thing} was forgotten by everyone in {town}.",
    'At last the {hero} smiled and said: "{saying}, my dear {other}."',
    "If the {scene} has not fallen down, the {thing} is waiting there to this very day.",
)


def _article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


@functools.lru_cache(maxsize=4096)
def paragraph(number: int) -> tuple[str, ...]:
    """Paragraph `number` >= 0: `SENTENCES` sentences about one hero and one thing."""
    draws = Draws(_KEY, number)
    fixed = {
        "hero": draws.choice(HEROES),
        "thing": draws.choice(THINGS),
        "town": draws.choice(TOWNS),
        "scene": draws.choice(SCENES),
    }
    fixed["a_thing"] = _article(fixed["thing"])
    fixed["other"] = draws.choice([hero for hero in HEROES if hero != fixed["hero"]])
    forms = (draws.choice(OPENINGS), *draws.subset(MIDDLES, SENTENCES - 2), draws.choice(ENDINGS))
    sentences = []
    for form in forms:
        look, trait = draws.choice(LOOKS), draws.choice(TRAITS)
        free = {
            "time": draws.choice(TIMES),
            "trait": trait,
            "a_trait": _article(trait),
            "look": look,
            "a_look": _article(look),
            "sky": draws.choice(SKIES),
            "adverb": draws.choice(ADVERBS),
            "deed": draws.choice(DEEDS),
            "feeling": draws.choice(FEELINGS),
            "saying": draws.choice(SAYINGS),
        }
        sentences.append(form.format(**fixed, **free))
    return tuple(sentences)
