#!/usr/bin/env bash
# The embedded model from nothing but drawings, in one command: about five and a half hours on two cores. Started again, it goes on where it was stopped.
#
#   tools/small_model.sh RUNS           pictures, autoencoder, teacher, student and its bundle below the folder RUNS
#   tools/small_model.sh RUNS --quick   the same road in minutes, to see that it holds; what comes out is no model
#
# Needs pip install -e ".[export,train]", and npm for the drawings.
set -euo pipefail
runs=${1:?the folder to work in}
pictures=40000 all=(--compile) students=()
if [ "${2:-}" = --quick ]; then
    pictures=200 all=(--set steps=2 --set batch=4)
    students=(--set collapse=0 --set warm_steps=1 --set warm_pairs=8 --set warm_calls=2 --set negative_pairs=8)
fi
emoji=$runs/emoji prompts=$runs/emoji/prompts.txt

stage() { snoopi-rt train "$@" "${all[@]}"; }
student() { stage student --prompts "$prompts" "$@" "${students[@]}"; }

test -e "$emoji/dataset.json" || snoopi-rt data emoji --out "$emoji" --count $pictures
stage autoencoder --data "$emoji" --out "$runs/autoencoder"
stage teacher --data "$emoji" --autoencoder "$runs/autoencoder" --out "$runs/first"
stage teacher --data "$emoji" --autoencoder "$runs/autoencoder" --start "$runs/first" --set steps=6000 --set lr=5e-4 --out "$runs/teacher"
student --teacher "$runs/first" --out "$runs/first-student" --set steps=2400
student --teacher "$runs/teacher" --student "$runs/first-student" --out "$runs/second-student" --set steps=2400 --set lora_kappa=1 --set empty=0
student --teacher "$runs/teacher" --student "$runs/second-student" --out "$runs/warm" --set steps=6000 --set warm_steps=6000 --set lr=4e-4
# The same pairs of noise and the teacher's pictures serve the next round.
mkdir -p "$runs/student"
test -e "$runs/student/pictures" || cp -r "$runs/warm/pictures" "$runs/student/"
student --teacher "$runs/teacher" --student "$runs/warm" --out "$runs/student" --set steps=4000 --set lora_kappa=1 --set empty=0 --set warm_weight=0.5
# Four in ten prompts with a flaw, a quarter with two things.
awk '/blurry|pixelated|grayscale|grainy/ {if (flawed++ < 5120) print; next} / and / {if (two++ < 3072) print; next} plain++ < 4096' "$prompts" > "$runs/mixed.txt"
prompts=$runs/mixed.txt
student --teacher "$runs/teacher" --student "$runs/student" --negatives "$emoji/negatives.txt" --recipe small-negatives --out "$runs/negatives"
student --teacher "$runs/teacher" --student "$runs/negatives" --negatives "$emoji/negatives.txt" --recipe small-negatives --set steps=2700 --out "$runs/again"
stage autoencoder --data "$emoji" --start "$runs/autoencoder" --out "$runs/decoder" --set steps=2500 --set noise=0.08 --set grid=8
snoopi-rt export --backbone small --weights "$runs/again" --decoder "$runs/decoder" --out "$runs/bundle" --force
echo "next: snoopi-rt eval --bundle $runs/bundle --teacher $runs/teacher --scorers weights/small/scorers --out $runs/evaluation"
