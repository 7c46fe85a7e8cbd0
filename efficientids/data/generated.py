"""The embedded data set: an invented film catalogue, and people who follow a known process (`process.py`).

It needs no download and, as the process is known, the best possible hit rate can be computed and compared with.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl

from efficientids.data.dataset import Dataset
from efficientids.data.layout import Contents
from efficientids.data.process import PROCESS, NextItemProcess
from efficientids.data.writing import write_dataset

# Chosen so that a small Transformer learns it in two minutes on two cores, and yet the last item alone is not enough:
# best HR@10 0.78, counting which item follows which 0.59, a plain prototype (D = 64, 2 layers, 1,000 steps of 64) 0.71.
NUM_ITEMS = 250
NUM_USERS = 6_000
SHORTEST, LONGEST = 12, 40  # interactions of a user
NUM_SUCCESSORS = 4
FOLLOW = 0.5  # probability of going on to a successor
POPULARITY_EXPONENT = 1.3

# The last word of a title tells its first genre.
_NOUNS = {
    "Action": ("Pursuit", "Strike", "Convoy", "Showdown", "Getaway", "Ambush"),
    "Comedy": ("Wedding", "Neighbour", "Holiday", "Landlord", "Mix-Up", "Reunion"),
    "Crime": ("Heist", "Alibi", "Witness", "Syndicate", "Verdict", "Ransom"),
    "Drama": ("Letter", "Orchard", "Promise", "Inheritance", "Silence", "Harbour"),
    "Fantasy": ("Dragon", "Sorcerer", "Kingdom", "Amulet", "Prophecy", "Forest"),
    "Horror": ("Cellar", "Whisper", "Asylum", "Curse", "Shadow", "Doll"),
    "Romance": ("Kiss", "Valentine", "Serenade", "Summer", "Dance", "Bouquet"),
    "Science Fiction": ("Orbit", "Android", "Signal", "Nebula", "Colony", "Paradox"),
}
_ADJECTIVES = (
    *("Amber", "Broken", "Crimson", "Distant", "Electric", "Forgotten", "Golden", "Hidden", "Iron", "Jade"),
    *("Last", "Midnight", "Northern", "Paper", "Quiet", "Restless", "Silver", "Stolen", "Velvet", "Wandering"),
)


@dataclasses.dataclass(frozen=True)
class GeneratedData:
    """A generated data set in memory, and what made it. `favourite_genre_U` int [U] is hidden: it is never written."""

    contents: Contents
    process: NextItemProcess
    favourite_genre_U: np.ndarray

    def write(self, path: str | Path, *, beside: Mapping[str, str] | None = None, overwrite: bool = False) -> Dataset:
        """Writes the data set folder, with the process beside the histories (`Oracle.open` reads it)."""
        arrays = {
            field.name: np.asarray(getattr(self.process, field.name)) for field in dataclasses.fields(NextItemProcess)
        }
        return write_dataset(path, self.contents, extra={PROCESS: arrays}, beside=beside, overwrite=overwrite)


def generate(
    seed: int = 0,
    *,
    num_users: int = NUM_USERS,
    num_items: int = NUM_ITEMS,
    shortest: int = SHORTEST,
    longest: int = LONGEST,
) -> GeneratedData:
    """The data set of `seed`: the same for the same arguments and NumPy version.

    Raises ValueError when there are more items than titles, or too few for a history without repeats.
    """
    titles = len(_ADJECTIVES) * sum(len(nouns) for nouns in _NOUNS.values())
    if not longest + NUM_SUCCESSORS < num_items <= titles:
        raise ValueError(f"num_items: {num_items} is outside {longest + NUM_SUCCESSORS + 1}..{titles}")
    if not 1 <= shortest <= longest:
        raise ValueError(f"shortest, longest: {shortest}, {longest} are no range of history lengths")
    rng = np.random.default_rng(seed)
    items, genres_GM = _catalogue(rng, num_items)
    process = _process(rng, genres_GM)
    lengths_U = rng.integers(shortest, longest, num_users, endpoint=True)
    favourite_U = rng.choice(len(_NOUNS), num_users, p=process.genre_prior_G)
    histories_UH = sample_histories(rng, process, lengths_U, favourite_U)
    contents = Contents(
        name=f"generated-{seed}",
        source="generated",
        items=items,
        users=_users(num_users),
        item_ids=histories_UH[histories_UH > 0].astype(np.int32),
        timestamps=_timestamps(rng, lengths_U),
        offsets=np.concatenate([[0], np.cumsum(lengths_U)]).astype(np.int64),
        order={"rule": "as generated", "tie_break": "none needed: times rise"},
        filters={},
    )
    return GeneratedData(contents, process, favourite_U)


def sample_histories(
    rng: np.random.Generator, process: NextItemProcess, lengths_U: np.ndarray, favourite_U: np.ndarray
) -> np.ndarray:
    """Draws histories of `lengths_U` items for people of these favourite genres; int [U, max length], right-padded."""
    watching = process.start(len(lengths_U))
    genre_UG = np.eye(len(process.genre_prior_G))[favourite_U]
    columns = []
    for position in range(int(lengths_U.max())):
        cumulative_UM = np.cumsum(process.next_item(watching, genre_UG), axis=1)
        # Scaled by the last value, which rounding may leave a little off one; side "right": never an item of weight 0.
        draw_U1 = rng.random((len(lengths_U), 1)) * cumulative_UM[:, -1:]
        item_U = np.where(position < lengths_U, (cumulative_UM <= draw_U1).sum(1), 0)
        watching.watch(item_U)
        columns.append(item_U)
    return np.stack(columns, axis=1)


def _catalogue(rng: np.random.Generator, num_items: int) -> tuple[pl.DataFrame, np.ndarray]:
    names = list(_NOUNS)
    combinations = list(
        itertools.product(_ADJECTIVES, [(g, noun) for g in range(len(names)) for noun in _NOUNS[names[g]]])
    )
    genres_GM = np.zeros((len(names), num_items + 1), bool)
    titles, genres = [], []
    for item, choice in enumerate(rng.permutation(len(combinations))[:num_items], start=1):
        adjective, (genre, noun) = combinations[choice]
        titles.append(f"The {adjective} {noun} ({rng.integers(1950, 2024)})")
        # Half of the films have a second genre; drawing the first one again leaves a single genre.
        members = sorted({genre, int(rng.integers(len(names))) if rng.random() < 0.5 else genre})
        genres_GM[members, item] = True
        genres.append([names[member] for member in members])
    items = pl.DataFrame(
        {
            "item": np.arange(1, num_items + 1, dtype=np.int32),
            "item_id": [f"film-{item:04d}" for item in range(1, num_items + 1)],
            "title": titles,
            "genres": genres,
        }
    )
    return items, genres_GM


def _process(rng: np.random.Generator, genres_GM: np.ndarray) -> NextItemProcess:
    num_items = genres_GM.shape[1] - 1
    popularity_M = np.zeros(num_items + 1)
    popularity_M[1:] = rng.permutation(1.0 / np.arange(1, num_items + 1) ** POPULARITY_EXPONENT)
    successors_MS = np.zeros((num_items + 1, NUM_SUCCESSORS), np.int32)
    for item in range(1, num_items + 1):
        # Mostly films of a shared genre, so that genres (and titles) say something about what comes next.
        shares_M = (genres_GM & genres_GM[:, item, None]).any(0)
        weights_M = np.sqrt(popularity_M) * np.where(shares_M, 6.0, 1.0)
        weights_M[item] = 0.0
        successors_MS[item] = rng.choice(num_items + 1, NUM_SUCCESSORS, replace=False, p=weights_M / weights_M.sum())
    zipf_S = 1.0 / np.arange(1, NUM_SUCCESSORS + 1)
    prior_G = rng.dirichlet(np.full(len(genres_GM), 8.0))
    return NextItemProcess(successors_MS, zipf_S / zipf_S.sum(), popularity_M, genres_GM, prior_G, FOLLOW)


def _users(num_users: int) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "user": np.arange(num_users, dtype=np.int32),
            "user_id": [f"user-{user:04d}" for user in range(1, num_users + 1)],
        }
    )


def _timestamps(rng: np.random.Generator, lengths_U: np.ndarray) -> np.ndarray:
    """Everyone begins within the year 2000 and watches something every hour to every third day; int64 [n]."""
    first_U = 946_684_800 + rng.integers(0, 366 * 86_400, len(lengths_U))
    histories = [
        first + np.cumsum(rng.integers(3_600, 3 * 86_400, n)) for first, n in zip(first_U, lengths_U, strict=True)
    ]
    return np.concatenate(histories).astype(np.int64)
