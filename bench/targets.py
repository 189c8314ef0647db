"""Every figure this project promises, as one table: what, how it is measured, the bound, and which CPU it needs.

    python bench/targets.py [--only SUBSTRING ...]

Measures them interleaved, one thread where the row does not say otherwise, and prints reached against promised; exits with 1 when
one falls short. A row that needs what this CPU lacks is skipped with the reason. Run it on a quiet machine: about two hours, mostly
training.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import click

from tersor.bench.timing import Noise, cap_peers, cpu_flags, interleaved, keep_freed_memory, machine_name

CAP = cap_peers()

import compare  # noqa: E402
import compare_few_bits  # noqa: E402
import minilm  # noqa: E402
import target_accuracy as accuracy  # noqa: E402
import target_advice as advice  # noqa: E402
import target_few_bits as few  # noqa: E402
import target_fused as fused  # noqa: E402
import target_graph as graph  # noqa: E402
import target_import as importing  # noqa: E402
import target_int8 as int8  # noqa: E402
import target_models as models  # noqa: E402
import target_pruning as pruning  # noqa: E402
import target_sparse as sparse  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.markup import escape  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402

VNNI, POPCOUNT, AVX2, VBMI = "avx512_vnni", "avx512_vpopcntdq", "avx2", "avx512_vbmi2"


@dataclass(frozen=True)
class Target:
    """One promise. `measure` returns the figure; it holds when figure >= bound, or <= bound for `at_most`.

    bound  a function where it follows from what was measured, called after `measure`
    note   what to say beside the figure, called last
    """

    what: str
    measure: Callable[[], float]
    bound: float | Callable[[], float]
    at_most: bool = False
    needs: str = ""  # a CPU flag
    note: Callable[[], str] | None = None


TARGETS = [
    Target("int8 layer: worst relative error, K <= 4096", int8.layer_errors, 0.010, at_most=True),
    Target("MiniLM: mean cosine to fp32", lambda: models.minilm_accuracy()["ours"].mean_cosine, 0.9965),
    Target("MiniLM: worst cosine to fp32", lambda: models.minilm_accuracy()["ours"].worst_cosine, 0.98),
    Target("MiniLM: mean cosine against the simulated format, difference", models.simulation_gap, 0.0005, at_most=True),
    Target("MiniLM 8 x 128 tokens: times fp32", lambda: models.minilm_speed(8, 128)["ours"], 2.0, needs=VNNI),
    Target("MiniLM 8 x 128 tokens: times quantize_dynamic", lambda: models.minilm_speed(8, 128)["against_peer"], 1.0, needs=VNNI),
    Target("MiniLM 1 x 16 tokens: times fp32", lambda: models.minilm_speed(1, 16)["ours"], 2.0, needs=VNNI),
    Target(
        "layer, M <= 64: times quantize_dynamic, worst of 28", lambda: int8.worst_against_quantize_dynamic(True), 1.0, needs=VNNI
    ),
    Target(
        "layer, M > 64: times quantize_dynamic, worst of 14", lambda: int8.worst_against_quantize_dynamic(False), 0.9, needs=VNNI
    ),
    Target(
        "layer: times the best int8 peer, worst of 42", int8.worst_against_all, 0.97, needs=VNNI, note=partial(int8.peers_note, 1)
    ),
    Target("layer: times the best int8 peer, geometric mean of 42", int8.geometric_mean_ratio, 1.05, needs=VNNI),
    Target(
        "kernel at M >= 256, K and N >= 768: share of the int8 limit, mean", lambda: int8.kernel_of_limit(False), 0.88, needs=VNNI
    ),
    Target(
        "kernel at M >= 256, K and N >= 768: share of the int8 limit, worst", lambda: int8.kernel_of_limit(True), 0.80, needs=VNNI
    ),
    Target("2 threads: times the best int8 peer, geometric mean of 42", lambda: int8.geometric_mean_ratio(2), 1.05, needs=VNNI),
    Target(
        "2 threads: times the best int8 peer, worst of 42",
        lambda: int8.worst_against_all(2),
        0.97,
        needs=VNNI,
        note=partial(int8.peers_note, 2),
    ),
    Target("2 threads: times our 1 thread, worst of 42", lambda: min(int8.two_threads().values()), 1.0, note=int8.two_threads_note),
    Target("2 threads, M >= 64, K*N >= 768*3072: times our 1 thread, worst", int8.worst_near_twice, 1.8),
    Target(
        "M = 1, weights beyond L2, kernel: share of a read loop over them, worst",
        lambda: min(kernel for kernel, _ in int8.read_shares().values()),
        0.90,
        needs=VNNI,
        note=int8.read_note,
    ),
    Target("Int8Static: times Int8Dynamic, worst of 42", int8.worst_static, 1.0),
    Target("AVX2: times fp32 at M <= 64, worst of 28", lambda: min(int8.avx2_times_fp32(64)), 1.0, needs=AVX2),
    Target("AVX2: times fp32, geometric mean of 42", lambda: compare.geometric_mean(int8.avx2_times_fp32()), 1.15, needs=AVX2),
    Target("AVX2: kernel at M >= 256, share of the AVX2 int8 limit, worst", int8.avx2_kernel_of_limit, 0.85, needs=AVX2),
    Target(
        "bfloat16 in and out: times the float32 time, worst", lambda: max(p[0] for p in int8.bfloat16_points()), 1.10, at_most=True
    ),
    Target(
        "bfloat16 in and out: times torch's bfloat16 layer, worst",
        lambda: min(p[1] for p in int8.bfloat16_points()),
        3.0,
        needs=VNNI,
    ),
    Target("only_if_faster: chosen / other, worst of 50 random shapes", int8.wrong_choices, 1.05, at_most=True),
    Target("odd sizes: time over that of sizes rounded up, worst", int8.odd_sizes, 1.3, at_most=True),
    Target("import tersor: ms beyond torch's own import", lambda: importing.import_ms("import tersor", "tersor"), 60, at_most=True),
    Target("16x16 at M = 1, no_grad: us a call", lambda: int8.small_call_us(torch.no_grad), 6.0, at_most=True, needs=VNNI),
    Target(
        "16x16 at M = 1, inference_mode: us a call", lambda: int8.small_call_us(torch.inference_mode), 6.0, at_most=True, needs=VNNI
    ),
    Target("Int8WeightOnly 4096x4096, M = 1: times fp32", lambda: int8.weight_only(1), 2.5, needs=VNNI),
    Target("Int8WeightOnly 4096x4096, M = 64: times fp32", lambda: int8.weight_only(64), 0.8, needs=VNNI),
]


def few_bits_targets() -> list[Target]:
    """Rows of each format of 4, 2 and 1 bits."""
    found = []
    for name in (few.INT8, "int4"):
        found.append(
            Target(
                f"{name} at M = 1, 4096x4096, hot: share of a read loop over its weight",
                partial(few.read_share, name),
                0.85,
                needs=VNNI,
                note=partial(few.read_note, name),
            )
        )
    for name, of_limit in few.OF_LIMIT.items():
        needs = POPCOUNT if name == "binary-xnor" else VNNI
        limit = "popcount" if name == "binary-xnor" else "int8"
        found += [
            Target(
                f"{name} at M = 1, 4096x4096, hot: times int8",
                partial(few.times_int8, name),
                partial(few.times_int8_bound, name),
                needs=needs,
                note=partial(few.times_int8_note, name),
            ),
            Target(
                f"{name} at M = 256, 1024^2 to 4096^2: share of the {limit} limit, worst",
                lambda name=name: min(few.many_rows()[name]),
                of_limit,
                needs=needs,
                note=partial(few.many_rows_note, name),
            ),
            Target(
                f"AVX2: {name} at M = 1, K*N >= 768*3072: times fp32, worst", partial(few.avx2_times_fp32, name), 1.0, needs=AVX2
            ),
        ]
    for width, duels in compare_few_bits.DUELS.items():
        for duel in duels:
            found.append(
                Target(
                    f"{duel.format}: times the best {width} peer, geometric mean of 42",
                    partial(few.times_peer, width, duel.format),
                    1.1,
                    needs=POPCOUNT if width == "binary" else VNNI,
                    note=partial(few.times_peer_note, width, duel.format),
                )
            )
    return found


TARGETS += few_bits_targets()
TARGETS += [
    Target(
        "layer norm to int8 rows, 1024x768: times torch's norm and the faster quantiser",
        partial(fused.times_unfused_norm, "layer"),
        2.2,
        needs=VNNI,
        note=fused.norm_note,
    ),
    Target("rms norm to int8 rows, 1024x768: the same", partial(fused.times_unfused_norm, "rms"), 2.2, needs=VNNI),
    Target(
        "q, k, v as one, M = 16, K = 768: times three calls",
        partial(fused.times_three_calls, 16),
        partial(fused.three_calls_bound, 16),
        needs=VNNI,
        note=partial(fused.three_calls_note, 16),
    ),
    *(
        Target(
            f"gated feed-forward 576x1536, M = {m}: times the layers one by one",
            partial(fused.times_layers, m),
            1.0,
            needs=VNNI,
            note=partial(fused.gated_note, m),
        )
        for m in (1, 64)
    ),
    Target("residual in the epilogue, 1536x384, M = 16: times an add after it", partial(fused.times_add, 16), 1.0, needs=VNNI),
    Target("fused MiniLM 8 x 128 tokens: times fp32", lambda: graph.minilm(8, 128)["fp32"], 2.6, needs=VNNI),
    Target("fused MiniLM 8 x 128 tokens: times fp32 by inductor", lambda: graph.minilm(8, 128)["fp32 inductor"], 2.4, needs=VNNI),
    Target("fused MiniLM 1 x 16 tokens: times fp32", lambda: graph.minilm(1, 16)["fp32"], 2.8, needs=VNNI),
    Target("fused MiniLM: mean cosine to fp32", lambda: graph.minilm_cosine()[0], 0.9965),
    Target(
        "fused SmolLM2 prefill 128: share of floor + layers",
        lambda: graph.smollm(False)["of limit"],
        0.8,
        needs=VNNI,
        note=partial(graph.smollm_note, False),
    ),
    Target(
        "fused SmolLM2 decode: share of floor + layers",
        lambda: graph.smollm(True)["of limit"],
        0.8,
        needs=VNNI,
        note=partial(graph.smollm_note, True),
    ),
    Target("fused SmolLM2 prefill 128: times swapped", lambda: graph.smollm(False)["times swapped"], 1.15, needs=VNNI),
    Target("fused SmolLM2 decode: times swapped", lambda: graph.smollm(True)["times swapped"], 1.15, needs=VNNI),
    Target(
        "fused SmolLM2: perplexity against swapped, relative difference",
        lambda: abs(graph.perplexity_change()[0]),
        0.002,
        at_most=True,
        note=graph.perplexity_note,
    ),
    *(
        Target(
            f"MiniLM {how}: peak memory of a forward pass over fp32's",
            partial(graph.peak_of_fp32, name),
            1.0,
            at_most=True,
            note=partial(graph.peak_note, name),
        )
        for how, name in (("through torch.compile", graph.models.FUSED), ("by tersor.fuse", graph.models.EXPORTED))
    ),
]


def sparse_targets() -> list[Target]:
    """Rows of pruned layers, 4096 x 4096 where no other size is named."""
    where = "SparseInt8 unstructured, 80, 90, 95 % zeros, M = 1, hot"
    block = "SparseInt8 of 16 x 4 blocks"
    found = [
        Target(f"{where}: times dense int8, worst", partial(sparse.one_row, "int8"), 2.0, needs=VBMI, note=sparse.one_row_note),
        Target(f"{where}: times fp32, worst", partial(sparse.one_row, "fp32"), 14.0, needs=VBMI),
        Target("SparseInt8 unstructured, 90 % zeros: bytes stored over dense int8", sparse.stored_share, 0.24, at_most=True),
        *(
            Target(
                f"{block}, {s:.0%} zeros, M = 1: time over density x dense int8",
                partial(sparse.block_time_over_density, s),
                1.15,
                at_most=True,
                needs=VNNI,
                note=partial(sparse.block_note, s),
            )
            for s in (0.8, 0.9)
        ),
        Target(f"{block}, 80 % zeros, M = 64: times dense int8", partial(sparse.block_rows, 0.8), 3.3, needs=VNNI),
        Target(f"{block}, 90 % zeros, M = 64: times dense int8", partial(sparse.block_rows, 0.9), 5.0, needs=VNNI),
        Target("SparseFloat, 90 % zeros: times the best of torch CSR and scipy, worst of 4", sparse.float_times_best_other, 1.5),
        Target("SparseFloat, 95 % zeros, M = 64: times dense int8, worst of 2", sparse.float_times_int8, 1.0, needs=VNNI),
        Target(
            "only_if_faster on SparseInt8: chosen / fastest, worst of the break-even table",
            sparse.wrong_choices,
            sparse.WRONG,
            at_most=True,
            note=sparse.choices_note,
        ),
    ]
    for k, m, zeros, bound in (
        (1024, 64, 0.9, 4.0),
        (4096, 64, 0.9, 3.2),
        (1024, 256, 0.9, 3.0),
        (4096, 256, 0.9, 3.0),
        (1024, 64, 0.95, 7.0),
        (4096, 64, 0.95, 7.0),
    ):
        found.append(
            Target(
                f"SparseFloat {k} x 4096, {zeros:.0%} zeros, M = {m}: times fp32",
                partial(sparse.float_times_fp32, k, m, zeros),
                bound,
                needs=VNNI,
                note=partial(sparse.float_note, k, m, zeros),
            )
        )
    return found


TARGETS += sparse_targets()
TARGETS += [
    Target(
        f"Fashion-MNIST, {name}: points below dense, mean of 3 seeds",
        partial(pruning.points_below_dense, name),
        bound,
        at_most=True,
        note=partial(pruning.seeds_note, name),
    )
    for name, bound in pruning.DROPS.items()
]
TARGETS += [
    Target(
        "MiniLM, 50 % at once: Wanda's mean cosine above magnitude's",
        lambda: pruning.mean_cosine("wanda") - pruning.mean_cosine("magnitude"),
        0.05,
        note=pruning.minilm_note,
    ),
    Target("MiniLM, 50 % at once: SparseGPT's mean cosine", lambda: pruning.mean_cosine("sparsegpt"), 0.90),
]
TARGETS += [
    *(
        Target(
            f"advise on {model}: predicted against measured time of an int8 layer, median error",
            partial(advice.median_error, model),
            0.25,
            at_most=True,
            needs=VNNI,
            note=partial(advice.error_note, model),
        )
        for model in ("MiniLM", "SmolLM2")
    ),
    *(
        Target(
            f"advise among formats of {bits} bits and more: time of its choice over the fastest's, worst of 4 models",
            partial(advice.worst_choice, bits),
            1.1,
            at_most=True,
            needs=VNNI,
            note=partial(advice.choice_note, bits),
        )
        for bits in (8, 4, 1)
    ),
    Target("report against tersor bench: layers of MiniLM, worst difference", advice.report_gap, 0.10, at_most=True),
    # Of float and int8 alone SmolLM2 as it is has no such mix (docs/choosing.md).
    *(
        Target(
            f"search on {name}, 0.5 % drop: speed over 0.9 of all-int8's, or least drop of mixes so fast over the one allowed",
            lambda find=find: advice.found_or_shown(find()),
            1.0,
            needs=VNNI,
            note=lambda find=find: advice.search_note(find()),
        )
        for name, find in (
            ("MiniLM", advice.minilm_search),
            ("SmolLM2", partial(advice.smollm_search, False)),
            ("SmolLM2 after smooth_", partial(advice.smollm_search, True)),
        )
    ),
]


def accuracy_targets() -> list[Target]:
    """Calibration, rounding, distillation. SmolLM2's weights are de-quantised Q4_1."""
    names, encoder, students = accuracy.smollm, accuracy.minilm, accuracy.students
    book = "SmolLM2 (from Q4_1), perplexity on another book: "
    found = [
        Target(f"{book}Int8Dynamic over float", partial(accuracy.added, names.DYNAMIC), 0.05, at_most=True),
        Target(f"{book}Int8Dynamic against the simulated format", accuracy.simulation_gap, 0.01, at_most=True),
        Target(f"{book}Int8Dynamic, smooth", partial(accuracy.added, names.SMOOTH), 0.02, at_most=True),
        Target(f"{book}share of the loss that smoothing leaves", accuracy.smooth_of_plain, 0.6, at_most=True),
        Target(f"{book}Int8Static, smooth", partial(accuracy.added, names.STATIC_SMOOTH), 0.10, at_most=True),
        Target(f"{book}the same, down and o dynamic", partial(accuracy.added, names.MIXED_SMOOTH), 0.04, at_most=True),
    ]
    for size in encoder.INT4:
        what = f"MiniLM Int4({size}), GPTQ: share of 1 - cosine that it removes"
        found.append(Target(what, partial(accuracy.removed, size), 0.5))
    for name, points in ((encoder.DYNAMIC, 1.0), (encoder.STATIC, 1.5), *((name, 2.0) for name in encoder.GPTQ.values())):
        note = partial(accuracy.points_note, name)
        what = f"MiniLM {name}: points of R@1 lost"
        found.append(Target(what, partial(accuracy.points_lost, name), points, at_most=True, note=note))
    for name, cosine in ((encoder.DYNAMIC, 0.995), (encoder.STATIC, 0.98)):
        found.append(Target(f"MiniLM {name}: mean cosine", lambda name=name: accuracy.rankings()[name].mean_cosine(), cosine))
    change = partial(accuracy.reciprocal_rank_change, encoder.DYNAMIC)
    found.append(Target("MiniLM Int8Dynamic: change of the mean reciprocal rank", change, 0.01, at_most=True))
    for what, name, over, points in (
        ("soft answers over 1000 labels alone", students.SOFT, students.ALONE, 5.0),
        ("soft answers over hard ones", students.SOFT, students.HARD, 0.3),
        ("ternary student, soft answers over hard ones", students.TERNARY_SOFT, students.TERNARY, 0.1),
    ):
        found.append(Target(f"Fashion-MNIST, mean of 3 seeds: points by {what}", partial(accuracy.gain, name, over), points))
    small = accuracy.encoders
    for what, name, over, field, gain in (
        ("R@1 in points", small.DISTILLED, small.ALONE, "recall_at_1", 0.7),
        ("mean reciprocal rank", small.DISTILLED, small.ALONE, "mean_reciprocal_rank", 0.015),
        ("R@1 in points, ternary", small.TERNARY_DISTILLED, small.TERNARY, "recall_at_1", 0.1),
    ):
        what = f"encoder of 1 M parameters, mean of 3 seeds: what MiniLM as its teacher adds to {what}"
        found.append(Target(what, partial(accuracy.taught, name, over, field), gain))
    for name in (*encoder.DEPTHS, encoder.HALF):
        found.append(Target(f"MiniLM {name}: share of R@1 that is left", partial(accuracy.kept_of_recall, name), 0.5))
    for width in students.WIDTHS:
        what = f"Fashion-MNIST shrunk to {width:g} of its width, untrained: share of the gain over chance"
        found.append(Target(what, partial(accuracy.kept_when_shrunk, width), 0.5))
    return found


