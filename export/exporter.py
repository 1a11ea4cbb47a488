"""A student's weights to a bundle: load, write the graphs, measure them, write the manifest; in that order."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from snoopi_rt import __version__
from snoopi_rt.bundle.bundle import MANIFEST, Bundle, GuidancePromise, Scale
from snoopi_rt.bundle.manifest import text_rule
from snoopi_rt.bundle.tokenizer import Tokenizer, highest_id
from snoopi_rt.errors import InputError, OutputError
from snoopi_rt.export.backbones import Student
from snoopi_rt.export.final_check import Extreme, draw_whole, extreme_ids
from snoopi_rt.export.onnx_graphs import calibration
from snoopi_rt.export.onnx_graphs.variants import write_variants
from snoopi_rt.export.options import ExportOptions, ExportPlan
from snoopi_rt.export.source import Source
from snoopi_rt.export.student_graphs import decoder_tile, student_graphs
from snoopi_rt.files import alone, check_place, hidden, reason
from snoopi_rt.prompt_encoder import write_prompts
from snoopi_rt.shell import quote

MAX_PIXELS = 64 * 128**2
"""Of all images of a batch, which bounds its memory: 4 images of 512 x 512."""


def export(source: Source, out: Path, options: ExportOptions | None = None, say: Callable[[str], None] = lambda line: None) -> Bundle:
    """Writes a student to the bundle `out` and returns it; `say` gets a line for everything that is measured.

    Raises InputError (unknown names, weights that do not fit, `out` in use), OutputError if a graph is too far from PyTorch or the
    finished bundle does not draw what it promises. The bundle appears under the name `out` when it is complete; with `force` it then
    replaces the one that is there.
    """
    plan = ExportPlan.of(source, options or ExportOptions())
    old = hidden(out, ".old")
    if old.exists() and not out.exists():  # killed between two renames
        old.replace(out)
    check_out(out, plan.options.force)
    part = hidden(out, ".part")
    with alone(part, "exporting", out) as lock:
        for left in part.iterdir():  # by an export that was killed
            if left.is_dir():
                shutil.rmtree(left)
            elif left != lock:
                left.unlink()
        try:
            student = plan.backbone.load(source.weights, source.preset, plan.sizes)
            bundle, extremes = _write_files(part, out.name, plan, student, say)
            draw_whole(bundle.save(part), plan.engines, extremes, say)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    lock.unlink(missing_ok=True)
    _rename(part, out, old)
    return Bundle.load(out)


def _rename(part: Path, out: Path, old: Path) -> None:
    """Gives the folder `part` the name `out`; one that has it is `old` for a moment, and then gone."""
    shutil.rmtree(old, ignore_errors=True)
    try:
        if out.exists():
            out.replace(old)
        part.replace(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.replace(out)
        shutil.rmtree(part, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def check_out(out: Path, force: bool) -> None:
    """Returns if a bundle may be written to `out`; raises InputError if something is in the way, OutputError if nothing can be
    written."""
    if out.exists() and not (force and (out / MANIFEST).exists()):
        raise InputError(f"{quote(out)} exists: choose another folder, or --force to replace it if it is a bundle")
    try:
        check_place(out)
    except OSError as error:
        raise OutputError(f"cannot write {quote(out)}: {reason(error)}") from error


def _write_files(folder: Path, name: str, plan: ExportPlan, student: Student, say: Callable[[str], None]) -> tuple[Bundle, list[Extreme]]:
    """Writes all files of a bundle but its bundle.json; returns what that will say, and the prompts of the final check."""
    text = student.write_tokenizer(folder / "tokenizer.json")
    tokenizer = Tokenizer.of(folder / "tokenizer.json", text)
    stored = list(dict.fromkeys(text_rule(prompt, text.lowercase) for prompt in plan.options.prompts))
    say(f"encoding {len(calibration.TEXTS) + len(stored)} prompts")
    ids = {prompt: torch.from_numpy(tokenizer(prompt, truncate=prompt not in stored)) for prompt in (*calibration.TEXTS, *stored)}
    limit_ids = {} if plan.options.prompts_only else extreme_ids(tokenizer, highest_id(folder / "tokenizer.json"))
    encoded = student.encode([*ids.values(), *limit_ids.values()])
    states = dict(zip(ids, encoded, strict=False))
    extremes = [Extreme(*limit, values) for limit, values in zip(limit_ids.items(), encoded[len(ids) :], strict=True)]
    graphs = {}
    for graph in student_graphs(plan, student, ids, states):
        graphs[graph.name] = write_variants(graph, plan.precision[graph.name], folder, plan.engines, say, plan.options.or_nearest)
    prompts = None
    if stored:
        prompts = write_prompts(folder, {prompt: {name: value.numpy() for name, value in states[prompt].items()} for prompt in stored})
    if plan.options.prompts_only:
        (folder / "tokenizer.json").unlink()
        text = replace(text, tokenizer=None)
    guidance = plan.guidance
    bundle = Bundle(
        name=name,
        backbone=plan.backbone.name,
        licence=plan.source.licence,
        text=text,
        latent=plan.source.latent,
        sizes=plan.sizes,
        max_batch=max(1, MAX_PIXELS // max(height * width for height, width in plan.sizes)),
        guidance=GuidancePromise(guidance.kind, Scale(guidance.default_scale, 0.0, guidance.max_scale), dict(guidance.fixed)),
        provenance={**plan.source.provenance, "exporter": f"snoopi-rt {__version__}, torch {torch.__version__}"},
        graphs=graphs,
        prompts=prompts,
        tile=decoder_tile(plan, student),
        vocabulary=student.vocabulary,
        examples=() if plan.options.prompts_only else student.examples,
    )
    return bundle, extremes
