"""PG-SB without network error: VSD of a 2-D Gaussian mixture, in which every score is exact, with fixed and with random kappa.

Each of the four classes is one Gaussian; the student draws class c as b_c + A_c z, again a Gaussian, so that the scores of teacher and
student, conditional and unconditional, are known in closed form at every noise level. What is left of training is what kappa does. The
LoRA teacher is the student as it was: it follows at a rate per step (1: it is the student itself).

Every setting runs at every learning rate with the same seeds. Reported: the largest learning rate at which all seeds end near the target
(the margin of stability), and at a common learning rate the Wasserstein-2 distance at the end, its spread over the seeds, and the share
that diverged.

    python tools/vsd_mixture.py --out docs/lab/vsd_mixture.json
"""

import json
import math
import time
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from snoopi_rt.export.one_step import SCHEDULES
from snoopi_rt.export.training.pgsb import guidance_scales, guided, vsd_gradient, vsd_loss
from snoopi_rt.export.training.schedule import Schedule

MEANS = torch.tensor([[1.2, 0.0], [0.0, 1.2], [-1.2, 0.0], [0.3, -0.9]], dtype=torch.float64)
COVARIANCES = torch.tensor(
    [[[0.30, 0.0], [0.0, 0.05]], [[0.05, 0.0], [0.0, 0.30]], [[0.2, 0.12], [0.12, 0.15]], [[0.1, -0.05], [-0.05, 0.2]]], dtype=torch.float64
)
SCHEDULE = Schedule(torch.from_numpy(SCHEDULES["sd"]), "x0")
LOW, HIGH = 0.5, 4.0  # SNOOPI's range for SD
RATES = [0.02 * 2 ** (i / 2) for i in range(16)]
NEAR = 0.5
"""Of the distance at the start: a run that ends farther away has not learned."""
SETTINGS = {
    "random on both": {"random_on": "both"},
    "random on the frozen teacher": {"random_on": "frozen"},
    "random on the LoRA teacher": {"random_on": "lora"},
    "fixed 1.5": {"fixed": 1.5},
    "fixed mean (2.25)": {"fixed": (LOW + HIGH) / 2},
    "fixed 3": {"fixed": 3.0},
    "fixed 4.5": {"fixed": 4.5},
}


def x0_of_gaussian(x_t: Tensor, mean: Tensor, covariance: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """E[x0 | x_t] (..., 2) and the log density of x_t (...,) up to a constant, where x0 is Gaussian with mean (..., 2)."""
    # Written out for 2 x 2: linear algebra of the library takes one call per matrix.
    (p, q), (_, r) = (row.unbind(-1) for row in covariance.unbind(-2))
    alpha2, sigma2 = alpha[..., 0] ** 2, sigma[..., 0] ** 2
    xx, xy, yy = alpha2 * p + sigma2, alpha2 * q, alpha2 * r + sigma2
    determinant = xx * yy - xy * xy
    u, v = (x_t - alpha * mean).unbind(-1)
    solved_u, solved_v = (yy * u - xy * v) / determinant, (xx * v - xy * u) / determinant
    x0 = mean + alpha * torch.stack([p * solved_u + q * solved_v, q * solved_u + r * solved_v], -1)
    return x0, -0.5 * (u * solved_u + v * solved_v + determinant.log())


def opinions(x_t: Tensor, means: Tensor, covariances: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """E[x0 | x_t, c] and E[x0 | x_t] for x_t (S, K, B, 2) of class k; means (S, K, 2), covariances (S, K, 2, 2), alpha (S, K, B, 1)."""
    # (S, K, B, classes, 2): what each class would make of each sample.
    shape = (alpha.unsqueeze(3), sigma.unsqueeze(3))
    x0, log = x0_of_gaussian(x_t.unsqueeze(3), means[:, None, None], covariances[:, None, None], *shape)
    classes = x_t.shape[1]
    own = x0[:, torch.arange(classes), :, torch.arange(classes)].movedim(0, 1)
    return own, (log.softmax(-1).unsqueeze(-1) * x0).sum(3)


def distance(b: Tensor, a: Tensor) -> Tensor:
    """Wasserstein-2 (S,) between the student's and the target's Gaussians, the root mean square over classes."""
    covariance = a @ a.mT
    root = _root(COVARIANCES.expand_as(covariance))
    cross = _root(root @ covariance @ root)
    squared = (b - MEANS).square().sum(-1) + (covariance + COVARIANCES - 2 * cross).diagonal(dim1=-2, dim2=-1).sum(-1)
    return squared.clamp(min=0).mean(-1).sqrt()


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag_embed(values.clamp(min=0).sqrt()) @ vectors.mT


def run(
    rate: float, follow: float, weight: str, seeds: int, steps: int, batch: int, random_on: str = "both", fixed: float | None = None
) -> Tensor:
    """The distances (seeds,) at the end of each seed's run, infinite if it diverged."""
    classes = len(MEANS)
    low, high = (LOW, HIGH) if fixed is None else (fixed, fixed)
    random = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
    b = torch.stack([0.3 * torch.randn(classes, 2, generator=generator, dtype=torch.float64) for generator in random]).requires_grad_()
    a = (0.5 * torch.eye(2, dtype=torch.float64)).expand(seeds, classes, 2, 2).clone().requires_grad_()
    old_b, old_a = b.detach().clone(), a.detach().clone()
    start = distance(b.detach(), a.detach())
    for _ in range(steps):
        z, eps = (
            torch.stack([torch.randn(classes, batch, 2, generator=generator, dtype=torch.float64) for generator in random])
            for _ in range(2)
        )
        t = torch.stack([torch.randint(20, 981, (classes, batch), generator=generator) for generator in random])
        uniform = torch.stack([torch.rand(classes, batch, generator=generator, dtype=torch.float64) for generator in random])
        alpha, sigma = (value.view(*t.shape, 1) for value in SCHEDULE.alpha_sigma(t.flatten()))
        x0 = b.unsqueeze(2) + (a.unsqueeze(2) @ z.unsqueeze(-1)).squeeze(-1)
        with torch.no_grad():
            x_t = alpha * x0 + sigma * eps
            frozen, lora = (value.view(*t.shape, 1) for value in guidance_scales(uniform.flatten(), low, high, random_on))
            teacher = guided(*opinions(x_t, MEANS.expand(seeds, -1, -1), COVARIANCES.expand(seeds, -1, -1, -1), alpha, sigma), frozen)
            follower = guided(*opinions(x_t, old_b, old_a @ old_a.mT, alpha, sigma), lora)
            flat = [value.reshape(-1, value.shape[-1], 1, 1) for value in (x0, teacher, follower, alpha, sigma)]
            gradient = vsd_gradient(*flat, weight).view_as(x0)
        # Each seed is a run of its own: their losses add up.
        (vsd_loss(x0, gradient) * seeds).backward()
        with torch.no_grad():
            for parameter in (b, a):
                parameter -= rate * classes * parameter.grad.nan_to_num()
                parameter.clamp_(-1e3, 1e3)
                parameter.grad = None
            old_b.lerp_(b, follow)
            old_a.lerp_(a, follow)
    end = distance(b.detach(), a.detach())
    return torch.where(end < NEAR * start, end, math.inf)


def quantiles(distances: Tensor) -> list[float | None]:
    """The 10, 50 and 90 % quantiles, None if so many runs diverged."""
    values = distances.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), interpolation="higher").tolist()
    return [value if math.isfinite(value) else None for value in values]


