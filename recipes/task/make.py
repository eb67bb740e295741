"""Expense notes and the record of each: one narrow job, whose answers a program checks.

    python recipes/task/make.py FOLDER [--train 14000] [--seed 0]

A note is free text ("Paid the 4th of May 2023: 1,250 Swiss francs at Alder Clinic, table 12."), its record strict JSON:

    {"payee": "Alder Clinic", "date": "2023-05-04", "amount": 1250.00, "currency": "CHF"}

Training, held-out and test notes share no sentence, no word of a payee, no day and no amount. They share the ways of
writing a day, an amount and a currency, which are what is to be learnt. `overlaps` counts, and is printed. FOLDER gets
`train.jsonl`, conversations, and `heldout.jsonl` and `test.jsonl`, questions with their answers and sentences: settings
are chosen by the first, and the second is asked once.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache
from pathlib import Path

SYSTEM = "Write the expense as JSON."
SPLITS = ("train", "heldout", "test")
NOTES_A_SENTENCE = 5
"""Of held-out and test notes."""
FIRST_DAY, DAYS = date(2018, 1, 1), 3650

FIRST_WORDS = (
    "Alder Amber Apex Arcade Atlas Aurora Avalon Bayside Beacon Birch Bluebell Bramble Bright Bristol"
    " Brook Cactus Canyon Castle Cedar Central Chestnut Cinnamon City Clover Coastal Cobalt Copper Coral"
    " Corner Crescent Crown Crystal Daisy Delta Diamond Dolphin Eagle East Ebony Echo Elm Ember Emerald"
    " Empire Evergreen Falcon Fern Fountain Fox Garden Garnet Ginger Golden Granite Green Grove Gulf"
    " Harbour Harvest Hawthorn Hazel Heron Highland Hillside Horizon Imperial Indigo Iris Iron Island"
    " Ivory Ivy Jade Jasmine Juniper Kestrel Kings Lagoon Lakeside Lantern Laurel Lavender Lemon Liberty"
    " Lilac Lotus Lunar Magnolia Mango Maple Marble Marina Meadow Mercury Metro Midtown Mill Mint Monarch"
    " Moss Nectar Nordic Northgate Nova Oak Oasis Ocean Olive Onyx Opal Orchard Orient Otter Palm"
    " Panorama Pearl Pepper Phoenix Pine Pioneer Plaza Poppy Prairie"
)
SECOND_WORDS = (
    "Airlines Auto Bakery Bikes Bistro Books Burgers Cafe Cars Chemists Cinema Clinic Coffee Deli Dental"
    " Diner Energy Express Fabrics Fitness Florists Foods Furniture Gallery Games Garage Grill Gym"
    " Hardware Hostel Hotel Inn Insurance Kitchen Laundry Library Lighting Logistics Market Media Motors"
    " Museum Music Noodles Nursery Office Optics Outdoors Paints Parking Pharmacy Pizza Plumbing Post"
    " Press Printing Radio Rail Repairs Restaurant Salon School Shoes Software Sports Stationers Studio"
    " Supplies Taxi Tea Telecom Theatre Tools Toys Travel"
)
ONSETS = (
    "b bl br c ch cl cr d dr f fl fr g gl gr h j k kl kr l m n p pl pr qu r s sc sh sk sl sm sn sp st str sw t th tr"
    " tw v w wh y z"
)
NUCLEI = "a a e e i i o o u u ai au ea ee ie oa oo ou ay y"
CODAS = "- - - b ck d f g k l ll m mp n nd ng nk nt p r rd rk rm rn rt s sh ss st t th x"
"""Of coined words: too many to be known by heart, so that a model learns to copy them."""
# Sentences are in `sentences/`, a file a split: `{p}` is the payee, `{d}` the day, `{a}` the amount with its currency,
# `{n}` a number that is none of them, and of each `[a|b]` one is drawn. A student that sees few sentences learns them
# by heart, and copies from the wrong place in another one: so there are many to train on, and a quarter of the training
# notes are fields in any order.
OPENINGS = (
    "Bill",
    "Booked",
    "Business trip",
    "Car hire",
    "Charged",
    "Company lunch",
    "Conference costs",
    "Consumables",
    "Delivery {n}",
    "Entry {n}",
    "Farewell present",
    "Fuel",
    "Got a receipt",
    "Invoice no. {n}",
    "Item {n}",
    "Journal {n}",
    "Late fee",
    "Licences, {n} seats",
    "Monthly plan",
    "My own money",
    "New cables",
    "Order {n}",
    "Paid",
    "Petty costs",
    "Printing {n} flyers",
    "Project {n}",
    "Purchase",
    "Receipt {n}",
    "Reminder",
    "Rent of a room",
    "Reimbursement",
    "Snacks for {n} guests",
    "Spare parts",
    "Spent",
    "Stamps",
    "Subscription",
    "Team event",
    "To be booked",
    "Toner",
    "Workshop",
)
PARTS = (
    (
        "{p}",
        "at {p}",
        "from {p}",
        "to {p}",
        "by {p}",
        "via {p}",
        "({p})",
        "payee {p}",
        "payee: {p}",
        "supplier {p}",
    ),
    ("{d}", "on {d}", "({d})", "dated {d}", "date: {d}", "as of {d}", "it was {d}", "the day was {d}"),
    (
        "{a}",
        "for {a}",
        "({a})",
        "total {a}",
        "amount: {a}",
        "sum {a}",
        "{a} in all",
        "it cost {a}",
        "price {a}",
    ),
)
ASIDES = (
    "as agreed",
    "by card",
    "cost centre {n}",
    "file {n}",
    "for {n} people",
    "no tip",
    "page {n}",
    "paid already",
    "see no. {n}",
    "with thanks",
)
JOINERS = (", ", "; ", ". ", " ", " / ", ": ")
CURRENCIES = {
    "EUR": ("€{}", "{} €", "{} EUR", "EUR {}", "{} euros"),
    "USD": ("${}", "US${}", "{} USD", "USD {}", "{} dollars"),
    "GBP": ("£{}", "{} GBP", "GBP {}", "{} pounds"),
    "CHF": ("CHF {}", "{} CHF", "{} Swiss francs"),
    "SEK": ("SEK {}", "{} SEK", "{} Swedish kronor"),
    "JPY": ("¥{}", "{} JPY", "{} yen"),
}
WAYS_OF_A_DAY: tuple[Callable[[date], str], ...] = (
    lambda day: day.isoformat(),
    lambda day: f"{day.day} {day:%B} {day.year}",
    lambda day: f"{day:%B} {day.day}, {day.year}",
    lambda day: f"{day.day} {day:%b} {day.year}",
    lambda day: f"{day:%b} {day.day}, {day.year}",
    lambda day: f"{day:%d.%m.%Y}",
    lambda day: f"the {ordinal(day.day)} of {day:%B} {day.year}",
    lambda day: f"{day:%A}, {day.day} {day:%B} {day.year}",
)


@dataclass(frozen=True)
class Note:
    text: str
    payee: str
    day: date
    cents: int
    currency: str
    sentence: str

    @property
    def record(self) -> str:
        amount = f"{self.cents // 100}.{self.cents % 100:02d}"
        return (
            f'{{"payee": "{self.payee}", "date": "{self.day.isoformat()}",'
            f' "amount": {amount}, "currency": "{self.currency}"}}'
        )


def ordinal(day: int) -> str:
    ending = "th" if 10 < day < 14 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{ending}"


def share(value: int | str) -> str:
    """The split that a word, a day or an amount belongs to: a tenth is held out, three tenths are for tests."""
    number = zlib.crc32(value.encode()) if isinstance(value, str) else value
    place = (number * 2654435761 % 2**32) % 10
    return "heldout" if place == 0 else "test" if place < 4 else "train"


def notes(split: str, count: int, seed: int) -> list[Note]:
    """So many different notes of a split; the same for the same seed."""
    draw = random.Random(f"{seed} {split}")
    days = [FIRST_DAY + timedelta(days=day) for day in range(DAYS) if share(day) == split]
    firsts, seconds = (
        [word for word in words.split() if share(word) == split] for words in (FIRST_WORDS, SECOND_WORDS)
    )
    lines = sentences(split)
    others = {worded(line) for other in SPLITS if other != split for line in sentences(other)}
    found: dict[str, Note] = {}
    while len(found) < count:
        payee = draw.choice(firsts) if draw.random() < 0.25 else _coined(draw, split)
        if draw.random() < 0.75:
            payee += " " + (draw.choice(seconds) if draw.random() < 0.6 else _coined(draw, split))
        if split == "train":
            sentence = _fields(draw) if draw.random() < 0.25 else _drawn(draw, draw.choice(lines))
            if worded(sentence) in others:
                continue
        else:  # each as often as any other
            sentence = lines[len(found) % len(lines)]
        currency, day = draw.choice(list(CURRENCIES)), draw.choice(days)
        cents = _cents(draw, split, currency)
        written = _written(draw, cents)
        text = sentence.format(
            p=payee,
            d=draw.choice(WAYS_OF_A_DAY)(day),
            a=draw.choice(CURRENCIES[currency]).format(written),
            n=draw.randint(2, 9) if "people" in sentence or "nights" in sentence else draw.randint(2, 990),
        )
        text = text[0].upper() + text[1:]
        found.setdefault(text, Note(text, payee, day, cents, currency, sentence))
    return list(found.values())


@cache
def sentences(split: str) -> list[str]:
    return (Path(__file__).parent / "sentences" / f"{split}.txt").read_text().splitlines()


def worded(sentence: str) -> str:
    """A sentence's words, by which two are the same."""
    return " ".join(re.findall(r"{?\w+}?", sentence.lower()))


