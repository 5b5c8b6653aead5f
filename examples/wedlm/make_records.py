"""Write what the WeDLM example trains on: conversations, a tokenizer and the config of a small model. Offline, seeded.

    python examples/wedlm/make_records.py FOLDER [--records 6000] [--seed 0]

The task: the user tells a person's name, town, trade and pet in any order, the assistant writes them as a JSON record. Every
fifth combination is held out of training.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart"))
from make_data import main

NAMES = [
    "Ada",
    "Bruno",
    "Carla",
    "Dmitri",
    "Elena",
    "Farid",
    "Greta",
    "Hassan",
    "Ines",
    "Jonas",
    "Keiko",
    "Lorenzo",
    "Mei",
    "Nadia",
]
TOWNS = [
    "Accra",
    "Bergen",
    "Cusco",
    "Dakar",
    "Erfurt",
    "Florence",
    "Ghent",
    "Hanoi",
    "Izmir",
    "Kyoto",
    "Lima",
    "Mombasa",
    "Nantes",
]
PETS = ["canary", "cat", "dog", "goldfish", "horse", "parrot", "rabbit", "spider", "turtle"]
TRADES = ["baker", "farmer", "judge", "nurse", "painter", "pilot", "singer", "smith", "tailor", "teacher"]


def record(rng: random.Random, held_out: bool) -> list[dict[str, str]]:
    """One conversation, in or out of the held-out people."""
    while True:
        numbers = [rng.randrange(size) for size in (len(NAMES), len(TOWNS), len(TRADES), len(PETS))]
        if (sum(numbers) % 5 == 0) == held_out:
            break
    name, town, trade, pet = (words[i] for words, i in zip((NAMES, TOWNS, TRADES, PETS), numbers, strict=True))
    parts = [name, f"from {town}", f"a {trade}", f"has a {pet}"]
    rng.shuffle(parts)
    answer = json.dumps({"name": name, "town": town, "trade": trade, "pet": pet})
    return [{"role": "user", "content": ", ".join(parts)}, {"role": "assistant", "content": answer}]


if __name__ == "__main__":
    main(__doc__, record, 6_000)
