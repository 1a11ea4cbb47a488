"""`eval check`: every measure on its true network classes with random weights, against plain formulas, in a minute or two."""

import io
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from snoopi_rt.errors import OutputError
from snoopi_rt.export.evaluation import dinov2, image_text, inception, towers
from snoopi_rt.export.evaluation.context import ARCHITECTURES, NETWORKS, Context, measuring_device
from snoopi_rt.export.evaluation.cost import peak_memory
from snoopi_rt.export.evaluation.features import FeatureCache
from snoopi_rt.export.evaluation.image_sets import ImageSet, PromptRow, images_with_prompts, open_image, reference_images
from snoopi_rt.export.evaluation.measures import MEASURES
from snoopi_rt.export.evaluation.report import ReportRow
from snoopi_rt.export.evaluation.weight_files import WEIGHTS, Located, identified
from snoopi_rt.export.small_model.features import weights_file
from snoopi_rt.export.weights.files import save_tensors

COUNT, SIDE = 10, 96
TOLERANCE = 1e-4
STYLES = ("anime", "photo")


def reduced(architecture: towers.Architecture) -> towers.Architecture:
    """The same classes with two narrow layers in each tower."""
    head = towers.build_config(architecture)["vision_cfg"].get("head_width", 64)
    vision = (("vision_cfg", "layers", 2), ("vision_cfg", "width", 2 * head))
    text = (("text_cfg", "layers", 2), ("text_cfg", "width", 128), ("text_cfg", "heads", 2))
    return replace(architecture, changes=(*vision, *text))


def random_network(name: str, whole: bool = False) -> nn.Module:
    """The network of those weights with random ones; two layers of it unless it is to be whole. Inception is always whole."""
    torch.manual_seed(sorted(WEIGHTS).index(name))
    if name == "inception":
        return _random_inception()
    if name == "dinov2":
        from transformers import Dinov2Config, Dinov2Model

        layers = dinov2.CONFIG["num_hidden_layers"] if whole else 2
        return Dinov2Model(Dinov2Config(**{**dinov2.CONFIG, "num_hidden_layers": layers})).eval()
    return towers.build(ARCHITECTURES[name] if whole else reduced(ARCHITECTURES[name]))


def random_weights(name: str, folder: Path, whole: bool = False) -> Located:
    """The random network's weights as a file of the form that its published ones have."""
    if name == "lite2":
        return identified(WEIGHTS[name], weights_file("lite2"))  # its own: they are at hand
    state, path = random_network(name, whole).state_dict(), folder / WEIGHTS[name].file
    if WEIGHTS[name].source == WEIGHTS["clip-b32"].source or path.exists():
        path = folder / f"{name}{path.suffix}"
    if path.suffix == ".safetensors":
        save_tensors(path, state)
    else:
        torch.save({"state_dict": state} if name.startswith("hps") else state, path)
    return identified(WEIGHTS[name], path)


def _random_inception() -> nn.Module:
    class Unloaded(inception.network_class()):  # type: ignore[misc]
        def load_state_dict(self, state: Any, *arguments: Any, **named: Any) -> None:
            """Keeps what the layers began with."""

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    network = Unloaded("inception-v3-compat", [str(inception.DIMENSIONS)], empty)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)  # else features vanish on their way through fifty layers
    return network


def random_context(folder: Path, names: tuple[str, ...] = tuple(WEIGHTS)) -> Context:
    """A context whose networks are reduced and random."""
    located = {name: random_weights(name, folder) for name in names}
    architectures = {name: reduced(architecture) for name, architecture in ARCHITECTURES.items()}
    return Context(located, FeatureCache(folder / "features"), architectures=architectures)


