"""Expense notes and the record of each: one narrow job, whose answers a program checks.

    python recipes/task/make.py FOLDER [--train 6000] [--seed 0]

A note is free text ("Paid the 4th of May 2023: 1,250 Swiss francs at Alder Clinic, table 12."), its record strict JSON:

    {"payee": "Alder Clinic", "date": "2023-05-04", "amount": 1250.00, "currency": "CHF"}

Training, held-out and test notes share no sentence, no word of a payee, no day and no amount. They share the ways of
writing a day, an amount and a currency, which are what is to be learnt. `overlaps` counts, and is printed. FOLDER gets
`train.jsonl`, conversations, and `heldout.jsonl` and `test.jsonl`, questions with their answers: settings are chosen by
the first, and the second is asked once.
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
from pathlib import Path

SYSTEM = "Write the expense as JSON."
SPLITS = ("train", "heldout", "test")
TEST_NOTES, HELDOUT_NOTES = 300, 200
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
# `{p}` is the payee, `{d}` the day, `{a}` the amount with its currency, `{n}` a number that is none of them.
SENTENCES = {
    "train": (
        "Paid {a} to {p} on {d}.",
        "On {d} I spent {a} at {p}.",
        "{p}, {d}, {a}",
        "Receipt from {p}: {a}, dated {d}.",
        "{d}: {a} at {p}",
        "Lunch at {p} with {n} people on {d}, {a} in total.",
        "Invoice {n} from {p} over {a}, paid on {d}.",
        "Bought a few things for the team at {p}. It came to {a} on {d}.",
        "The bill of {d} was {a}, from {p}.",
        "{a} went to {p} on {d} for the spring order.",
        "Please refund {a} that I paid to {p} on {d}.",
        "{p} charged us {a} on {d}.",
        "Card payment, {p}, {a}, booked {d}, terminal {n}.",
        "We stayed at {p} until {d} and paid {a} for {n} nights.",
        "Order {n}: {p} delivered on {d}, price {a}.",
        "My expense for {d} is {a}. Payee: {p}.",
        "Date {d}. Payee {p}. Total {a}.",
        "Total {a}, payee {p}, date {d}, reference {n}.",
        "Yesterday's taxi by {p} cost {a}; the receipt says {d}.",
        "Could you book {a} for {p}? The receipt is from {d}.",
        "From {p} we got a bill of {a} on {d}, due in {n} days.",
        "{p} ({d}): {a}",
        "Picked up parts at {p}, {a}, on {d}, for project {n}.",
        "Spent on {d}: {a}. Where: {p}.",
        "It was {a} for {n} tickets at {p} on {d}.",
        "Membership at {p} renewed on {d} for {a}.",
        "A deposit of {a} was left with {p} on {d}.",
        "Petty cash, {d}, {p}: {a}.",
        "{n} copies from {p} cost me {a} on {d}.",
        "On {d}, {p} took {a} from the company card ending in {n}.",
        "Reimburse {a}, please. It was at {p}, on {d}.",
        "After the meeting on {d} we ate at {p} for {a}.",
        "Transfer to {p}, {a}, {d}",
        "Sent {p} {a}. Date: {d}.",
        "Coffee from {p}, {d}, {a}.",
        "The order at {p} of {d} comes to {a}.",
        "Fees for {d}: {p} {a}",
        "What {p} billed on {d} is {a} plus nothing.",
        "New shelves, {n} pieces, {p}, {a}, delivered {d}.",
        "Refund from my side: none. I paid {p} {a} on {d}.",
        "Ledger entry {n}: {d}, {a}, {p}.",
        "Please add {p} with {a} to {d}.",
        "Since {d} the account at {p} is clear: {a} went out.",
        "Parking at {p} on {d} was {a}.",
        "{a}, {p}, {d}, receipt {n}.",
        "A cheque over {a} for {p} was cashed on {d}.",
        "Gift card of {p} worth {a}, bought {d}.",
        "To {p}: {a}, sent {d}.",
    ),
    "heldout": (
        "Cash to {p}, {a}, {d}.",
        "The team's purchase at {p} of {d} adds up to {a}.",
        "Note for the books: {a} on {d}, {p}.",
        "{p} sent bill number {n} on {d}; we owe {a}.",
    ),
    "test": (
        "I gave {p} {a} on {d}.",
        "{d} - {p} - {a}",
        "Dinner for {n} at {p} came to {a} on {d}.",
        "For {d} add {a}, spent at {p}.",
        "Settled the account of {p} with {a} on {d}.",
        "We owe nothing more to {p} since {a} was transferred on {d}.",
        "Ticket {n}, {p}, {a}, valid {d}.",
        "Train ride with {p} on {d}. Fare: {a}.",
        "The repair by {p} was finished on {d} and cost {a}.",
        "Expense: {a} | {p} | {d}",
        "{a} for {n} chairs, bought from {p} on {d}.",
        "On the company's account: {p}, {a}, {d}.",
    ),
}
# A student that sees few sentences learns them by heart, and copies from the wrong place in another one. So half of the
# training notes draw one of each `[a|b]` below, and a quarter are fields in any order.
PATTERNS = (
    "{p} [sent|issued|mailed] [a bill|an invoice|form {n}] on {d}[;|,|.] [we paid|it says|due:] {a}.",
    "{p}'s [letter|statement|email] of {d} [asks for|lists|names] {a}[.| under reference {n}.| for {n} hours.]",
    "[We|I|The office|A colleague] [paid|transferred|wired] {a} to {p} on {d}[.| for {n} boxes.| in coins.]",
    "[We|I|My manager] [went to|stopped at|was at] {p} on {d}[, it was| and paid| and left] {a}[.| for {n} of us.]",
    "[All is settled|We are even|Nothing is open] with {p} [now that|because] {a} [was sent|went out] on {d}.",
    "[Breakfast|Drinks|A meal|Supper] [with|for] {n} [guests|clients] at {p} [was|cost|made] {a} on {d}.",
    "[On|As of] {d}, {p} [delivered|mended|cleaned|installed] [{n} lamps|the printer|our boiler] for {a}.",
    "[The boiler|A window|The lift|Our server] was [mended|serviced|checked] by {p} on {d}[, price| for|:] {a}.",
    "[Bus|Taxi|Flight|Ferry] [by|of] {p}[,| on] {d}[, price| for|, I paid] {a}[.|, seat {n}.]",
    "[Enter|Record|Book|File] {a} [under|on|for] {d}[, the shop is|, it was|; payee] {p}.",
    "{a} [paid for|covers|buys] [{n} lamps|{n} desks|the tickets] [from|by] {p}[,| on] {d}.",
    "[Why|When|How] did we pay {p} {a} on {d}?[| See page {n}.]",
    "[I have|There is] a receipt [from|of] {p} for {a}[, it is of|, dated] {d}[.|, no. {n}.]",
    "[The card|The bank] [shows|lists] {a} [to|for|at] {p} on {d}[.|, line {n}.]",
    "[In|Room|Box|Shelf] {n}: [what|the things that] {p} [sold|brought] us on {d} for {a}.",
    "[Until|From|Since] {d} we [rent|hire|lease] from {p} at {a}[.| for {n} months.]",
    "[A fine|A fee|A tip|A loan] of {a}[, {p}, {d}| to {p} on {d}| at {p}, {d}].",
    "[They|The people] at {p} [wanted|took|asked] {a} when we [came|called] on {d}.",
    "[Hello|Hi|Dear all], {a} [went|goes] to {p}[;|,|.] [the day is|it was on|date] {d}[.|. Thanks!]",
    "[What we bought|The goods] from {p} [came|arrived] on {d}[,|;] [worth|together|all for] {a}.",
    "[Seminar|Course|Class] {n} [at|with|of] {p} [on|from] {d} [is|was|costs] {a}.",
    "[For|About] {a} see {p}, {d}[.|, file {n}.]",
    "{d} [was the day|is when] {p} [got|received|charged] {a}[.| for {n} hours.]",
    "{a} [is missing|was taken|is gone] [since|on] {d}: {p}[.| again.|, number {n}.]",
    "[Not|Never] [a lot|much]: {a} at {p} on {d}.",
    "[Sold|Bought|Hired] [by|through|via] {p} [on|dated] {d} at {a}[.|, {n} pieces.]",
)
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
    found: dict[str, Note] = {}
    while len(found) < count:
        payee = draw.choice(firsts) if draw.random() < 0.25 else _coined(draw, split)
        if draw.random() < 0.75:
            payee += " " + (draw.choice(seconds) if draw.random() < 0.6 else _coined(draw, split))
        sentence = _sentence(draw, split)
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


def _sentence(draw: random.Random, split: str) -> str:
    kind = draw.random() if split == "train" else 1
    if kind < 0.5:
        return re.sub(r"\[([^]]*)\]", lambda one: draw.choice(one[1].split("|")), draw.choice(PATTERNS))
    return _fields(draw) if kind < 0.75 else draw.choice(SENTENCES[split])


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


def overlaps(by_split: dict[str, list[Note]]) -> dict[str, int]:
    """How many values of each kind occur in more than one split."""
    kinds: dict[str, Callable[[Note], set[object]]] = {
        "notes": lambda note: {note.text},
        "sentences": lambda note: {note.sentence},
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
    return {"question": note.text, "answer": note.record}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=6000, help="notes to train on (default: 6000)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sizes = dict(zip(SPLITS, (options.train, HELDOUT_NOTES, TEST_NOTES), strict=True))
    by_split = {split: notes(split, count, options.seed) for split, count in sizes.items()}
    options.folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        record = chat if split == "train" else question
        records = [record(note) for note in by_split[split]]
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (options.folder / f"{split}.jsonl").write_text(text)
    print(json.dumps({"notes": sizes, "in more than one split": overlaps(by_split)}))


if __name__ == "__main__":
    main()
