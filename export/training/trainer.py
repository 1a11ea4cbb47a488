"""PG-SB from a teacher's folder and a file of prompts to a student's folder."""

import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from snoopi_rt.errors import InputError
from snoopi_rt.export.backbones import Denoiser, Weights, find_backbone
from snoopi_rt.export.backbones.network import check_network, load_decoder, read_latent
from snoopi_rt.export.training import loop
from snoopi_rt.export.training.image_grid import image_grid
from snoopi_rt.export.training.losses import LOSSES
from snoopi_rt.export.training.losses.loss import Loss, Term
from snoopi_rt.export.training.models import Models
from snoopi_rt.export.training.optimise import learning_rate
from snoopi_rt.export.training.processes import Processes
from snoopi_rt.export.training.prompt_files import check_prompts
from snoopi_rt.export.training.recipe import StudentRecipe
from snoopi_rt.export.training.recipes import FORMER_NAMES, described
from snoopi_rt.export.training.run import Log, Run, Samples, StudentBatch, descend, master_weights
from snoopi_rt.export.training.schedule import Schedule
from snoopi_rt.export.training.student_folder import export_arguments, own_preset, write_student
from snoopi_rt.export.training.task import Task
from snoopi_rt.export.weights.files import fingerprint, nothing_if_refused
from snoopi_rt.files import sha256

SHOWN = 16
"""Pictures in a grid of samples, of the first prompts."""


def train(
    task: Task,
    recipe: StudentRecipe,
    compiled: bool = False,
    sample_every: int = 250,
    say: Callable[[str], object] = lambda text: None,
) -> str:
    """Distils, and writes the student to `task.out` in diffusers layout, as export reads it, with the teacher's text encoder and decoder.

    Returns the preset that reads it with the settings in which it differs, as on the command line of export. `say` is told the settings
    once everything is checked. Raises InputError for folders and recipes that do not fit, of which nothing is left behind, and OutputError
    as loop.run does.
    """
    processes = Processes()
    if recipe.batch % processes.count:
        raise InputError(f"a batch of {recipe.batch} cannot be shared among {processes.count} processes")
    denoiser = find_backbone(task.backbone).denoiser()
    schedule = check(task, recipe, denoiser)
    stage = loop.Stage("student", task.out, recipe, _inputs(task, denoiser), sample_every, former_names=FORMER_NAMES)
    loop.first_step(stage)

    def ready() -> None:
        if processes.main:
            say(described(recipe))

    with nothing_if_refused(task.states or task.out / "states", task.pictures_folder) if processes.main else nullcontext():
        trainer = Trainer(task, recipe, denoiser, schedule, processes, compiled, ready)
    stage = replace(stage, stop_reason=trainer.stop_reason)
    loop.run(stage, trainer.parts, lambda i, random: trainer.step(i), trainer.sample, processes)
    if processes.main:
        write_student(task.teacher, denoiser.part, trainer.finished(), task.out)
    models = trainer.run.models
    return export_arguments(task, recipe, models.rule, models.size)


