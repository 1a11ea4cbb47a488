"""What the rows of presets share: the settings of a backbone, of a scheduler, of a licence, and of students that are trained here."""

import math
from typing import Any

from snoopi_rt.export.one_step import SCHEDULES

# Negative scales: SNOOPI v3 (SD 1.5 0.1, SD 2.1 0.2, PixArt 0.5), and v1, table 8, for a student that it names; nothing is published for
# SDXL, which takes SD 2.1's. NAG: its table 5, SD 2.1 taking SD 1.5's and PixArt alpha PixArt sigma's. vsf and projected: 1, not tuned.
SD15: dict[str, Any] = {"backbone": "sd15", "nasa_scale": 0.1}
SD21: dict[str, Any] = {"backbone": "sd21"}
SDXL: dict[str, Any] = {
    "backbone": "sdxl",
    "base": "stabilityai/stable-diffusion-xl-base-1.0",
    "size": 1024,
    "nag_alpha": 0.5,
}
PIXART: dict[str, Any] = {
    "backbone": "pixart",
    "base": "PixArt-alpha/PixArt-XL-2-512x512",
    "schedule": "pixart",
    "max_tokens": 120,
    "nasa_scale": 0.5,
    "nag_scale": 4.0,
}


def kept(*timesteps: float) -> dict[str, Any]:
    """Steps of DDIM and Euler: all noise after the first step's is predicted."""
    return {"timestep": timesteps, "kept": tuple(math.sqrt(1 - SCHEDULES["sd"][int(t)]) for t in timesteps[1:])}


# What diffusers' Euler schedulers do at timestep_spacing trailing, in this project's terms (OneStepRule).
EULER: dict[str, Any] = {
    "input_scale": math.sqrt(1 - SCHEDULES["sd"][999]),
    "from_scheduler": ("prediction", "alpha", "timestep", "input_scale", "end"),
    "checked": "the hub's file",
}
# A network or LoRA that comes with no scheduler, and whose card names one for it.
NAMED: dict[str, Any] = {"from_scheduler": ("alpha",), "checked": "diffusers' scheduler"}
SDXL_LIGHTNING: dict[str, Any] = {
    **SDXL,
    **EULER,
    **NAMED,
    "weights": "ByteDance/SDXL-Lightning",
    "licence": "OpenRAIL++",
}
# Four steps of diffusers' LCMScheduler, with new noise between them.
LCM: dict[str, Any] = {"timestep": (999.0, 759.0, 499.0, 259.0)}
# Where diffusers' TCDScheduler ends: at its first timestep, not at the clean latent.
TCD: dict[str, Any] = {"end": (math.sqrt(SCHEDULES["sd"][0]), math.sqrt(1 - SCHEDULES["sd"][0]))}
SANA_SPRINT: dict[str, Any] = {
    "backbone": "sana",
    "prediction": "trigflow",
    "timestep": (1.5708,),
    "from_scheduler": ("prediction",),
    "licence": "conflicting: NSCL v2 (non-commercial), NVIDIA Open Model and Apache-2.0 are named",
    "non_commercial": True,
    "size": 1024,
    "max_tokens": 300,
    "nasa_scale": 0.5,
    "nag_scale": 4.0,
    "checked": "diffusers' scheduler",
    "source": "diffusers' SanaSprintPipeline and SCMScheduler: guidance 4.5, one step from 1.5708, two by way of 1.3",
    "note": "nasa scale PixArt's, nothing is published; three and four steps: --set timestep=1.5708,1.1781,0.7854,0.3927",
}
TWO_STEPS: dict[str, Any] = {"timestep": (1.5708, 1.3)}
STABILITY: dict[str, Any] = {"licence": "Stability AI Community / Non-Commercial", "non_commercial": True}
CC_BY_NC: dict[str, Any] = {"licence": "CC BY-NC 4.0", "non_commercial": True}
CC_BY_NC_SA: dict[str, Any] = {"licence": "CC BY-NC-SA 4.0", "non_commercial": True}
# What `train student` makes of a teacher: fed and read at one timestep of the teacher's own schedule.
PGSB: dict[str, Any] = {
    "weights": "",
    "base": "",
    "licence": "the teacher's",
    "from_scheduler": ("prediction", "alpha"),
    "checked": "diffusers' scheduler",
    "source": "train student; negative scales of SNOOPI v1, table 8",
    "note": "give the folder that train student wrote as --weights",
}
