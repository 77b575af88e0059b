"""What an emoji's name is made of, and which names are held out (pure functions on names; no files, no torch).

A name such as "woman pilot dark skin tone" is a *base* ("pilot") with *modifiers* (gender=woman, tone=dark). The
splits hold out combinations whose every component stays in `train`, and, apart from those, whole bases.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SPLITS = ("train", "validation", "test", "validation-unseen", "test-unseen", "spare")
"""`spare`: variants of held-out combinations beyond those scored. In no other split, so that they cannot leak."""

_TONE = re.compile(r" (light|medium-light|medium|medium-dark|dark) skin tone\b")
_CLOCK = re.compile(r"(\w+)(?:-(thirty)| (o'clock))")
_GENDER = re.compile(r"((?:deaf |pregnant )?)(woman and man|man|woman|person|men|women|people)(?: (.+))?")
_SWATCHES = "🏻🏼🏽🏾🏿🦰🦱🦲🦳"  # skin tones and hair as drawings of their own
_PERSONS = frozenset({"man", "woman", "person", "adult"})
_CHILDREN = frozenset({"boy", "girl", "child"})
_COLOUR = re.compile(
    r"(light blue|red|orange|yellow|green|blue|purple|brown|black|white|pink|grey) (.+)",
)
_SIZE = re.compile(r"(large|medium|medium-small|small) (.+)")
_HOURS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


@dataclass(frozen=True)
class Name:
    """A caption taken apart."""

    caption: str
    base: str
    group: str
    modifiers: tuple[tuple[str, str], ...] = ()
    """(slot, value), sorted: ("gender", "woman"), ("tone", "dark"), …"""
    characters: str = ""
    """The emoji itself."""

    @property
    def toned(self) -> bool:
        return any(slot.startswith("tone") for slot, _ in self.modifiers)

    @property
    def pairing(self) -> tuple[str, tuple[tuple[str, str], ...]]:
        """The combination without skin tones: what has to be new for an easy tone variant not to give it away."""
        return self.base, tuple(m for m in self.modifiers if not m[0].startswith("tone"))


def clean_caption(name: str, characters: str) -> str:
    """Natural text from the `emoji` package's name (":woman_pilot_dark_skin_tone:") of the emoji `characters`."""
    text = name.strip(":").replace("_", " ").replace("’", "'")
    if not _is_flag(characters):
        return text
    text = re.sub(r" \(.*?\)", "", text.removeprefix("flag: ")).replace(" & ", " and ")
    return text if "flag" in text.split() else f"flag of {text}"


def _is_flag(characters: str) -> bool:
    first = ord(characters[0])
    return 0x1F1E6 <= first <= 0x1F1FF or first in (0x1F3F4, 0x1F3F3)


def split_tones(caption: str) -> tuple[str, list[str]]:
    """A caption without its skin tones, and the tones: ("woman pilot", ["dark"])."""
    return _TONE.sub("", caption), _TONE.findall(caption)


def parse_names(captions: dict[str, str]) -> dict[str, Name]:
    """Take every caption apart: {characters: caption} -> {characters: Name}.

    Whether a leading word is a modifier depends on the other captions: "pilot" is the base of "woman pilot", and
    "blue" is a colour before a word that at least three colours stand before.
    """
    tails = Counter(m[2] for c in captions.values() if (m := _COLOUR.fullmatch(c)))
    genders: Counter[str] = Counter()
    for caption in captions.values():
        plain = _TONE.sub("", caption)
        if (m := _GENDER.fullmatch(plain.removesuffix(" facing right"))) and not m[1]:
            genders[m[3] or "person"] += 1
    coloured = frozenset(t for t, n in tails.items() if n >= 3)
    gendered = frozenset(genders)
    return {key: _parse(caption, key, gendered, coloured) for key, caption in captions.items()}


