"""Words, numbers and UUIDs to hide and to count. The lists are ours: RULER takes wonderwords', a package of English words."""

from __future__ import annotations

import uuid
from functools import cache
from random import Random
from string import ascii_lowercase

_ADJECTIVES = """
able amber ample ancient autumn awake balmy barren basic bitter blank blunt bold brave brief bright brisk broad bronze busy calm
careful cheap cheerful chilly civil clean clear clever coarse cold common cool copper coral crimson crisp curious curly daring dark deep
dense distant double dry dull dusty eager early easy elastic empty even exact faint fair famous fancy fast fertile fierce final fine firm
flat fluent foggy fond formal fragile frank free fresh frosty full gentle giant gilded glad global golden grand grateful gray green happy
hardy hasty hollow honest humble humid idle ivory jolly keen kind large lasting late lazy lean level light likely linen lively local lofty
lonely long loose loud loyal lucky lunar mellow merry mild modern modest mossy narrow neat nimble noble noisy novel olive open orderly pale
patient placid plain polite prime proud pure quick quiet rapid rare ready rigid ripe robust rocky round royal rural rustic sandy scarlet
sharp shiny short silent silver simple sleepy slender smooth snowy social soft solar solid sour spare stable steady steep stern still stony
strict strong subtle sudden sunny swift tame tender thick thin tidy tiny tough urban vague valid vast velvet violet vivid warm wary wide
wild windy wise witty wooden young
"""
_NOUNS = """
acorn alley anchor anvil apple apron arch arrow atlas attic badge bakery balcony banner barn barrel basin basket beacon beaver bell bench
berry blanket board boat bonnet book boot border bottle bowl branch brick bridge brook broom brush bucket bugle butter button cabin cable
cactus camel camera canal candle canoe canvas canyon card carpet cart castle cattle cedar cellar chain chair chalk chapel cherry chest
chimney clay cliff clock cloud clover coach coast cobble compass corner cotton cradle crane crater creek crown cup curtain cushion daisy
desert desk diary dock dolphin donkey door dragon drawer drum eagle easel echo elbow ember engine falcon farm feather fence fern ferry
fiddle field finch flag flame flask flute forest forge fossil fountain fox frame furnace galley garden garlic garnet gate glacier glove
goat granite grape gravel grove guitar hammer hammock harbor harness harvest hazel hedge helmet heron hill hinge horizon horse hotel
island jacket jar jewel jungle kettle kitchen kite ladder lagoon lake lamp lantern lawn leaf ledger lemon lentil lever library lighthouse
lily lizard lobster locket lumber magnet maple marble market marsh meadow melon meteor mill mirror mitten moss mountain museum needle nest
nickel notebook oak oasis ocean onion orchard otter oven owl oyster paddle palace panda paper parcel parrot pasture path pebble pelican
pencil pepper piano pigeon pillow pine pistol planet plate plaza pocket pond poplar porch potato prairie pump puzzle quarry quartz quilt
rabbit raft rail rain raven reef ribbon ridge river robin rocket roof rope saddle sail salmon satchel scarf school sculptor shadow shell
shelter shovel shrine signal sketch sled slope spade sparrow spindle spiral spoon spring spruce squirrel stable staircase statue stream
street sugar summit swan tablet tailor teapot temple tent thimble thread thunder ticket tiger timber tower trail train trumpet tulip tunnel
turtle valley vase village vine violin wagon wall walnut wardrobe water wave whale wharf wheat wheel whistle willow window winter wolf yard
"""


@cache
def adjectives() -> tuple[str, ...]:
    return tuple(_ADJECTIVES.split())


@cache
def nouns() -> tuple[str, ...]:
    return tuple(_NOUNS.split())


@cache
def compounds() -> tuple[str, ...]:
    """Return words of two nouns, each once."""
    return tuple(sorted({first + second for first in nouns() for second in nouns() if first != second}))


def key(random: Random) -> str:
    """Return a name such as `calm-harbor`."""
    return f"{random.choice(adjectives())}-{random.choice(nouns())}"


def number(random: Random) -> str:
    """Return a number of 7 digits."""
    return str(random.randrange(10**6, 10**7))


def uuid4(random: Random) -> str:
    return str(uuid.UUID(int=random.getrandbits(128), version=4))


def coded(random: Random, length: int = 6) -> str:
    """Return letters that are no word."""
    return "".join(random.choices(ascii_lowercase, k=length))
