"""The paper's findings put to a study's own runs: what they show, do not show, or cannot tell, in words and figures."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

from mimscale.study.analysis.laws import full_dataset, mean_interval
from mimscale.study.analysis.summary import Analysis, Grid
from mimscale.study.report.page import typeset
from mimscale.study.report.plots import images_name
from mimscale.study.results.cells import Cell, family, length, title
from mimscale.study.results.result import score_name

Verdict = Literal["yes", "part", "no", "open"]
SAID: dict[Verdict, str] = {
    "yes": "These runs show it.",
    "part": "These runs show it in part.",
    "no": "These runs do not show it.",
    "open": "These runs cannot tell.",
}
# More data counts as no help where doubling it gains less than this share of what doubling the training does.
LITTLE = 0.5
FEW = 3  # cells that overfit, below which a trend may be chance


@dataclass(frozen=True)
class Finding:
    """A claim of the paper, the verdict of these runs, and the figures that it stands on."""

    claim: str
    verdict: Verdict
    figures: Sequence[str]

    def html(self) -> str:
        """The finding as a part of the page."""
        text = "".join(f"<li>{escape(typeset(sentence))}</li>" for sentence in self.figures)
        return (
            f'<article class="finding {self.verdict}"><h3>{escape(self.claim)}</h3>'
            f'<p class="verdict">{SAID[self.verdict]}</p><ul>{text}</ul></article>'
        )


def findings(study: Analysis) -> list[Finding]:
    """All of them, in the order of the paper."""
    found = [
        overfitting_finding(study.simmim, "Large models overfit small data as training lengthens (Section 4.1)"),
        more_data(study.simmim),
        laws(study.simmim),
        sample_efficiency(study.simmim),
        proxy(study),
        overfitting_finding(study.mae, "MAE overfits in the same way (Section 4.1)"),
        decoders(study),
        sampling(study),
    ]
    return found


def seeds(grid: Grid) -> str:
    """How many seeds stand behind the verdicts, and how far they spread."""
    several = [cell for cell in grid.verdicts if cell.spread is not None]
    if not several:
        return "Every cell has one seed, so a spread is unknown and any rise of loss counts, however small."
    pooled = math.sqrt(statistics.fmean(cell.spread**2 for cell in several if cell.spread is not None))
    return (
        f"{len(several)} of {len(grid.verdicts)} cells have several seeds; their validation losses spread by {pooled:.4f} "
        "(standard deviation), and only rises beyond twice the standard error of a difference count."
    )


def _share(grid: Grid, cells: Iterable[Cell]) -> tuple[int, int]:
    cells = list(cells)
    return sum(map(grid.overfits, cells)), len(cells)


def _rate(grid: Grid, cells: Iterable[Cell]) -> float:
    bad, all_of_them = _share(grid, cells)
    return bad / all_of_them if all_of_them else 0.0


def _by(grid: Grid, cells: Sequence[Cell], what: Callable[[Cell], Any], name: Callable[[Any], str]) -> str:
    groups = sorted({what(cell) for cell in cells})
    parts = []
    for group in groups:
        bad, count = _share(grid, (c for c in cells if what(c) == group))
        parts.append(f"{name(group)}: {bad} of {count}")
    return ", ".join(parts)


def _rises(grid: Grid, cells: Sequence[Cell], what: Callable[[Cell], Any], peers: Callable[[Cell], Any]) -> bool | None:
    """Whether more cells overfit at the largest value than at the smallest, among peers that have both."""
    values = sorted({what(cell) for cell in cells})
    if len(values) < 2:
        return None
    low = {peers(c): c for c in cells if what(c) == values[0]}
    high = {peers(c): c for c in cells if what(c) == values[-1]}
    both = low.keys() & high.keys()
    if not both:
        return None
    return _rate(grid, (high[key] for key in both)) > _rate(grid, (low[key] for key in both))


def _largest_family(cells: Sequence[Cell]) -> list[Cell]:
    names = [family(cell.first.dataset) for cell in cells]
    most = max(dict.fromkeys(names), key=names.count)
    return [cell for cell in cells if family(cell.first.dataset) == most]


def overfitting_finding(grid: Grid, claim: str) -> Finding:
    """The paper's first finding."""
    cells = list(grid.verdicts)
    if not cells:
        return Finding(claim, "open", ["No cell of this grid has a validation loss."])
    own = _largest_family(cells)
    longer = _rises(grid, own, lambda c: c.first.iterations, lambda c: (c.first.model, c.first.dataset))
    larger = _rises(grid, own, lambda c: c.first.parameters or 0, lambda c: (c.first.dataset, c.first.iterations))
    fewer = _rises(grid, own, lambda c: -(c.first.images or 0), lambda c: (c.first.model, c.first.iterations))
    signs = [sign for sign in (longer, larger, fewer) if sign is not None]
    verdict: Verdict = (
        "open" if not signs else "yes" if all(signs) and len(signs) == 3 else "part" if any(signs) else "no"
    )
    bad, count = _share(grid, cells)
    if verdict == "yes" and bad < FEW:
        verdict = "part"
    names = {c.first.parameters or 0: title(c.first.model) for c in cells}
    data = {(c.first.images or 0, c.first.dataset): title(c.first.dataset) for c in cells}
    text = [
        f"{bad} of {count} cells overfit.",
        f"By length: {_by(grid, cells, lambda c: c.first.iterations, length)}.",
        f"By data: {_by(grid, cells, lambda c: (c.first.images or 0, c.first.dataset), data.__getitem__)}.",
        f"By model: {_by(grid, cells, lambda c: c.first.parameters or 0, names.__getitem__)}.",
    ]
    worst = max((cell for cell in cells if grid.overfits(cell)), key=lambda c: grid.verdicts[c].rise, default=None)  # type: ignore
    if worst is not None:
        evidence = grid.verdicts[worst]
        assert evidence is not None
        text.append(
            f"The largest rise: {worst} ends at {worst.val_loss:.4f}, where {evidence.reason} "
            f"(+{evidence.rise / (evidence.better.val_loss or 1):.1%})."
        )
    text.append(_needs(grid))
    text.append(seeds(grid))
    said = {"longer training": longer, "a larger model": larger, "less data": fewer}
    missing = [what for what, sign in said.items() if sign is None]
    against = [what for what, sign in said.items() if sign is False]
    if missing:
        text.append(f"Not comparable here: {', '.join(missing)}.")
    if 0 < bad < FEW:
        text.append(f"Fewer than {FEW} cells overfit, so that chance may have had a part in it.")
    if against and verdict == "part":
        text.append(f"Overfitting does not grow with {' or '.join(against)} from its smallest value to its largest.")
    return Finding(claim, verdict, [sentence for sentence in text if sentence])