def _parse(caption: str, characters: str, gendered: frozenset[str], coloured: frozenset[str]) -> Name:
    rest, tones = split_tones(caption)
    modifiers = {"tone" if i == 0 else f"tone-{i + 1}": tone for i, tone in enumerate(tones)}

    def name(base: str, group: str) -> Name:
        return Name(caption, base, group, tuple(sorted(modifiers.items())), characters)

    if _is_flag(characters):
        return name(rest, "flag")
    if len(characters) == 1 and characters in _SWATCHES:
        return name(caption, "swatch")
    if rest.startswith("keycap "):
        return name(rest, "keycap")
    if (m := _CLOCK.fullmatch(rest)) and m[1] in _HOURS:
        modifiers |= {"hour": m[1], "minute": m[2] or m[3]}
        return name("clock", "clock")
    words = rest.split()
    for prefix in ("family", "couple with heart", "kiss"):
        members = rest.removeprefix(prefix).split()
        if rest.startswith(prefix) and members and set(members) <= _PERSONS | _CHILDREN:
            modifiers["adults"] = " ".join(w for w in members if w in _PERSONS)
            modifiers["children"] = " ".join(w for w in members if w in _CHILDREN) or "none"
            return name(prefix, "people")
    if rest.endswith(" facing right"):
        rest = rest.removesuffix(" facing right")
        modifiers["direction"] = "right"
    if m := _GENDER.fullmatch(rest):
        modifiers["gender"] = m[2]
        return name((m[1] + (m[3] or "")).strip() or "person", "people")
    if rest in gendered:
        modifiers["gender"] = "unsaid"
        return name(rest, "people")
    if tones:
        return name(rest, "people")
    if (m := _COLOUR.fullmatch(rest)) and m[2] in coloured:
        modifiers["colour"] = m[1]
        return name(m[2], "colour")
    if (m := _COLOUR.fullmatch(rest)) and (s := _SIZE.fullmatch(m[2])):
        modifiers |= {"colour": m[1], "size": s[1]}
        return name(s[2], "colour")
    return name(rest, "face" if "face" in words else "object")


def stable_order(names: Iterable[Name], purpose: str) -> list[Name]:
    """Sorted by the sha256 of purpose and combination: no row order, no generator state comes in."""
    return sorted(names, key=lambda n: hashlib.sha256(f"{purpose}|{n.caption}".encode()).digest())


@dataclass(frozen=True)
class Assignment:
    """Where a name goes, and what it tests there: combination, tone, words, unseen or (in train and spare) none."""

    split: str
    tests: str = ""


def assign_splits(
    names: Sequence[Name],
    *,
    lookalikes: frozenset[str] = frozenset(),
    combinations: int = 60,
    words: int = 60,
    unseen: int = 100,
) -> dict[str, Assignment]:
    """{caption: Assignment}; validation and test get the same amounts of each kind.

    lookalikes are captions whose drawing another one resembles: they stay in train, unless they are `spare`. In order:

    - `unseen`: whole bases, without skin tones and not flags (a flag unseen in training can't be guessed).
    - `combination`: a base with its modifiers, tones aside (woman + pilot; eight + thirty). All its skin-tone variants
      leave train with it; one of them is scored, the others are `spare`.
    - `words`: a name of several words, each of which a training caption with another base uses.
    - `tone`: a skin-tone variant of a combination that train has in other tones, at most one per base and split, until
      toned rows are half of the split.
    """
    # The first of a base or combination stands for it in the hash order: it must not depend on the rows' order.
    names = sorted(names, key=lambda n: [f"{ord(c):04X}" for c in n.characters])
    placed: dict[str, Assignment] = {}
    by_base: dict[str, list[Name]] = defaultdict(list)
    pairings: dict[tuple, list[Name]] = defaultdict(list)
    for n in names:
        by_base[n.base].append(n)
        pairings[n.pairing].append(n)
    _hold_out_bases(by_base, placed, lookalikes, unseen)
    _hold_out_combinations(by_base, pairings, placed, lookalikes, combinations)
    _hold_out_words(names, placed, lookalikes, words)
    _hold_out_tones(names, pairings, placed, lookalikes)
    for n in names:
        placed.setdefault(n.caption, Assignment("train"))
    return placed