TARGETS += accuracy_targets()


def measured(target: Target) -> tuple[tuple[str, str, str, str], bool]:
    """The cells of its row, and whether it holds."""
    figure = target.measure()
    bound = target.bound() if callable(target.bound) else target.bound
    held = figure <= bound if target.at_most else figure >= bound
    what = f"{target.what}\n[dim]{escape(target.note())}[/]" if target.note else target.what
    promised = f"{'<=' if target.at_most else '>='} {bound:.4g}"
    return (what, f"{figure:.4g}", promised, "holds" if held else "[bold red]FALLS SHORT[/]"), held


def noise_warning() -> str | None:
    """Whether the machine is ours alone right now, by a second of work."""
    noise = Noise()
    interleaved({"adding": lambda: sum(range(20_000))}, rounds=20, seconds=0.05, noise=noise)
    return noise.warning()


@click.command()
@click.option("--only", multiple=True, help="Rows whose description contains this text; may be given several times.")
@click.option("--list", "list_only", is_flag=True, help="Print the promises without measuring.")
def main(only: tuple[str, ...], list_only: bool) -> None:
    """Measure what the project promises on this machine and compare."""
    targets = [t for t in TARGETS if not only or any(text in t.what for text in only)]
    if unknown := [text for text in only if not any(text in t.what for t in TARGETS)]:
        raise click.BadParameter(f"no row contains {unknown[0]!r}; --list prints them", param_hint="--only")
    if list_only:
        for target in targets:
            click.echo(target.what)
        return
    keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    console = Console(width=140)
    console.print(f"{machine_name()}, torch {torch.__version__}, {CAP}, kernels: {minilm.tersor_variant()}")
    table = Table("promise", "reached", "promised", "", "s")
    failed = 0
    warnings = {noise_warning()}
    flags = cpu_flags()
    progress = Console(stderr=True, width=140)
    for target in track(targets, "measuring", console=progress):
        if target.needs and target.needs not in flags:
            table.add_row(target.what, "-", "", f"skipped: this CPU has no {target.needs}", "")
            continue
        start = time.perf_counter()
        try:
            cells, held = measured(target)
        except Exception as error:  # one row must not end a table of hours
            cells, held = (target.what, "-", "", f"[bold red]FAILED[/]: {type(error).__name__}: {escape(str(error))}"), False
        failed += not held
        progress.print(f"{escape(target.what)}: {cells[1]}, promised {cells[2]}, {cells[3]}")  # a run that is cut off leaves these
        table.add_row(*cells, f"{time.perf_counter() - start:.0f}")
    console.print(table)
    for warning in {*warnings, noise_warning()} - {None}:
        console.print(f"warning: {warning}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