def _needs(grid: Grid) -> str:
    by_model: dict[str, list[str]] = {}
    for need in grid.needs:
        name = title(need.smallest.first.dataset) if need.smallest else "more than any"
        by_model.setdefault(title(need.model), []).append(f"{name} at {length(need.iterations)}")
    parts = []
    for model, said in by_model.items():
        kept = [
            text
            for text, before in zip(said, ["", *said], strict=False)
            if text.split(" at ")[0] != before.split(" at ")[0]
        ]
        parts.append(f"{model}: {', '.join(kept)}{' and longer' if len(kept) < len(said) else ''}")
    return f"Smallest sufficient dataset: {'; '.join(parts)}." if parts else ""


def _gains(
    cells: Sequence[Cell], what: Callable[[Cell], float | None], peers: Callable[[Cell], Any]
) -> list[tuple[Cell, Cell, float]]:
    """Relative fall of validation loss for each doubling of ``what``, between neighbours among peers."""
    groups: dict[Any, list[Cell]] = {}
    for cell in cells:
        if what(cell):
            groups.setdefault(peers(cell), []).append(cell)
    gains = []
    for group in groups.values():
        for a, b in itertools.pairwise(sorted(group, key=lambda c: what(c) or 0)):
            doublings = math.log2((what(b) or 1) / (what(a) or 1))
            if doublings > 0.2 and a.val_loss and b.val_loss:
                gains.append((a, b, (1 - b.val_loss / a.val_loss) / doublings))
    return gains


