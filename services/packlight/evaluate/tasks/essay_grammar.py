"""The words and sentence patterns that essays are made of: data only.

A subject is what one paragraph is about. `{slot}` in a pattern is a list here, first of the paragraph's subject, then
of `COMMON`. Nothing holds a digit or the words "magic" and "variable", so that nothing looks like a needle.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType


def _words(text: str) -> tuple[str, ...]:
    return tuple(" ".join(part.split()) for part in text.split(","))


def _subject(person: str, thing: str, place: str, work: str) -> Mapping[str, tuple[str, ...]]:
    return MappingProxyType(
        {"person": _words(person), "thing": _words(thing), "place": _words(place), "work": _words(work)}
    )


SUBJECTS = (
    _subject(
        "carpenter, apprentice, joiner, old cabinetmaker, turner",
        "chisel, workbench, oak plank, dovetail joint, hand plane, drawer, glue pot, chair leg",
        "workshop, timber yard, drying shed, loft, back room",
        "cutting a joint, sharpening a blade, sanding a table top, choosing the grain, mending a chair",
    ),
    _subject(
        "gardener, beekeeper, neighbor, botanist, groundskeeper",
        "seedling, hedge, rose bush, compost heap, watering can, trellis, bean row, spade",
        "kitchen garden, greenhouse, orchard, lower terrace, walled plot",
        "pruning the pears, turning the soil, saving seed, thinning the carrots, watching the frost",
    ),
    _subject(
        "fisherman, harbor master, ferry pilot, net mender, lighthouse keeper",
        "rowing boat, anchor, lobster pot, tide table, sail, mooring line, lantern, compass",
        "harbor, estuary, breakwater, fish market, slipway",
        "reading the tide, tarring a hull, hauling the nets, splicing rope, waiting out the fog",
    ),
    _subject(
        "librarian, archivist, bookbinder, young reader, translator",
        "catalog card, atlas, manuscript, reading lamp, ledger, spine, margin note, folio",
        "reading room, archive, bindery, map room, quiet stairwell",
        "sorting the returns, mending a spine, copying a page, naming the collection, finding a lost volume",
    ),
    _subject(
        "baker, cook, dishwasher, grandmother, tea merchant",
        "copper pan, loaf, bread oven, rolling pin, stock pot, recipe book, salt jar, wooden spoon",
        "kitchen, pantry, bakery, dining hall, street stall",
        "kneading the dough, tasting the broth, slicing onions, proving a loaf, setting the table",
    ),
    _subject(
        "signalman, engine driver, conductor, track walker, timetable clerk",
        "locomotive, lever, timetable, whistle, freight wagon, switch, sleeper car, pocket watch",
        "signal box, junction, platform, engine shed, mountain tunnel",
        "oiling the points, reading the gradient, counting wagons, planning a detour, walking the line",
    ),
    _subject(
        "astronomer, night assistant, instrument maker, student, mathematician",
        "telescope, star chart, mirror, eyepiece, notebook, pendulum clock, photographic plate, dome shutter",
        "observatory, hilltop, darkroom, lecture hall, cold dome",
        "grinding a lens, timing an eclipse, drawing a comet, checking the sums, waiting for clear sky",
    ),
    _subject(
        "teacher, headmistress, caretaker, pupil, music master",
        "blackboard, primer, inkwell, school bell, piano, exercise book, globe, wooden ruler",
        "classroom, playground, assembly hall, village school, corridor",
        "marking essays, explaining fractions, tuning the piano, learning a poem, rehearsing a play",
    ),
    _subject(
        "weaver, dyer, tailor, shepherd, cloth merchant",
        "loom, shuttle, bolt of linen, spindle, indigo vat, buttonhole, bale of wool, pair of shears",
        "weaving shed, dye house, market square, fulling mill, fitting room",
        "carding the wool, counting threads, mixing a blue, hemming a coat, setting up the warp",
    ),
    _subject(
        "surveyor, bridge builder, mason, road mender, city planner",
        "arch, foundation, plumb line, scaffold, culvert, keystone, cobblestone, drainage ditch",
        "river crossing, quarry, town gate, building site, old causeway",
        "measuring the span, dressing stone, sinking a pile, drawing the street, testing the mortar",
    ),
    _subject(
        "watchmaker, jeweler, locksmith, collector, repairer",
        "mainspring, brass gear, clock face, loupe, key, escapement, music box, jewel bearing",
        "shop window, front counter, clock tower, vault, back office",
        "cleaning a movement, filing a key, setting the hour, tracing a fault, winding the tower clock",
    ),
    _subject(
        "country doctor, nurse, pharmacist, midwife, patient",
        "stethoscope, medicine chest, thermometer, bandage, mortar and pestle, house call, prescription, waiting list",
        "surgery, ward, dispensary, farmhouse, sickroom",
        "listening to a chest, weighing powders, setting a bone, sitting up with a fever, keeping careful records",
    ),
)

COMMON: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "adj": _words(
            """
            plain, patient, modest, careful, stubborn, quiet, honest, awkward, elegant, familiar,
            forgotten, ordinary, sturdy, delicate, useful, curious, cheap, handsome, worn, narrow,
            reliable, clumsy, generous, peculiar
            """
        ),
        "adv": _words(
            """
            slowly, carefully, gladly, rarely, calmly, almost at once, without complaint, by hand, in
            silence, with great patience, against all advice, more than once, as a matter of habit, quite
            by accident
            """
        ),
        "when": _words(
            """
            in early spring, on winter evenings, before breakfast, after the rain, late in the week, at
            the end of the season, long ago, during the dry months, toward midnight, on market days, in a
            hurry, when nobody was looking, year after year, all summer
            """
        ),
        "did": _words(
            """
            praised, repaired, borrowed, neglected, described, measured, sold, carried, admired,
            misjudged, remembered, replaced, inspected, hid, defended, inherited, polished, questioned,
            rescued, returned
            """
        ),
        "does": _words(
            """
            rewards, forgives, punishes, reveals, hides, improves, outlasts, resists, repays, changes,
            simplifies, shapes
            """
        ),
        "idea": _words(
            """
            patience, good judgment, habit, memory, skill, luck, thrift, attention, good company, doubt,
            tradition, curiosity, pride, comfort, honest work, caution, trust, ambition, silence,
            experience
            """
        ),
        "claim": _words(
            """
            small things last longest, the first try is seldom the best, nobody learns from praise alone,
            cheap tools cost the most, a good question saves a day, the weather decides in the end, most
            mistakes are made in a hurry, the simple way was tried last, what is free is rarely looked
            after, every rule began as an accident, those who teach learn twice, one does not argue with a
            season, beauty is a kind of order, the answer was in plain sight
            """
        ),
        "link": _words(
            """
            Still, Of course, In the same way, For all that, After a while, To be fair, In practice, More
            often, Even so, On the whole, As a rule, Looking back, Now and then, In other words
            """
        ),
        "people": _words(
            """
            visitors, strangers, beginners, most of us, the neighbors, travelers, people from the city,
            the older generation, children, those in a hurry, friends, customers
            """
        ),
        "think": _words(
            """
            suppose, believe, forget, admit, discover, suspect, know, doubt, deny, notice
            """
        ),
        "feel": _words(
            """
            proud, uneasy, at home, foolish, relieved, hopeful, tired, lucky, curious, grateful
            """
        ),
    }
)

PATTERNS = tuple(
    """
