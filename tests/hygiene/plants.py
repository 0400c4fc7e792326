"""Near-duplicates made on purpose: the text of each kind asks the same as the original."""

import random

OTHER_WORDS = "lantern", "quickly", "yellow", "wonderful", "beside", "mountain"


def swapped(text, draw):
    words = text.split()
    place = draw.randrange(len(words) - 1)
    words[place : place + 2] = reversed(words[place : place + 2])
    return " ".join(words)


def recased(text, draw):
    return draw.choice([text.upper(), text.lower(), text.title()])


def repunctuated(text, draw):
    words = [word.rstrip(".,;:!?") for word in text.split()]
    words[draw.randrange(len(words))] += draw.choice(",;!")
    return " ".join(words) + draw.choice([".", "...", " !"])


def edited(text, draw):
    """A word without a digit is exchanged, left out or put in: other numbers ask another thing."""
    words = text.split()
    place = draw.choice([i for i, word in enumerate(words) if word.strip(".,;:!?'").isalpha()])
    new = [[draw.choice(OTHER_WORDS)], [], [words[place], draw.choice(OTHER_WORDS)]]
    words[place : place + 1] = draw.choice(new)
    return " ".join(words)


KINDS = {"words swapped": swapped, "case": recased, "punctuation": repunctuated, "word": edited}


def planted(texts, kind, seed=0):
    draw = random.Random(seed)
    return [KINDS[kind](text, draw) for text in texts]
