#!/usr/bin/env bash
# The embedded model from drawings, in one command. Started again, it resumes.
#
#   tools/small_model.sh RUNS           pictures, decoder, teacher, student and its bundle below the folder RUNS
#   tools/small_model.sh RUNS --quick   the same road in minutes, in a folder of its own, to see that it holds; what comes out is no model
#
# Needs pip install -e ".[export,train]". The encoder stays as it is, and the teacher begins with the one that is committed.
set -euo pipefail
runs=${1:?the folder to work in}
encoder=weights/small/encoder
pictures=98304 all=(--compile) students=() tuned=() judged=()
if [ "${2:-}" = --quick ]; then
    pictures=64 all=(--set steps=2 --set batch=4) judged=(--quick)
    tuned=(--set images=8 --set adversarial_from=0)
    students=(--set collapse=0 --set regression.pairs=8 --set regression.teacher_steps=2)
fi
emoji=$runs/emoji

stage() { snoopi-rt train "$@" "${all[@]}"; }

snoopi-rt data emoji --encoder "$encoder" --out "$emoji" --count $pictures
stage decoder --data "$emoji" --encoder "$encoder" --out "$runs/decoder"
stage teacher --data "$emoji" --decoder "$runs/decoder" --start weights/small/teacher --out "$runs/teacher"
# What it draws first, then what negative prompts should do, at last that alone.
distilled=(--teacher "$runs/teacher" --prompts "$emoji/prompts.txt" --states "$runs/states" --recipe embedded)
stage student "${distilled[@]}" --set optimiser.decay_from=1 --out "$runs/plain" "${students[@]}"
edits=(--edits "$emoji/edits.jsonl" --set edits.weight=1 --set edits.kept=3 --set negative_scale_max=1 --set negative_kind=projected --set steps=1500)
stage student "${distilled[@]}" --start "$runs/plain" "${edits[@]}" --set lr=4e-4 --out "$runs/edited" "${students[@]}"
stage student "${distilled[@]}" --start "$runs/edited" "${edits[@]}" --set lr=3e-4 --set regression.weight=0 --set edits.anchored=true \
    --out "$runs/student" "${students[@]}"
stage student-decoder --student "$runs/student" --teacher "$runs/teacher" --data "$emoji" --out "$runs/student-decoder" "${tuned[@]}"
snoopi-rt export --backbone small --weights "$runs/student" --decoder "$runs/student-decoder" --out "$runs/bundle" --force
snoopi-rt eval small --bundle "$runs/bundle" --teacher "$runs/teacher" --references "$runs/references" --out "$runs/evaluation" "${judged[@]}"
