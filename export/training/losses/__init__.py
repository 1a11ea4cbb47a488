"""The losses of the student by name. A new one is a file beside this one and a line below."""

from snoopi_rt.export.training.losses.adversarial import AdversarialLoss
from snoopi_rt.export.training.losses.clip import ClipLoss
from snoopi_rt.export.training.losses.edits import EditsLoss
from snoopi_rt.export.training.losses.loss import Loss
from snoopi_rt.export.training.losses.regression import RegressionLoss
from snoopi_rt.export.training.losses.vsd import VsdLoss
from snoopi_rt.export.training.recipe import LOSS_SETTINGS

LOSSES: dict[str, type[Loss]] = {}


def register(name: str, loss: type[Loss]) -> None:
    """Adds a loss: recipes made from now on have its settings, as `NAME.weight` and whatever else they hold."""
    LOSSES[name] = loss
    LOSS_SETTINGS[name] = loss.Settings


register("vsd", VsdLoss)
register("regression", RegressionLoss)
register("edits", EditsLoss)
register("adversarial", AdversarialLoss)
register("clip", ClipLoss)