@click.command()
@click.option("--seeds", default=32)
@click.option("--steps", default=300)
@click.option("--batch", default=16)
@click.option("--follow", "follows", multiple=True, type=float, default=(1.0, 0.05), help="How fast the LoRA teacher follows, per step.")
@click.option("--weight", "weights", multiple=True, default=("swiftbrush", "dmd"))
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(seeds: int, steps: int, batch: int, follows: tuple[float, ...], weights: tuple[str, ...], out: Path) -> None:
    """Print the tables and write them as JSON, with a plot beside it."""
    began, rows = time.perf_counter(), []
    cells = [(weight, follow, name, rate) for weight in weights for follow in follows for name in SETTINGS for rate in RATES]
    distances: dict[tuple, Tensor] = {}
    for weight, follow, name, rate in tqdm(cells, unit="run of all seeds"):
        distances[weight, follow, name, rate] = run(rate, follow, weight, seeds, steps, batch, **SETTINGS[name])
    for weight in weights:
        for follow in follows:
            margins = {
                name: max((rate for rate in RATES if distances[weight, follow, name, rate].isfinite().all()), default=0.0)
                for name in SETTINGS
            }
            common = min(margins.values()) or RATES[0]
            for name in SETTINGS:
                at = distances[weight, follow, name, common]
                best = min(float(distances[weight, follow, name, rate].median()) for rate in RATES)
                finite = at[at.isfinite()]
                rows.append(
                    {
                        "weight": weight,
                        "follow": follow,
                        "kappa": name,
                        "largest_stable_rate": margins[name],
                        "common_rate": common,
                        "median": float(finite.median()) if len(finite) else None,
                        "spread": float(finite.std()) if len(finite) > 1 else None,
                        "diverged": float((~at.isfinite()).double().mean()),
                        "best_median": best,
                        "by_rate": {f"{rate:.4g}": quantiles(distances[weight, follow, name, rate]) for rate in RATES},
                    }
                )
    document = {"seeds": seeds, "steps": steps, "batch": batch, "kappa": [LOW, HIGH], "seconds": time.perf_counter() - began, "rows": rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    plot(rows, out.with_suffix(".png"))
    click.echo(table(rows))


def table(rows: list[dict]) -> str:
    """The rows as lines for people."""
    lines = [f"{'weight':11}{'follow':>7}  {'kappa':30}{'stable up to':>13}{'rate':>8}{'median':>9}{'spread':>9}{'diverged':>9}{'best':>9}"]
    for row in rows:
        lines.append(
            f"{row['weight']:11}{row['follow']:7g}  {row['kappa']:30}{row['largest_stable_rate']:13.3g}{row['common_rate']:8.3g}"
            f"{row['median'] or math.nan:9.3f}{row['spread'] or math.nan:9.3f}{row['diverged']:9.0%}{row['best_median']:9.3f}"
        )
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """The median distance over the learning rate, one picture for each weight and each LoRA teacher."""
    from matplotlib.figure import Figure

    kinds = sorted({(row["weight"], row["follow"]) for row in rows}, reverse=True)
    figure = Figure(figsize=(12, 4 * -(-len(kinds) // 2)), layout="constrained")
    for axes, (weight, follow) in zip(figure.subplots(-(-len(kinds) // 2), 2, squeeze=False).flat, kinds, strict=False):
        for row in rows:
            if (row["weight"], row["follow"]) == (weight, follow):
                rates = [float(rate) for rate in row["by_rate"]]
                low, middle, high = (np.array(quantile, dtype=float) for quantile in zip(*row["by_rate"].values(), strict=True))
                (line,) = axes.plot(rates, middle, label=row["kappa"], linestyle="-" if row["kappa"].startswith("random") else "--")
                axes.fill_between(rates, low, high, color=line.get_color(), alpha=0.1)
        axes.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="distance at the end (lines end where runs diverge)")
        axes.set_title(f"weight {weight}, the LoRA teacher follows at {follow:g} per step")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
