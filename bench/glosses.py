"""Glosses of WordNet 3.0 as a retrieval task: which noun does a definition mean?

The noun database comes from Debian's wordnet-base: `make data` unpacks it into build/data. Query: the definition of a synset,
without its examples; document: the names of the synset. Both are real English of 3 to 60 words, in any number wanted.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch
from minilm_model import MissingData, Texts
from torch import Tensor

FOLDERS = (Path(__file__).parents[1] / "build/data/usr/share/wordnet", Path("/usr/share/wordnet"))
MIN_WORDS = 5  # of a definition


class Ranking(NamedTuple):
    """Of each query: where its own document stands among all, int64 from 1, and its embedding's cosine to the float model's."""

    rank: Tensor
    cosine: Tensor

    def recall_at_1(self) -> float:
        """Percent of the queries whose own document is first."""
        return 100 * (self.rank == 1).double().mean().item()

    def mean_reciprocal_rank(self) -> float:
        return (1 / self.rank.double()).mean().item()

    def mean_cosine(self) -> float:
        return self.cosine.double().mean().item()

    def against(self, reference: Ranking) -> tuple[float, float]:
        """(difference of R@1 in points, its standard error over the queries, paired)."""
        changed = 100 * ((self.rank == 1).double() - (reference.rank == 1).double())
        return changed.mean().item(), (changed.std() / len(changed) ** 0.5).item()


def load_glosses(count: int, seed: int = 0) -> Texts:
    """`count` synsets at random, no two with the same names. Another seed gives others, some of which may be the same."""
    folder = next((folder for folder in FOLDERS if (folder / "data.noun").is_file()), None)
    if folder is None:
        raise MissingData("data.noun of Debian's wordnet-base is not in build/data; run: make data")
    found: dict[str, str] = {}  # names -> definition
    for line in (folder / "data.noun").read_text("ascii").splitlines():
        if line.startswith(" "):
            continue  # the licence
        fields, _, gloss = line.partition("|")
        words = fields.split()
        names = [name.replace("_", " ") for name in words[4 : 4 + 2 * int(words[3], 16) : 2]]
        definition = re.split(r';\s*"', gloss.strip())[0].strip(" ;")
        if len(definition.split()) >= MIN_WORDS:
            found.setdefault(", ".join(names), definition)
    if len(found) < count:
        raise MissingData(f"data.noun holds {len(found)} synsets with definitions, {count} were asked for")
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    names, definitions = list(found), list(found.values())
    return Texts([definitions[i] for i in order], [names[i] for i in order])


def ranking(queries: Tensor, documents: Tensor, reference: Tensor | None = None) -> Ranking:
    """Unit vectors of queries and documents, f32 [count, D], pairs in the same row. reference: the float model's queries."""
    scores = queries @ documents.T
    own = scores.diagonal().unsqueeze(1)
    rank = (scores > own).sum(1) + 1
    return Ranking(rank, (queries.double() * (queries if reference is None else reference).double()).sum(1))