The {person} {did} the {adj} {thing} {when}.
{link}, the {person} {did} a {adj} {thing} and said that {claim}.
There is something {adj} about {work}, and {people} who come to the {place} notice it {adv}.
Nobody at the {place} spoke of the {thing} {when}.
{link}, {idea} {does} {idea}, at least in the {place}.
What {people} {think} about {work} is that {claim}.
If the {thing} in the {place} looks {adj}, that is because the {person} {did} it {adv}.
I once knew a {person} who {did} every {thing} {adv}.
{work} teaches {idea}, for {claim}.
{when}, the {place} smelled of rain and the {person} felt {feel}.
It takes a {adj} {person} to see that {idea} {does} the {thing}.
The {thing} was {adj}, the {place} was {adj}, and yet {people} felt {feel} there.
{link}, {work} {when} is better than {work} {adv}.
A {adj} {thing} is worth more than a {adj} one, as the {person} liked to say {when}.
{people} {think} that {claim}, but the {person} {did} the {thing} and knew better.
Some of the best hours in the {place} are spent {work} {when}.
Between the {thing} and the {thing} the {person} kept a {adj} {thing}.
The difference between {idea} and {idea} is easiest to see when {work}.
{link}, whoever {did} the {thing} {when} must have felt {feel}.
A friend of mine, once a {person}, would say that {idea} is only {idea} in {adj} clothes.
One {adj} {thing} after another was carried out of the {place} {when}.
It was {adj} work, {work}, and the {person} did it {adv}.
Why {people} should {think} that {claim} is hard to say {when}.
The {place} has changed, but {work} still {does} {idea}.
{when} the {person} closed the {place} and {did} the {thing} {adv}.
A {person} who hurries while {work} will feel {feel} by evening.
{idea} is not the same as {idea}, and a {adj} {thing} shows it.
They kept the {thing} in the {place}, where {people} {did} it {adv}.
{link}, a {thing} that nobody {did} is as {adj} as a {place} that nobody visits.
The {adj} {person} and the {adj} {person} rarely met, though both were fond of {work}.
{people} came to the {place} {when}, and the {person} {did} the {thing} for them {adv}.
Ask the {person} about {idea} and you will hear about {work}.
Neither {idea} nor {idea} will help with a {adj} {thing}.
{link}, {claim}, and in the {place} {people} {think} it.
""".strip().splitlines()
)