def _drawn(draw: random.Random, pattern: str) -> str:
    return re.sub(r"\[([^]]*)\]", lambda one: draw.choice(one[1].split("|")), pattern)


def _fields(draw: random.Random) -> str:
    """What passes for a sentence in a note: "Toner; from {p}; {d}; {a} in all"."""
    joiner = draw.choice(JOINERS)
    ways = [PARTS[0][1:] if joiner == " " else PARTS[0], *PARTS[1:]]  # a bare name has its ends marked
    parts = [draw.choice(each) for each in ways]
    draw.shuffle(parts)
    if draw.random() < 0.3:
        parts.insert(draw.randrange(4), draw.choice(ASIDES))
    sentence = joiner.join(parts)
    if draw.random() < 0.75:
        behind = draw.choice((": ", ", ", ". ") if sentence.startswith("{p}") else (": ", " ", ", ", ". "))
        sentence = draw.choice(OPENINGS) + behind + sentence
    return sentence + draw.choice(("", "."))


def _coined(draw: random.Random, split: str) -> str:
    """A word of the split that is none: "Skeanthorm"."""
    while True:
        syllables = (
            "".join(draw.choice(part.split()) for part in (ONSETS, NUCLEI, CODAS)).strip("-")
            for _ in range(draw.choice((1, 2, 2, 3)))
        )
        word = "".join(syllables).capitalize()
        if len(word) > 2 and share(word) == split:
            return word