def more_data(grid: Grid) -> Finding:
    """The paper's second finding."""
    claim = "Data beyond the size that prevents overfitting does not help (Section 4.1)"
    cells = [c for c in grid.healthy if c.first.images]
    data = _gains(
        cells, lambda c: c.first.images, lambda c: (family(c.first.dataset), c.first.model, c.first.iterations)
    )
    time = _gains(cells, lambda c: c.first.iterations, lambda c: (c.first.model, c.first.dataset))
    if not data or not time:
        lacks = "two dataset sizes" if not data else "two lengths"
        return Finding(claim, "open", [f"No model has {lacks} that do not overfit, so there is nothing to compare."])
    by_data, by_time = (statistics.median(gain for _, _, gain in gains) for gains in (data, time))
    largest = max(b.first.images or 0 for _, b, _ in data)
    last = [gain for _, b, gain in data if b.first.images == largest]
    mean, low, high = mean_interval(last)
    verdict: Verdict = "open"
    if by_time > 0 and high < LITTLE * by_time:
        verdict = "yes"
    elif by_time > 0 and low > LITTLE * by_time:
        verdict = "no"
    text = [
        f"Among cells that do not overfit, doubling the data lowers validation loss by {by_data:.2%} "
        f"(median of {len(data)} pairs of neighbouring sizes, "
        f"from {min(g for *_, g in data):.2%} to {max(g for *_, g in data):.2%}); "
        f"doubling the training lowers it by {by_time:.2%} (median of {len(time)}).",
        f"To the largest size, {title(_dataset(data, largest))}, it is {mean:.2%} a doubling (mean of {len(last)}, 95 % interval "
        f"{low:.2%} to {high:.2%}). More data counts as no help where all of that is below {LITTLE:.0%} of what doubling the "
        "training gains.",
    ]
    others = _other_families(cells)
    if others:
        text.append(others)
    return Finding(claim, verdict, text)


def _dataset(gains: Sequence[tuple[Cell, Cell, float]], images: int) -> str:
    return next(b.first.dataset for _, b, _ in gains if b.first.images == images)


def _other_families(cells: Sequence[Cell]) -> str:
    """How the largest dataset of another kind compares with the largest of the main family."""
    own = _largest_family(cells)
    best = {(c.first.model, c.first.iterations): c for c in sorted(own, key=lambda c: c.first.images or 0)}
    changes = []
    for cell in cells:
        peer = best.get((cell.first.model, cell.first.iterations))
        if peer and family(cell.first.dataset) != family(peer.first.dataset) and peer.val_loss and cell.val_loss:
            changes.append((cell.first.dataset, cell.val_loss / peer.val_loss - 1))
    if not changes:
        return ""
    return (
        f"On {' and '.join(title(name) for name in dict.fromkeys(c[0] for c in changes))}, of other images, the loss is "
        f"{statistics.median(c[1] for c in changes):+.2%} from that on the largest part of "
        f"{title(family(own[0].first.dataset))} (median of {len(changes)})."
    )


def laws(grid: Grid) -> Finding:
    """Power laws with model size and compute (Figure 1)."""
    claim = "Validation loss falls as a power law of model size and compute where data suffices (Figure 1)"
    fitted = [law for law in grid.laws if law.x != "images"]
    if not fitted:
        return Finding(
            claim,
            "open",
            ["A law needs three model sizes of one length, or three computes, that do not overfit."],
        )
    text = [
        f"With {law.name}: slope {law.slope:.4f} (95 % interval {law.low:.4f} to {law.high:.4f}), "
        f"R² {law.r2:.3f}, {len(law.cells)} cells."
        for law in fitted
    ]
    falling = [law.high < 0 for law in fitted]
    had = {law.x for law in fitted}
    lacking = [name for x, name in (("parameters", "model size"), ("relative compute", "compute")) if x not in had]
    text += [f"With {name}: fewer than three values that do not overfit, so no law." for name in lacking]
    verdict: Verdict = "yes" if all(falling) and not lacking else "part" if any(falling) else "no"
    return Finding(claim, verdict, text)


def sample_efficiency(grid: Grid) -> Finding:
    """Section 4.2."""
    claim = "Larger models need fewer images for the same validation loss (Section 4.2)"
    rows = grid.efficiency
    if len(rows) < 2:
        return Finding(claim, "open", ["Fewer than two models were trained on one dataset with known batches."])
    reached = [row for row in rows[1:] if row.saving is not None]
    where = title(full_dataset(grid.cells) or "")
    parts = [
        f"{title(row.model)} {'at least ' if row.bound else ''}{row.saving:.1f} times fewer"
        if row.saving
        else f"{title(row.model)} never reached it"
        for row in rows[1:]
    ]
    text = [
        f"On {where}, {title(rows[0].model)} comes down to {rows[0].target:.4f} after "
        f"{images_name(rows[0].samples or 0)} images; {', '.join(parts)}."
    ]
    if any(row.bound for row in rows[1:]):
        text.append("“At least”: the model was there by its shortest length already.")
    better = [row for row in reached if row.saving is not None and row.saving > 1]
    verdict: Verdict = "yes" if len(better) == len(rows) - 1 else "part" if better else "no"
    return Finding(claim, verdict, text)


