#!/usr/bin/env bash
# Everything that is measured on a GPU, in one command of at most nine minutes.
#
#   tools/gpu_check.sh pack     where there is a network: fetches into build/gpu what a machine with CUDA, Python 3.12, torch and triton lacks
#   tools/gpu_check.sh OUT      on that machine: runs every part and writes its table and its JSON into the folder OUT
#
# A part whose packages are missing says so, and the others run. The exit code counts the parts that failed.
set -uo pipefail
cd "$(dirname "$0")/.."

if [ "${1:-}" = pack ]; then
    rm -rf build/gpu
    exec python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d build/gpu \
        "diffusers>=0.42,<0.43" click importlib-metadata zipp
fi

out=${1:?the folder to write to, or pack}
mkdir -p "$out"
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if compgen -G "build/gpu/*.whl" > /dev/null; then
    python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" build/gpu/*.whl || exit 1
fi
# As setup.py maps the packages; a bare machine may not be able to build a wheel.
cp -r snoopi_rt "$site/" && cp -r engines export "$site/snoopi_rt/" && cp -r kernels/ops "$site/snoopi_rt/kernels" || exit 1
export PYTHONPATH="$site" PYTHONUNBUFFERED=1 TQDM_DISABLE=1

failed=0
part() {  # part NAME SECONDS COMMAND...
    local name=$1 limit=$2
    shift 2
    printf '\n== %s\n' "$name"
    local start=$SECONDS
    timeout "$limit" "$@" 2>&1 | tee "$out/$name.txt"
    local code=${PIPESTATUS[0]}
    if [ "$code" != 0 ]; then
        failed=$((failed + 1))
        printf '%s failed with exit code %s (124: its time was over)\n' "$name" "$code" | tee -a "$out/$name.txt"
    fi
    printf '(%s s)\n' $((SECONDS - start))
}

part machine 30 python3 - <<'PY'
import importlib.metadata, importlib.util, platform
import torch
if not torch.cuda.is_available():
    raise SystemExit("no GPU that torch can use")
print(torch.cuda.get_device_name(), "capability", torch.cuda.get_device_capability(), platform.python_version())
for name in ("torch", "triton", "diffusers", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13", "cuda-bindings"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "is not installed")
PY
part kernel-tests 90 python3 -m pytest -q -p no:cacheprovider tests/test_nasa_kernel.py
part kernel 150 python3 tools/gpu_kernel.py --out "$out/kernel.json"
part students 240 python3 tools/gpu_students.py --seconds 150 --out "$out/students.json"
if python3 -c "import importlib.util, sys; sys.exit(not any(map(importlib.util.find_spec, ('tensorrt', 'tensorrt_rtx'))))"; then
    part tensorrt 120 python3 -m snoopi_rt build --engine tensorrt
    part tensorrt-bench 150 python3 -m snoopi_rt bench --engine tensorrt --runs 50
else
    printf '\ntensorrt: not installed, so its engine was not run\n' | tee "$out/tensorrt.txt"
fi
exit "$failed"