class Trainer:
    """A student, what it learns from, and its steps. Calls `ready` once the networks are loaded, before anything is written.

    `parts`: what a checkpoint holds. Raises InputError for what does not fit.
    """

    def __init__(
        self,
        task: Task,
        recipe: StudentRecipe,
        denoiser: Denoiser,
        schedule: Schedule,
        processes: Processes,
        compiled: bool = False,
        ready: Callable[[], None] = lambda: None,
    ):
        models, preset = Models(task, recipe, denoiser, schedule, processes.device, compiled), own_preset(task.backbone)
        optimiser = recipe.optimiser
        settings = {"weight_decay": optimiser.weight_decay, "ema": optimiser.ema, "muon": optimiser.muon}
        self.weights = master_weights(models.student, recipe, processes, **settings)
        models.round_student()
        self.decoder = load_decoder(Weights(task.teacher)) if processes.main else None
        ready()
        self.run = Run(task, recipe, models, processes, preset)
        models.measure_from(self.run.prompts.unconditional(1))
        self.losses: dict[str, Loss] = {
            name: LOSSES[name](self.run, settings) for name, settings in recipe.losses.items() if LOSSES[name].is_used(settings)
        }
        self.parts = {"student": self.weights}
        for loss in self.losses.values():
            self.parts |= loss.trained

    def step(self, i: int) -> dict[str, float]:
        """One step of the student and of the networks that its losses train: named scalars, means over all processes."""
        recipe, processes = self.run.recipe, self.run.processes
        numbers = processes.share(recipe.batch)
        size = recipe.micro_batch or len(numbers)
        chunks = [numbers[start : start + size] for start in range(0, len(numbers), size)]
        weights = {loss: weight for loss in self.losses.values() if (weight := loss.weight(i)) > 0}
        drawn: dict[Loss, dict[Samples, Tensor]] = {loss: {} for loss in weights}
        log = Log()

        def student_loss(samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
            batch = StudentBatch(self.run, samples)
            terms: dict[Loss, Term] = {loss: loss.term(batch) for loss in weights}
            for loss, term in terms.items():
                drawn[loss][samples] = term.x0.detach()
            total = torch.stack([weight * terms[loss].value for loss, weight in weights.items()]).sum()
            return total, {name: value for term in terms.values() for name, value in term.logged.items()}

        rate = learning_rate(recipe.lr, i, recipe.steps, warmup=recipe.optimiser.warmup, decay_from=recipe.optimiser.decay_from)
        parts = [Samples(i, chunk, len(chunk) / len(numbers)) for chunk in chunks]
        log.norms["norm"] = descend(self.weights, parts, student_loss, rate, log)
        for loss in weights:
            loss.follow(i, drawn[loss], log)
        log.values["spread"] = self._spread(torch.cat([*next(iter(drawn.values())).values()]))
        processes.mean(log.values.values())
        return {**{name: value.item() for name, value in log.values.items()}, **log.norms}

    def stop_reason(self, scalars: Mapping[str, float]) -> str | None:
        """Why the run must stop after a step with these scalars; None if it goes on."""
        collapse = self.run.recipe.collapse
        if scalars["spread"] < collapse:
            return f"the student has collapsed (deviation of its latents {scalars['spread']:.2g}, the least allowed is {collapse:g})"
        return None

    @torch.no_grad()
    def sample(self, path: Path) -> None:
        """Writes a grid of what the student's moving average makes of the first prompts, always from the same noise."""
        run, recipe = self.run, self.run.recipe
        count = min(SHOWN, len(run.prompts), recipe.micro_batch or recipe.batch)
        noise = torch.randn(count, *run.models.shape, generator=torch.Generator().manual_seed(0)).to(run.models.device)
        self.weights.publish(averaged=True)
        latents = run.models.clean(noise, run.prompts.batch(range(count)))
        self.weights.publish()
        assert self.decoder is not None
        pictures = torch.cat([self.decoder(latent[None].cpu()) for latent in latents])
        image_grid(pictures.cpu().numpy(), run.prompts.first[:count]).save(path)

    def finished(self) -> nn.Module:
        """The student as it ships: the moving average in fp32. No step can follow."""
        self.losses, self.parts = {}, {}
        self.weights.end()
        return self.run.models.finished(lambda: self.weights.publish(averaged=True))

    def _spread(self, x0: Tensor) -> Tensor:
        """The deviation of clean latents over the batch, of one alone over its own values: falls to 0 when the student collapses."""
        if self.run.recipe.batch == 1:
            return x0.std()
        moments = torch.stack([x0.mean(0), x0.square().mean(0)])
        self.run.processes.mean([moments])
        return (moments[1] - moments[0].square()).clamp(min=0).sqrt().mean()


def check(task: Task, recipe: StudentRecipe, denoiser: Denoiser) -> Schedule:
    """The teacher's schedule. Raises InputError for all that can be wrong and is seen before weights are loaded or anything is written."""
    check_network(task.teacher, task.backbone, denoiser)
    if task.student is not None:
        check_network(task.student, task.backbone, denoiser)
    schedule = Schedule.of(task.teacher)
    read_latent(Weights(task.teacher), denoiser.part)
    for name, settings in recipe.losses.items():
        LOSSES[name].check(settings, task, recipe)
    task.check(recipe)
    for name, file in {"prompts": task.prompts, "negatives": task.negatives}.items():
        if file is not None:
            check_prompts(file)
            task.check_states(file, name)
    with tempfile.TemporaryDirectory() as folder:
        encoder = denoiser.caption_encoder(task.teacher, own_preset(task.backbone).max_tokens)
        encoder.write_tokenizer(Path(folder) / "tokenizer.json")
    return schedule


def _inputs(task: Task, denoiser: Denoiser) -> dict[str, str]:
    """Fingerprints of all that a resumed run must find unchanged."""
    files = {
        "prompts": task.prompts,
        "negatives": task.negatives,
        "edits": task.edits,
        "scheduler": task.teacher / "scheduler" / "scheduler_config.json",
    }
    weights = {"teacher": task.teacher / denoiser.part, "student": task.student and task.student / denoiser.part, "clip": task.clip}
    return {
        "backbone": task.backbone,
        **{name: sha256(file) for name, file in files.items() if file},
        **{name: fingerprint(*sorted(file for file in folder.iterdir() if file.is_file())) for name, folder in weights.items() if folder},
    }
