"""The training text of the bundled tokenizer: questions about short drawn clips, answers, everyday words.

It is generated from the lists below in a fixed order, so training is reproducible. The clips show coloured shapes and
digits that move, appear, hide, change and are cut; everyday words keep other questions from splitting into single
letters.
"""

from collections.abc import Iterator
from itertools import product


def _words(text: str) -> list[str]:
    return text.split()


COLOURS = _words("red green blue yellow orange purple pink brown black white grey gray cyan magenta")
SHAPES = _words(
    "circle square triangle star cross diamond ring heart hexagon pentagon rectangle oval arrow ball box line dot"
)
SIZES = _words("small large big tiny huge medium smaller larger bigger")
DIRECTIONS = _words("left right up down upwards downwards leftwards rightwards diagonally clockwise forward backward")
PLACES = _words("top bottom middle center centre corner edge side background foreground front back")
NUMBERS = _words("zero one two three four five six seven eight nine ten none many first second third last")
CHANGES = _words(
    "moves stops appears vanishes disappears grows shrinks turns rotates hides returns bounces passes jumps falls "
    "changes starts stays crosses enters leaves blinks fades"
)
ANSWERS = _words("yes no true false same different both neither before after during never always unknown")

_QUESTIONS = (
    "What color is the {size} {shape}?",
    "What colour is the {shape} at the {place}?",
    "What is the color of the {shape} that {change} first?",
    "Which shape is {colour}?",
    "Which shape {change} after the cut?",
    "What shape is the {size} {colour} object?",
    "Which {shape} {change} last, the {colour} one or the {size} one?",
    "How many {shape}s are there?",
    "How many {colour} shapes appeared in the video?",
    "How many objects move {direction}?",
    "In which direction does the {colour} {shape} move?",
    "Does the {shape} move {direction} or stay where it is?",
    "Did the {colour} {shape} stop?",
    "Is there a {colour} {shape} in the first scene?",
    "Is the {shape} {size} than the {colour} one?",
    "Does the {colour} {shape} pass behind the {size} {shape}?",
    "What number is written on the {colour} {shape}?",
    "Which digit is on the {size} {shape}?",
    "What happens before the {shape} {change}?",
    "What changed after the scene cut?",
    "Which came first, the {colour} {shape} or the {size} one?",
    "What is the brightest object at the {place} of the frame?",
    "Describe this video.",
    "What is shown in the video?",
    "What is happening in this clip?",
    "Who is in the video and what are they doing?",
    "When does the {shape} appear, at the beginning or at the end?",
    "Where is the {colour} {shape} at the end?",
)
_STATEMENTS = (
    "A {size} {colour} {shape} {change} at the {place}.",
    "The {colour} {shape} moves {direction} and then it {change}.",
    "There are {number} {colour} {shape}s.",
    "The answer is {answer}.",
    "{answer}",
    "{colour}",
    "{shape}",
    "{number}",
    "{direction}",
    "{digit}",
)
_EVERYDAY = _words("""
the of and to in is you that it he was for on are as with his they I at be this have from or one had by word but
not what all were we when your can said there use an each which she do how their if will up other about out many
then them these so some her would make like him into time has look two more write go see number no way could
people my than first water been call who oil its now find long down day did get come made may part over new
sound take only little work know place year live me back give most very after thing our just name good sentence
man think say great where help through much before line right too mean old any same tell boy follow came want
show also around form three small set put end does another well large must big even such because turn here why
ask went men read need land different home us move try kind hand picture again change off play spell air away
animal house point page letter mother answer found study still learn should world person woman child children
car truck dog cat bird tree road street table chair door window kitchen room city sky sun hand face head walking
running sitting standing talking holding eating drinking driving cooking jumping dancing playing opening closing
looking wearing shirt hat bag phone book cup food plate knife camera screen text sign frame frames scene scenes
video image clip object objects shape shapes background light dark bright moving motion speed fast slow near far
between behind under above below inside outside next left right user assistant system helpful You are a helpful
assistant please answer with a single word or phrase short sentence brief explain describe list count compare
choose option options
""")


def _fill(template: str, step: int) -> str:
    """`template` filled with the words of `step` (co-prime strides visit all pairs)."""
    return template.format(
        colour=COLOURS[step % len(COLOURS)],
        shape=SHAPES[(step * 3 + 1) % len(SHAPES)],
        size=SIZES[(step * 5 + 2) % len(SIZES)],
        direction=DIRECTIONS[(step * 5 + 1) % len(DIRECTIONS)],
        place=PLACES[(step * 7 + 3) % len(PLACES)],
        number=NUMBERS[(step * 3 + 2) % len(NUMBERS)],
        change=CHANGES[(step * 7 + 1) % len(CHANGES)],
        answer=ANSWERS[(step * 3 + 1) % len(ANSWERS)],
        digit=step % 10,
    )


def sentences(rounds: int = 40) -> Iterator[str]:
    """Every line of the training text, in a fixed order; each round fills every template once with other words."""
    for step, template in product(range(rounds), _QUESTIONS + _STATEMENTS):
        yield _fill(template, step)
    for word in (*COLOURS, *SHAPES, *SIZES, *DIRECTIONS, *PLACES, *NUMBERS, *CHANGES, *ANSWERS):
        # as the first word of an answer, inside a sentence, and at the start of one
        yield from (word, f"the {word} the {word}", word.capitalize())
    yield from ("system\n", "user\n", "assistant\n", "You are a helpful assistant.") * rounds  # of every prompt
    for word in _EVERYDAY:
        yield f"the {word} {word}"
