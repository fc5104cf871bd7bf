// A long document with a needle in it, and the question that only the needle answers.

const NUM_DAYS = 50;
const NEEDLE_DAY = 19;
const NEEDLE = "The number that opens the signal locker is 73914.";
const QUESTION = "What is the number that opens the signal locker?";

// Lists of 7, 9 and 11: no two days are alike.
const WEATHER = [
  "Fog until noon, then a pale sun over the sound.",
  "Hard rain from the west all night; the gutters held.",
  "Clear and still, and the far islands stood close.",
  "A gale by evening, with spray on the lantern glass.",
  "Low cloud, little wind, the sea the colour of slate.",
  "Frost on the steps, sanded them before breakfast.",
  "Warm air from the south and swifts above the cliff.",
];
const WORK = [
  "Cleaned the lens and counted the spare mantles.",
  "Painted the north rail; the tin is almost empty.",
  "Oiled the winch and walked the cable to its anchor.",
  "Mended the henhouse door, for the third time this year.",
  "Took the boat to the village for flour, rope and letters.",
  "Swept the tower from the gallery down to the cellar.",
  "Wound the clockwork twice, as the weight ran fast.",
  "Put new putty around the panes that look to the sea.",
  "Carried forty buckets from the well, as the pump is dry.",
];
const NOTES = [
  "Two trawlers passed before dusk and neither one signalled.",
  "A seal lay on the slip until the tide took it back.",
  "The inspector’s letter came and asks for nothing new.",
  "Heard geese at midnight and saw none of them.",
  "Read by the stove and slept badly for the wind.",
  "The barometer fell, rose and fell again without effect.",
  "A bottle washed ashore, empty, with a good cork in it.",
  "The mail boat was late and brought a newspaper from Monday.",
  "Saw the comet low in the east an hour before dawn.",
  "The potatoes are in and the onions have to wait.",
  "A schooner asked for the hour and was given it by lamp.",
];

export function sample() {
  const days = Array.from({ length: NUM_DAYS }, (_, day) => {
    const written = [WEATHER[day % 7], WORK[day % 9], day === NEEDLE_DAY ? NEEDLE : NOTES[day % 11]];
    return `Day ${day + 1}. ${written.join(" ")}`;
  });
  return `This is the logbook of a lighthouse keeper.\n\n${days.join("\n")}\n\n${QUESTION}`;
}