def _cents(draw: random.Random, split: str, currency: str) -> int:
    """An amount of the split, without a fraction for yen and for a third of the others."""
    while True:
        whole = draw.choice((draw.randint(3, 99), draw.randint(100, 999), draw.randint(1000, 9999)))
        cents = 100 * whole
        if currency != "JPY" and draw.random() > 1 / 3:
            cents += draw.randint(1, 99)
        if share(cents) == split:
            return cents


def _written(draw: random.Random, cents: int) -> str:
    whole, rest = divmod(cents, 100)
    grouped = f"{whole:,}" if draw.random() < 0.5 else str(whole)
    return grouped if not rest and draw.random() < 0.5 else f"{grouped}.{rest:02d}"


def asked_notes(split: str) -> int:
    """How many held-out or test notes there are."""
    return NOTES_A_SENTENCE * len(sentences(split))


def overlaps(by_split: dict[str, list[Note]]) -> dict[str, int]:
    """How many values of each kind occur in more than one split."""
    kinds: dict[str, Callable[[Note], set[object]]] = {
        "notes": lambda note: {note.text},
        "sentences": lambda note: {worded(note.sentence)},
        "words of payees": lambda note: set(note.payee.split()),
        "days": lambda note: {note.day},
        "amounts": lambda note: {note.cents},
    }
    found = {}
    for kind, of in kinds.items():
        seen = [set().union(*map(of, by_split[split])) for split in SPLITS]
        found[kind] = len((seen[0] & seen[1]) | (seen[0] & seen[2]) | (seen[1] & seen[2]))
    return found


def chat(note: Note) -> dict[str, object]:
    said = (("system", SYSTEM), ("user", note.text), ("assistant", note.record))
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def question(note: Note) -> dict[str, object]:
    return {"question": note.text, "answer": note.record, "sentence": note.sentence}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=14000, help="notes to train on (default: 14000)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sizes = {"train": options.train} | {split: asked_notes(split) for split in SPLITS[1:]}
    by_split = {split: notes(split, count, options.seed) for split, count in sizes.items()}
    shared = overlaps(by_split)
    print(json.dumps({"notes": sizes, "in more than one split": shared}))
    if any(shared.values()):
        raise SystemExit("error: splits share something. Give another --seed.")
    options.folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        record = chat if split == "train" else question
        records = [record(note) for note in by_split[split]]
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (options.folder / f"{split}.jsonl").write_text(text)


if __name__ == "__main__":
    main()