def _hold_out_bases(by_base: dict, placed: dict, lookalikes: frozenset[str], amount: int) -> None:
    heads = {rows[0].caption: rows for rows in by_base.values()}
    eligible = [
        rows[0]
        for rows in heads.values()
        if rows[0].group in ("object", "face", "people")
        and len(rows) <= 3
        and not any(n.toned or n.caption in lookalikes for n in rows)
    ]
    wanted = {"validation-unseen": amount, "test-unseen": amount}
    for head in stable_order(eligible, "unseen"):
        rows = heads[head.caption]
        split = next((s for s, left in wanted.items() if left >= len(rows)), None)
        if split is None:
            continue
        wanted[split] -= len(rows)
        placed.update({n.caption: Assignment(split, "unseen") for n in rows})


def _hold_out_combinations(
    by_base: dict, pairings: dict, placed: dict, lookalikes: frozenset[str], amount: int
) -> None:
    in_train = [p for p, rows in pairings.items() if rows[0].caption not in placed]
    values = Counter(m for _, modifiers in in_train for m in modifiers)
    left = Counter(base for base, _ in in_train)
    size = Counter(left)
    splits = ["validation", "test"]
    taken = Counter[str]()
    for head in stable_order((pairings[p][0] for p in in_train), "combination"):
        base, modifiers = head.pairing
        rows = pairings[head.pairing]
        plain = [n for n in rows if not n.toned]
        split = splits[taken.total() % 2]
        if (
            not modifiers
            or not plain
            or taken[split] >= amount
            or 3 * (size[base] - left[base] + 1) > size[base]  # a base keeps at least two thirds of its combinations
            or any(values[m] < 2 for m in modifiers)
            or any(n.caption in lookalikes for n in rows)
        ):
            continue
        taken[split] += 1
        left[base] -= 1
        values.subtract(modifiers)
        scored = {n.caption for n in plain + stable_order((n for n in rows if n.toned), "tone")[:1]}
        for n in rows:
            placed[n.caption] = Assignment(split, "combination") if n.caption in scored else Assignment("spare")


def words_of(caption: str) -> list[str]:
    """Lower-case words without punctuation at their ends."""
    return [w for w in (word.strip("!?.,()'").lower() for word in caption.split()) if w]


def _hold_out_words(names: Sequence[Name], placed: dict, lookalikes: frozenset[str], amount: int) -> None:
    users: dict[str, set[str]] = defaultdict(set)
    for n in names:
        if n.caption not in placed:
            for word in words_of(n.caption):
                users[word].add(n.base)
    eligible = [n for n in names if n.group in ("object", "face") and not n.modifiers and len(words_of(n.caption)) > 1]
    splits = ["validation", "test"]
    taken = Counter[str]()
    for n in stable_order(eligible, "words"):
        split = splits[taken.total() % 2]
        words = set(words_of(n.caption))
        if n.caption in placed or n.caption in lookalikes or taken[split] >= amount:
            continue
        if any(not users[w] - {n.base} for w in words):
            continue
        taken[split] += 1
        placed[n.caption] = Assignment(split, "words")
        for word in words:
            users[word].discard(n.base)


def _hold_out_tones(names: Sequence[Name], pairings: dict, placed: dict, lookalikes: frozenset[str]) -> None:
    kinds = {n.caption: n.toned for n in names}
    used: set[tuple[str, str]] = set()
    for split in ("validation", "test"):
        there = [c for c, a in placed.items() if a.split == split]
        room = sum(not kinds[c] for c in there) - sum(kinds[c] for c in there)
        for n in stable_order((n for n in names if n.toned), f"tone-{split}"):
            if room <= 0:
                break
            variants = [v for v in pairings[n.pairing] if v.toned and v.caption not in placed]
            if n.caption in placed or n.caption in lookalikes or (split, n.base) in used or len(variants) < 4:
                continue
            used.add((split, n.base))
            placed[n.caption] = Assignment(split, "tone")
            room -= 1
