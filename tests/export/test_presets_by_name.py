"""Every preset by its name alone, from replicas of its hub models: what is fetched, what is read there, and whether it all fits."""

import json
import os
import posixpath
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hub_server import serving
from replicas import hub_models

import snoopi_rt
from snoopi_rt.export.backbones import BACKBONES
from snoopi_rt.export.presets.rows import PRESETS
from snoopi_rt.export.weights.hub import weight_files

NAMES = [name for name, preset in PRESETS.items() if preset.weights]
EXPORTED = "hyper-sd15-lora"
"""A LoRA on a base of its own, and a last step that keeps some of its noise; other exports have tests of their own."""
PROMPTS = ["a red cat", "a blue dog"]
PROGRAM = """
import json, sys
from pathlib import Path
import torch
from snoopi_rt.cli.main import main
from snoopi_rt.errors import SnoopiError
from snoopi_rt.export import options
from snoopi_rt.export.backbones import find_backbone
from snoopi_rt.export.source import find_source, list_files

torch.set_num_threads(1)  # networks this small take longer on several
options.MEASURED_ON = ("cpu",)

def listed(name):
    return {model: [[file.name, file.size, file.here] for file in files] for model, files in list_files(preset=name).items()}

outcomes, (root, names, exported) = {}, json.loads(sys.argv[1])
for name in names:
    lines = []
    try:
        outcome = {"before": listed(name), "cached": len(list(Path(root, "hub", "hub").rglob("*")))}
        source = find_source(preset=name, accept_licence=True, say=lines.append)
        outcome |= {"lines": lines, "size": source.preset.size, "kept": source.preset.kept, "end": source.preset.end}
        find_backbone(source.preset.backbone).load(source.weights, source.preset, ((64, 64),))
        outcomes[name] = outcome | {"after": listed(name)}
    except SnoopiError as error:
        outcomes[name] = {"error": str(error)}
words = ["export", "--preset", exported, "--accept-licence", "--size", "64x64", "--precision", "fp32", "--decoder", "tiny"]
main([*words, "--prompts", f"{root}/prompts.txt", "--prompts-only", "--out", f"{root}/{exported}"], standalone_mode=False)
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What became of each preset, in one process whose hub is the replicas'; `models` has their files, `sent` what was fetched."""
    root = tmp_path_factory.mktemp("by_name")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    models = hub_models(root / "made")
    with serving(models) as server:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        clean |= {"HF_ENDPOINT": server.url, "HF_HOME": str(root / "hub")}
        words = [sys.executable, "-c", PROGRAM, json.dumps([str(root), NAMES, EXPORTED])]
        done = subprocess.run(words, env=clean, capture_output=True, encoding="utf-8", timeout=300)
        assert done.returncode == 0, done.stderr
        outcomes = json.loads(done.stdout.splitlines()[-1])
        yield {"outcomes": outcomes, "models": models, "sent": {(model, name) for model, name, _, _ in server.sent}, "root": root}


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_fetches_what_it_reads_and_fits_it(name: str, tried: dict[str, Any]) -> None:
    preset, outcome = PRESETS[name], tried["outcomes"][name]
    assert "error" not in outcome, outcome
    own = "pixart-sigma-nitro.safetensors" if "*" in preset.file else preset.file or preset.lora
    assert list(outcome["before"]) == ([preset.weights] if own else []) + [preset.base or preset.weights]
    *_, (folder, files) = outcome["before"].items()
    held, chosen = tried["models"][folder], [file for file, _, _ in files]
    assert not own or own in {place for file, _, _ in outcome["before"][preset.weights] for place in (file, posixpath.dirname(file) or ".")}
    for file, size, _ in files:
        assert size == len(held[file])
    parts = BACKBONES[preset.backbone].parts
    assert {posixpath.dirname(file) for file in chosen} == {*parts, ""}, "nothing of other folders"
    for part in parts:
        there, taken = ([posixpath.basename(file) for file in names if posixpath.dirname(file) == part] for names in (held, chosen))
        replaced = part == parts[0] and preset.file
        assert weight_files(taken) == ([] if replaced else weight_files(there, half=part.startswith("text_encoder")))
        assert replaced is False or not replaced or taken == ["config.json"]
    assert all(here for files in outcome["after"].values() for _, _, here in files)


def test_a_listing_fetches_nothing_and_everything_fetched_was_listed(tried: dict[str, Any]) -> None:
    assert tried["outcomes"][NAMES[0]]["cached"] == 0
    listed = {(model, file) for outcome in tried["outcomes"].values() for model, files in outcome["before"].items() for file, _, _ in files}
    # Beside them the card of every model, and the tiny decoder of the export.
    fetched = {(model, file) for model, file in tried["sent"] if file != "README.md" and not model.startswith("madebyollin/")}
    assert fetched <= listed


def test_the_size_and_the_end_of_the_steps_are_read_in_the_repositories(tried: dict[str, Any]) -> None:
    sizes = {name: outcome["size"] for name, outcome in tried["outcomes"].items()}
    # The replicas of SANA are smaller than it.
    other = {name: 64 for name in NAMES if PRESETS[name].backbone == "sana"} | {"lcm-dreamshaper": 768}
    assert sizes == {name: PRESETS[name].size for name in NAMES} | other
    lines = "\n".join(tried["outcomes"]["sdxs-dreamshaper"]["lines"])
    assert "end=0.999575,0.029154 as the folder's scheduler has it" in lines
    assert tried["outcomes"]["sdxs"]["end"] == [1, 0] and len(tried["outcomes"]["sdxl-lightning-8step"]["kept"]) == 7


def test_a_preset_exported_by_its_name_draws_with_and_without_a_negative(tried: dict[str, Any]) -> None:
    with snoopi_rt.load(tried["root"] / EXPORTED, engine="cpu") as pipe:
        plain = pipe.generate(PROMPTS[0], seed=1).images
        guided = pipe.generate(PROMPTS[0], PROMPTS[1], 1.0, seed=1).images
    assert plain.shape == (1, 64, 64, 3) and np.ptp(plain) > 0 and (plain != guided).any()