def random_images(folder: Path, count: int, seed: int, side: int = SIDE) -> None:
    """Writes smooth random images, 00000.png and so on."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i:05d}.png")


def check(say: Callable[[str], None]) -> dict[str, float]:
    """The largest relative difference of each measure to its plain formula, by name. Raises OutputError if one is too large."""
    worst = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        random_images(folder / "made", COUNT, 1)
        random_images(folder / "real", COUNT + 4, 2)
        rows = [PromptRow(f"a picture of {i} things", "blurry", style=STYLES[i % 2]) for i in range(COUNT)]
        images = images_with_prompts("made", folder / "made", rows)
        for name, measure in MEASURES.items():
            start = time.perf_counter()
            context = random_context(folder, measure.weights)
            context.reference = reference_images(folder / "real")
            figures = list(measure.run(images, context))
            differences = [_difference(row.value, value) for row, value in plain(name, images, figures, context)]
            worst[name] = float(np.max(differences))  # unlike max(), NaN if one is
            say(f"{name}: {len(differences)} figures, relative difference {worst[name]:.1e}, {time.perf_counter() - start:.1f} s")
    wrong = [name for name, difference in worst.items() if not difference <= TOLERANCE]
    if wrong:
        raise OutputError(f"{', '.join(wrong)} differ from the plain formula by more than {TOLERANCE:g}")
    return worst


def _difference(figure: float | None, value: float) -> float:
    """Relative to the value, infinite if the figure could not be measured."""
    return float("inf") if figure is None else abs(figure - value) / max(abs(value), 1e-3)


def whole(name: str, say: Callable[[str], None], count: int = 2) -> dict[str, float]:
    """What the network of those weights costs at its true size, with random weights: seconds per image and per text, memory."""
    device = measuring_device()
    with tempfile.TemporaryDirectory() as scratch:
        random_images(Path(scratch) / "images", count, 0, 512)
        pictures = [open_image(file) for file in sorted((Path(scratch) / "images").iterdir())]
        texts = None
        if name in ARCHITECTURES:
            network = towers.Towers(ARCHITECTURES[name], None, device)
            images, texts = network.images, network.texts
        else:
            path = random_weights(name, Path(scratch), whole=True).path
            images = NETWORKS[name](path, device)
        images(pictures[:1])
        cost = {"seconds per image": _seconds(lambda: images(pictures)) / count}
        if texts is not None:
            cost["seconds per text"] = _seconds(lambda: texts(["a photo of a cat on a red sofa"] * count)) / count
    cost["peak memory, MB"] = peak_memory() / 1e6
    say(f"{name} on {device}: " + ", ".join(f"{what} {value:.3g}" for what, value in cost.items()))
    return cost


def _seconds(compute: Callable[[], Any]) -> float:
    start = time.perf_counter()
    compute()
    return time.perf_counter() - start


def plain(name: str, images: ImageSet, figures: list[ReportRow], context: Context) -> list[tuple[ReportRow, float]]:
    """Each figure of a measure with the same computed straight from its definition: no cache, no batches, no shared code."""
    pictures = [images.open(i) for i in range(len(images.files))]
    if name.startswith("hps"):
        cosines = 100 * _cosines(context, name, pictures, images.prompts)
        groups = [*(np.array([row.style == style for row in images.rows]) for style in STYLES), np.ones(len(pictures), bool)]
        return [(row, float(cosines[group].mean())) for row, group in zip(figures, groups, strict=True)]
    if name in ("clip-g14", "clip-b32"):
        wanted, unwanted = (
            float(_cosines(context, name, pictures, [image_text.PREFIX + text for text in texts]).mean())
            for texts in (images.prompts, [str(row.negative_prompt) for row in images.rows])
        )
        return list(zip(figures, (wanted, wanted, unwanted), strict=True))
    assert context.reference is not None
    real = [context.reference.open(i) for i in range(len(context.reference.files))]
    (weights,) = MEASURES[name].weights
    network = context.network(weights)
    extract = network.images if weights in ARCHITECTURES else network
    a, b = (np.concatenate([extract([picture]) for picture in some]).astype(np.float64) for some in (pictures, real))
    if name in ("fid", "lite2"):
        values = [plain_frechet(a, b), plain_kernel(a, b), *(plain_manifold(a, b) if name == "lite2" else [])]
    elif name == "dinov2":
        values = [plain_frechet(a, b)]
    elif name == "cmmd":
        values = [1000 * (_gaussian(a, a) + _gaussian(b, b) - 2 * _gaussian(a, b))]
    else:
        values = plain_manifold(a, b)
    return list(zip(figures, values, strict=True))


def plain_frechet(a: np.ndarray, b: np.ndarray) -> float:
    """By the matrix square root, in the space that the rows span: distances are the same there, and it has few dimensions."""
    basis = np.linalg.qr(np.concatenate([a, b]).T)[0]
    a, b = a @ basis, b @ basis
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(np.clip(values, 0, None)) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ second @ root), 0, None)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * cross)


def plain_kernel(a: np.ndarray, b: np.ndarray) -> float:
    """By torch-fidelity, on the same random subsets."""
    from torch_fidelity.metric_kid import kid_features_to_metric

    size = min(len(a), len(b))
    found = kid_features_to_metric(torch.from_numpy(a), torch.from_numpy(b), kid_subset_size=size, rng_seed=2020, verbose=False)
    return float(found["kernel_inception_distance_mean"])


def plain_manifold(made: np.ndarray, real: np.ndarray) -> list[float]:
    """Precision, recall, density and coverage, one pair of points after the other."""

    def radius(rows: np.ndarray, i: int, k: int) -> float:
        return float(sorted(np.linalg.norm(rows - rows[i], axis=1))[k])

    def inside(point: np.ndarray, rows: np.ndarray, k: int) -> list[bool]:
        return [bool(np.linalg.norm(point - rows[i]) <= radius(rows, i, k)) for i in range(len(rows))]

    precision = np.mean([any(inside(point, real, 3)) for point in made])
    recall = np.mean([any(inside(point, made, 3)) for point in real])
    balls = np.array([inside(point, real, 5) for point in made])
    return [float(precision), float(recall), float(balls.sum() / (5 * len(made))), float(balls.any(0).mean())]


def _gaussian(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.mean([np.exp(-((x - y) ** 2).sum() / 200) for x in a for y in b]))


@torch.no_grad()
def _cosines(context: Context, weights: str, pictures: list[Image.Image], texts: list[str]) -> np.ndarray:
    """Image by image, through open_clip's own forward pass on a network that it loaded itself."""
    import open_clip

    network = towers.build(context.architectures[weights])
    open_clip.load_checkpoint(network, str(context.located[weights].path), weights_only=True)
    tokens, prepare = open_clip.get_tokenizer("ViT-B-32"), towers.preprocess(context.architectures[weights])
    values = []
    for picture, text in zip(pictures, texts, strict=True):
        image, words, *_ = network(prepare(picture)[None], tokens([text]))
        values.append(float(torch.nn.functional.cosine_similarity(image, words)))
    return np.array(values)
