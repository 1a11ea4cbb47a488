"""Whether a bundle's vocabulary tells prompts that its model can draw from those that it cannot.

Both lists were written by someone who saw only the names of the objects, and are held out: snoopi_rt/runtime/english.py is not tuned on
them.
"""

from collections.abc import Iterator
from importlib.resources import files

from snoopi_rt.bundle.bundle import Vocabulary
from snoopi_rt.export.evaluation.report import Goal, ReportRow
from snoopi_rt.export.evaluation.statistics import share_interval
from snoopi_rt.runtime.vocabulary import Matcher


def warnings(vocabulary: Vocabulary) -> Iterator[ReportRow]:
    """The shares of prompts of either kind that are warned of."""
    matcher = Matcher(vocabulary)
    for kind, goal in (("unknown", Goal(least=0.95)), ("known", Goal(most=0.02))):
        prompts = files("snoopi_rt.export.evaluation").joinpath(f"{kind}_prompts.txt").read_text(encoding="utf-8").splitlines()
        count = sum(matcher.warning(prompt, "it") is not None for prompt in prompts)
        name, of = f"{kind} prompts that are warned of", len(prompts)
        yield ReportRow("warnings", name, count / of, goal, count=count, of=of, interval=share_interval(count, of))
