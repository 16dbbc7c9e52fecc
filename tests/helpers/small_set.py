"""A small evaluation set of our own: one valley, told in passages that questions share.

The place and its people are invented, so no model knows the answers from elsewhere; several
passages lean on others ("his sister", "that bridge"), which is what reuse loses.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from cacheblend_rag import cli

PASSAGES = {
    "The Varn valley": "The Varn valley lies between two ridges of grey slate. A narrow river, the "
    "Ost, runs through it from the glacier in the north to the lake in the south. There are five "
    "villages, and the largest of them is Hallin, with about nine hundred people. Snow closes the "
    "road from December until the middle of March, and in those months the post comes by sledge "
    "once a week. The valley is known for its wool, its dark honey and its clocks.",
    "The bridge at Hallin": "The stone bridge at Hallin was built in 1764 by Petra Solberg, a "
    "mason who had learned her trade in the quarries of the east ridge. It has three arches. An "
    "older bridge of oak stood at the same place until the flood of 1759 carried it away. For "
    "five years people crossed the Ost in a flat boat, and the ferryman asked one copper coin a "
    "head. When the new bridge was opened he was given a cow, so that he would not go hungry.",
    "The clockmaker": "Anders Solberg, a grandson of the mason, opened a workshop for clocks in "
    "Hallin in 1811. His tower clock on the school house has only one hand, because he held that "
    "nobody in the valley had any use for minutes. He trained eleven apprentices, and the best "
    "of them was Maren Dahl. When he died in 1849 he left her his tools, his debts and a clock "
    "that he had never been able to finish.",
    "Maren Dahl": "Maren Dahl was born in Ulvik, the village farthest up the valley, as the "
    "daughter of a beekeeper. She walked to Hallin every Monday and home again on Saturday. "
    "After her master's death she finished the clock that he had left her, and it won a silver "
    "medal in the capital in 1852. With the prize money she bought the empty mill below the "
    "bridge and turned it into a school for girls, where she taught arithmetic herself.",
    "The honey of Ulvik": "The bees of Ulvik feed on heather, and their honey is almost black. It "
    "is cut in September and sold in clay jars that hold one pound. Until the railway came, the "
    "jars were carried over the east ridge on the backs of goats. A jar cost as much as a pair of "
    "shoes. The beekeepers keep a rule that is older than any record: nobody may whistle within "
    "sight of a hive, and whoever forgets it pays with a loaf of bread.",
    "The railway": "The railway reached the valley in 1898. The line is thirty-one kilometres long "
    "and has nine tunnels, the longest of them under the east ridge. The engineer, Jonas Reiter, "
    "had wanted to pull down the stone bridge, but the villages refused, so the line crosses the "
    "Ost a little farther south, at Brekke. The first train carried no passengers at all: it was "
    "loaded with salt, window glass and a piano for the school.",
    "The glacier": "The glacier above the valley is called the Old Shepherd. In 1900 its tongue "
    "reached down to the upper meadows of Ulvik; today it ends almost two kilometres higher. A "
    "wooden post was set at its edge every tenth year, and the row of posts can still be walked. "
    "In the summer of 1976 the ice gave back a leather bag with letters in it. They had been "
    "lost by a postman in 1893, and all but two of them were delivered to the grandchildren.",
    "The lake": "The lake at the south end of the valley is ninety metres deep and never freezes "
    "entirely. Fishermen from Sand, the village on its shore, catch a kind of trout that lives "
    "nowhere else and has no spots. In 1931 a steamer named after the engineer of the railway "
    "began to cross it twice a day. It sank at its moorings in the winter of 1944 under the "
    "weight of the snow, and its bell now hangs in the chapel of Sand.",
    "The wool market": "The wool market is held in Hallin on the second Thursday of May. Sheep are "
    "judged by the length of their wool, and the winner is decorated with a blue ribbon and may "
    "graze for one day in the garden of the mayor. In 1923 there was a dispute, because two "
    "sheep had wool of exactly the same length. It was settled by weight, and the prize went to "
    "a ewe from Brekke that belonged to the station master.",
    "The mayor": "Since 1988 the mayor of Hallin has been Ingrid Moen, who was a vet before. She "
    "keeps her practice on Friday afternoons. In her first year in office she had the old mill "
    "repaired, which had stood empty since the girls' school moved out in 1960, and made it the "
    "library of the valley. It holds fourteen thousand books, and readers may keep a book for as "
    "long as the road is closed.",
    "The great flood": "The flood of 1759 began on the third of August, after eleven days of rain. "
    "The river rose by four metres in one night. Forty sheep, two barns and the oak bridge were "
    "lost, but no human life, because a boy called Nils Brandt had run from house to house with "
    "a cow bell. Every year on that day a bell is rung in all five villages at two in the "
    "morning, and some people are still woken by it and complain.",
    "The quarry": "Slate from the east ridge was split by hand until 1905. A good worker made "
    "three hundred tiles a day. The roofs of the capital's railway station and of its opera are "
    "made of it. The quarry closed in 1967, and since then bats have lived in its deepest hall: "
    "about two thousand of them spend the winter there. Visitors may enter from June to August, "
    "in groups of six, and must carry lamps with red glass.",
    "The school piano": "The piano that came with the first train is still played. It was a gift "
    "from a merchant whose daughter had been a pupil at the girls' school. Its first tuner was "
    "blind, and he came on foot from Sand twice a year for thirty years. During the winter of "
    "1944 the piano stood in the cellar under blankets, and a family of mice ate the felt of the "
    "lowest octave, which has sounded like a drum since.",
    "The inn": "The Red Ladle in Brekke is the oldest inn of the valley. It is older than the "
    "railway by two centuries and has always belonged to the Aas family. Its dish is a soup of "
    "barley, trout and sorrel. Guests who arrive by the last train may sleep in the kitchen "
    "without paying, if they wash the pots in the morning. In 1910 a painter stayed for a whole "
    "year on these terms and left eleven pictures, all of them of the same pot.",
}

QUESTIONS = [
    ("Who built the stone bridge at Hallin?", "Petra Solberg", "The bridge at Hallin"),
    ("In which year was the stone bridge built?", "1764", "The bridge at Hallin"),
    ("How many arches does the bridge have?", "three", "The bridge at Hallin"),
    ("What was the ferryman given when the bridge was opened?", "a cow", "The bridge at Hallin"),
    ("Which river runs through the Varn valley?", "the Ost", "The Varn valley"),
    ("Which is the largest village of the valley?", "Hallin", "The Varn valley"),
    ("How many hands does the clock on the school house have?", "one", "The clockmaker"),
    ("Who was the best apprentice of Anders Solberg?", "Maren Dahl", "The clockmaker"),
    ("In which village was Maren Dahl born?", "Ulvik", "Maren Dahl"),
    ("Which medal did the clock of Maren Dahl win?", "silver", "Maren Dahl"),
    ("On which plant do the bees of Ulvik feed?", "heather", "The honey of Ulvik"),
    ("What does whoever whistles near a hive pay with?", "a loaf of bread", "The honey of Ulvik"),
    ("Who was the engineer of the railway?", "Jonas Reiter", "The railway"),
    ("How many tunnels does the railway have?", "nine", "The railway"),
    ("What is the glacier called?", "the Old Shepherd", "The glacier"),
    ("What did the ice give back in 1976?", "a leather bag", "The glacier"),
    ("How deep is the lake?", "ninety metres", "The lake"),
    ("Where does the bell of the steamer hang now?", "the chapel of Sand", "The lake"),
    ("On which day is the wool market held?", "second Thursday of May", "The wool market"),
    ("What colour is the ribbon of the winning sheep?", "blue", "The wool market"),
    ("Who is the mayor of Hallin?", "Ingrid Moen", "The mayor"),
    ("What was the mayor before she took office?", "a vet", "The mayor"),
    ("Who warned the villages in the flood of 1759?", "Nils Brandt", "The great flood"),
    ("By how many metres did the river rise?", "four", "The great flood"),
    ("Which animals live in the quarry now?", "bats", "The quarry"),
    ("When did the quarry close?", "1967", "The quarry"),
    ("What ate the felt of the piano?", "mice", "The school piano"),
    ("Which family owns the Red Ladle?", "Aas", "The inn"),
]  # fmt: skip


def prepare(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command needs that asks the embedded model."""
    for name, value in cli.output.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def write(path: Path, *, every: int = 1, passages: int = 4, seed: int = 5) -> Path:
    """The questions, or one of so many, in the plain format, each over its own passage and others,
    in random order.
    """
    draw = random.Random(seed)
    lines = []
    for number, (question, answer, where) in enumerate(QUESTIONS[::every]):
        others = draw.sample([title for title in PASSAGES if title != where], passages - 1)
        titles = draw.sample([where, *others], passages)
        lines.append(
            {
                "id": f"valley-{number:02}",
                "question": question,
                "answers": [answer],
                "passages": [{"title": t, "text": PASSAGES[t]} for t in titles],
            }
        )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