def proxy(study: Analysis) -> Finding:
    """Section 4.3 and Table 3."""
    claim = "Validation loss tells the fine-tuning score (Section 4.3)"
    text, signs = [], []
    for score in study.scores:
        overfit, healthy = study.simmim.correlations(score, "val_loss")
        said = [
            f"r = {c.r:+.2f} [{c.low:+.2f}, {c.high:+.2f}] over {len(c.cells)} cells that {what}"
            for c, what in ((overfit, "overfit"), (healthy, "do not"))
            if c
        ]
        if said:
            signs += [c.high < 0 for c in (overfit, healthy) if c]
            sentence = f"{score_name(score)}: {'; '.join(said)}."
            if overfit and healthy:
                sentence += (
                    f" A rise of loss by 0.01 changes it by {0.01 * healthy.slope:+.2f} points where cells do not overfit, "
                    f"and by {0.01 * overfit.slope:+.2f} where they do."
                )
            text.append(sentence)
    if not signs:
        return Finding(claim, "open", ["No task has three cells with a score and a validation loss."])
    verdict: Verdict = "yes" if all(signs) else "part" if any(signs) else "no"
    return Finding(claim, verdict, text)


def decoders(study: Analysis) -> Finding:
    """Section 4.4 and Table 4."""
    claim = "A heavier decoder overfits more, and fine-tunes no worse (Section 4.4)"
    pairs = []
    for cell in study.cells:
        if cell.first.decoder == "linear" or cell.val_loss is None:
            continue
        a = cell.first
        for base in study.simmim.cells:
            b = base.first
            if (a.objective, a.model, a.dataset, a.iterations) == (
                b.objective,
                b.model,
                b.dataset,
                b.iterations,
            ) and base.val_loss:
                pairs.append((base, cell))
    if not pairs:
        return Finding(claim, "open", ["No heavier decoder was run beside a linear one."])
    text, signs = [], []
    for base, cell in pairs:
        assert base.val_loss is not None and cell.val_loss is not None
        parts = [f"validation loss {cell.val_loss - base.val_loss:+.4f}"]
        signs.append(cell.val_loss > base.val_loss)
        if base.train_loss is not None and cell.train_loss is not None:
            parts.insert(0, f"training loss {cell.train_loss - base.train_loss:+.4f}")
            signs.append(cell.train_loss < base.train_loss)
        score = study.main_score
        if score in base.scores and score in cell.scores:
            change = cell.scores[score].mean - base.scores[score].mean
            parts.append(f"{score_name(score)} {change:+.2f}")
            signs.append(change > -0.1)
        text.append(f"{cell.first.decoder} against linear on {base}: {', '.join(parts)}.")
    verdict: Verdict = "yes" if all(signs) else "part" if any(signs) else "no"
    return Finding(claim, verdict, text)


def sampling(study: Analysis) -> Finding:
    """Section 4.5 and Table 5."""
    claim = "Which images are left out matters little: a few classes, or a few of every class (Section 4.5)"
    text, signs = [], []
    for cell, peer in study.sampling_pairs():
        if peer is None or cell.val_loss is None or peer.val_loss is None:
            continue
        change = cell.val_loss / peer.val_loss - 1
        signs.append(abs(change) < 0.02)
        scores = [
            f"{score_name(s)} {cell.scores[s].mean - peer.scores[s].mean:+.2f}"
            for s in study.scores
            if s in cell.scores and s in peer.scores
        ]
        text.append(
            f"{cell} against {title(peer.first.dataset)}: {', '.join([f'validation loss {change:+.2%}', *scores])}."
        )
    if not signs:
        return Finding(claim, "open", ["No subset of classes was run beside a fraction of about as many images."])
    text.append("Little: below 2 % of validation loss (the paper's own difference is 0.8 %).")
    return Finding(claim, "yes" if all(signs) else "part" if any(signs) else "no", text)
