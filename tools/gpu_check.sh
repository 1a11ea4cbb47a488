#!/usr/bin/env bash
# What is measured on a GPU, in parts of at most three minutes each, the most telling first.
#
#   tools/gpu_check.sh parts             their names and the seconds that each may take
#   tools/gpu_check.sh OUT [PART...]     runs these parts, or all; the folder OUT gets log.txt and the tables as JSON
#   tools/gpu_check.sh pack [FILE]       packs all that a bare machine needs into one file (build/gpu.tar), where there is a network
#
# A bare machine has CUDA, Python 3.12, torch 2.11 or newer with triton, transformers, onnx, onnxscript, peft, accelerate and pytest, and
# can fetch nothing; the engines' parts need their packages, too, and the last two the embedded bundle, which is not packed:
#
#   tar -xf gpu.tar && snoopi-rt-gpu/tools/gpu_check.sh OUT kernel-tests kernel
#
# The exit code counts the parts that failed.
set -uo pipefail
# The part, its limit in seconds, and what it runs.
PARTS=(
    "kernel-tests 150 python3 -m pytest -q -p no:cacheprovider -W default @PARALLEL tests/kernels/test_nasa_kernel.py"
    "kernel 120 python3 tools/gpu_kernel.py --out @OUT/kernel.json"
    "pixart 120 python3 tools/gpu_students.py --student pixart --out @OUT/pixart.json"
    "sd 180 python3 tools/gpu_students.py --student sd15 --student sd21 --out @OUT/sd.json"
    "training 120 python3 tools/gpu_training.py --student pixart --student sd21 --out @OUT/training.json"
    "pgsb-student 120 python3 tools/random_student.py sd21 --out @WORK/sd21"
    "pgsb 150 python3 tools/training_memory.py --backbone sd21 --teacher @WORK/sd21 --negative blurry --batch 1 --batch 4 --out @OUT/pgsb.json"
    "compiled 180 python3 tools/gpu_students.py --student pixart --batch 1 --compiled --out @OUT/compiled.json"
    "flex 180 python3 tools/gpu_kernel.py --flex --batch 1 --out @OUT/flex.json"
    "exported 180 python3 tools/gpu_exported.py --student sd21 --out @OUT/exported.json"
    "tensorrt 150 python3 -m snoopi_rt build --engine tensorrt"
    "tensorrt-bench 150 python3 -m snoopi_rt bench --engine tensorrt --runs 50"
)
LARGEST=$((64 << 20))

fail() {
    printf '%s\n' "$1" >&2
    exit 2
}

pack() {
    local file=$1
    rm -rf build/gpu && mkdir -p build/gpu "$(dirname "$file")" || exit 1
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d build/gpu \
        "diffusers>=0.42,<0.43" importlib-metadata zipp || exit 1
    # Tracked files as they lie here, without what only drawing with the embedded model needs. Links stay links.
    { git ls-files -z --cached --others --exclude-standard -- . ':!weights' ':!snoopi_rt/bundles' ':!docs' ':!export/evaluation/*.safetensors' && printf '%s\0' build/gpu/*.whl; } |
        tar -cf "$file" --null --transform='flags=r;s,^,snoopi-rt-gpu/,' -T - || exit 1
    [ "$(stat -c %s "$file")" -le "$LARGEST" ] || fail "$file is larger than $((LARGEST >> 20)) MiB"
    printf '%s: %s KiB\n' "$file" $(($(stat -c %s "$file") >> 10))
}

machine() {
    python3 - <<'PY'
import importlib.metadata, platform
import torch
if not torch.cuda.is_available():
    raise SystemExit("no GPU that torch can use")
print(torch.cuda.get_device_name(), "capability", torch.cuda.get_device_capability(), "Python", platform.python_version())
for name in ("torch", "triton", "diffusers", "transformers", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13", "cuda-bindings"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "is not installed")
PY
}

part() { # part NAME SECONDS COMMAND...
    local name=$1 limit=$2 start=$SECONDS code
    shift 2
    printf '\n== %s (at most %s s)\n' "$name" "$limit"
    timeout "$limit" "$@" 2>&1
    code=$?
    [ "$code" = 0 ] || printf '%s failed with exit code %s (124: its time was over)\n' "$name" "$code"
    printf '(%s s)\n' $((SECONDS - start))
    return "$code"
}

first=${1:?the folder to write to, or parts, or pack}
shift
if [ "$first" = parts ]; then
    for line in "${PARTS[@]}"; do
        read -r name limit _ <<< "$line"
        printf '%-16s%4s\n' "$name" "$limit"
    done
    exit
fi
out=$(realpath -m "$first") file=$(realpath -m "${1:-$(dirname "$0")/../build/gpu.tar}")
cd "$(dirname "$0")/.." || exit 1
if [ "$first" = pack ]; then
    pack "$file"
    exit
fi
for name in "$@"; do
    grep -q "^$name " <<< "$(printf "%s\n" "${PARTS[@]}")" || fail "unknown part $name: $0 parts"
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out" || exit 1
if compgen -G "build/gpu/*.whl" > /dev/null; then
    python3 -m pip install -q --no-index --no-deps --no-compile --target "$work/site" build/gpu/*.whl || exit 1
fi
export PYTHONPATH="$PWD:$work/site" PYTHONUNBUFFERED=1 TQDM_DISABLE=1 SNOOPI_RT_CACHE="$work/cache"
parallel=$(python3 -c 'import importlib.util as i; print("-n8" if i.find_spec("xdist") else "-q")')
machine 2>&1 | tee "$out/log.txt" || exit 1
failed=0
for line in "${PARTS[@]}"; do
    read -ra words <<< "$line"
    words=("${words[@]//@OUT/"$out"}") && words=("${words[@]//@WORK/"$work"}") && words=("${words[@]//@PARALLEL/"$parallel"}")
    [ $# = 0 ] || [[ " $* " = *" ${words[0]} "* ]] || continue
    part "${words[@]}" | tee -a "$out/log.txt"
    [ "${PIPESTATUS[0]}" = 0 ] || failed=$((failed + 1))
done
exit "$failed"
