"""Plain words, and the random names and values that tasks are made of.

No word of `ADJECTIVES + NOUNS` is part of another: an answer is scored by looking for words in it. Numbers and uuids
are strings. Everything random comes from the given generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from string import ascii_uppercase
from uuid import UUID

Draw = Callable[[Random], str]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    """
    amber ample ancient aqua arctic autumn awake basic blunt bold brave breezy brief bright brisk broad bronze
    bubbly busy calm candid careful casual cheery chilly chubby civil classic clean clever cloudy clumsy coastal
    cobalt copper coral cosmic cozy crimson crisp curious curly daily dapper daring deep dense dizzy double dreamy
    dusty eager earnest elegant emerald empty fabled faint fancy fearless festive fierce final flat fluffy foggy
    formal fragile frank fresh frosty frugal funny gallant gentle giant gifted gilded glad glossy golden graceful
    grand grassy grumpy handy happy hardy hasty hazel hearty hidden hollow honest humble humid idle ivory jagged
    jolly joyful keen kindly lavish lazy leafy level lilac lively lofty lonely loyal lucid lunar magenta marble
    mellow merry mighty mild misty modest mossy muddy narrow native neat nimble noble novel oaken oblong olive
    orange orderly pale patient pearly peppy placid plain playful plucky polar polite prompt proper proud purple
    quaint quick quiet radiant rapid rare regal rigid robust rocky rosy rugged rural rustic sandy scarlet serene
    shaggy sharp shiny silent silken silver simple sincere sleepy slender smooth snowy sober solar solid spicy
    spry starry steady stormy sturdy subtle sunny supple swift tame tangy tardy teal tender thirsty thorough
    thrifty tidy timid tiny topaz tough tranquil trusty umber upbeat urban useful valiant vast velvet vivid wary
    warm wavy wealthy western whole wide windy wintry wise witty woolen worthy young zesty
    """
)
NOUNS = _words(
    """
    abbey acorn album almanac anchor antler anvil apple apron atlas badger bagpipe bakery balcony balloon bamboo
    banjo barley barrel basin basket beacon beaver beetle bench bison blanket blossom boulder bramble breeze
    bridge brook bucket buckle bugle button cabin cactus camel candle canoe canyon captain caravan cardinal carpet
    carrot castle cavern cedar cellar chalk chapel cheetah cherry chimney cider cinder cipher citadel clarinet
    cliff clover cobbler comet compass condor copse cottage cougar coyote cradle crane crater cricket crystal
    cypress daisy dolphin domino donkey dragon drizzle drummer dynamo eagle eclipse elbow engine envelope estuary
    falcon farmer feather fennel ferret fiddle finch fjord flagon flannel flute forest forge fossil fountain
    galaxy garden garlic gazelle geyser giraffe glacier glider goblet gondola gopher granite guitar gull gutter
    hamlet hammer hammock harbor harvest hawk hedge helmet heron hickory hillock hinge hornet hostel iceberg igloo
    inkwell insect island jackal jacket jaguar jasmine jersey jigsaw juniper kayak kennel kernel kestrel kettle
    kiosk kitten koala ladder lagoon lantern larch lattice laurel lemon leopard lettuce library lichen lizard
    llama lobster locket locust lotus lynx magnet magpie mallet mammoth mango mantle maple marina market marmot
    meadow melon meteor mill mirror mitten monsoon moose mortar mosaic mountain mulberry museum mustard nebula
    needle nettle nickel nutmeg oasis obelisk ocean octopus orchard orchid osprey ostrich otter oven oyster paddle
    pagoda palace panther parade parcel parrot parsley pasture peach pebble pelican pencil penguin pepper petal
    pigeon pillow pine piston plaza plow plum pocket pond poplar poppy porch prairie prism pulley pumpkin puzzle
    python quail quarry quartz quill quiver rabbit raccoon radish raft raisin raven ravine reef ribbon river robin
    rocket rudder saddle saffron sailor salmon satchel saucer scarf school seal shadow shelter shovel signal
    sister skylark sleigh slipper spade sparrow spindle spiral sponge squirrel staple statue steeple stirrup stove
    summit sundial swallow swan tailor tavern teapot temple thicket thimble thistle throne thunder ticket tiger
    timber toboggan tortoise tower tractor trellis trumpet tulip tundra tunnel turbine turtle twig umbrella uncle
    valley vapor vase village vineyard violin volcano voyage waffle wagon walnut walrus warbler waterfall weasel
    wharf wheel whistle widget willow window wizard wombat yacht yarrow zebra zephyr zinnia
    """
)


def draw_key(rng: Random) -> str:
    """`adjective-noun`: what a needle's value is asked for by."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def draw_number(rng: Random) -> str:
    """Seven digits, the first not 0."""
    return str(rng.randrange(10**6, 10**7))


def draw_uuid(rng: Random) -> str:
    """A random uuid (version 4) in its usual spelling."""
    return str(UUID(int=rng.getrandbits(128), version=4))


def draw_variable(rng: Random) -> str:
    """Five capital letters."""
    return "".join(rng.choices(ascii_uppercase, k=5))


def distinct(draw: Draw, rng: Random) -> Iterator[str]:
    """Endless draws without repetition. Does not end when there is nothing new left to draw."""
    seen: set[str] = set()
    while True:
        value = draw(rng)
        if value not in seen:
            seen.add(value)
            yield value
