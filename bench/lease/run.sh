#!/usr/bin/env bash
# Every figure that the docs want from a GPU, in one go and in limited time: README.md beside this.
#
#   run.sh CARRIED OUT [--tiny] [--seconds N] [--only "1 3"]
#
# CARRIED is the folder that parts.py has joined, OUT takes results.tar.gz, written anew after each stage. No stage
# needs another's success, except that 6 has no student to ask where 5 has made none. Numbers are those of README.md;
# 5 and 6 come last, as 5 takes the time that the others have left.
set -uo pipefail

HUMANEVAL_S=75 # kept for stage 6
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)

refuse() {
    echo "run.sh: $*" >&2
    exit 2
}

# What the machine lacks, for this Python alone.
install() {
    [ -d "$carried/wheels" ] || return 0
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$carried/site" "$carried"/wheels/*.whl
}

# The teacher as a folder: of a GGUF file the numbers, once for all stages.
teacher() {
    [ -d "$carried/teacher" ] || "$python" - "$carried" << 'PYTHON'
import json, sys
from pathlib import Path
from potstill import load_causal_lm
from potstill.data.tokenizers import load_tokenizer
from potstill.recipe.paths import locate

carried = Path(sys.argv[1])
file = locate(json.loads((carried / "packed.json").read_text())["teacher"], carried)
load_causal_lm(file).hf.save_pretrained(carried / "teacher")
load_tokenizer(file).save_pretrained(carried / "teacher")
PYTHON
}

left() { echo $((seconds - SECONDS)); }

# stage NUMBER NAME LIMIT COMMAND…: run it in at most LIMIT seconds (a dry run's CPU may be slow: four times that), and
# note how it ended.
stage() {
    local number=$1 name=$2 limit=$(($3 * slack)) from=$SECONDS code state
    shift 3
    [ "$limit" -le "$(left)" ] || limit=$(left)
    if [ "$limit" -lt 1 ]; then
        code=null state="not begun: no time left"
    else
        timeout --kill-after=10 "$limit" "$@" > "$results/$number-$name.log" 2>&1
        code=$?
        case $code in
            0) state="done" ;;
            124 | 137) state="over its limit" ;;
            *) state="failed" ;;
        esac
    fi
    printf '{"stage": %s, "name": "%s", "state": "%s", "exit": %s, "seconds": %s, "limit_s": %s}\n' \
        "$number" "$name" "$state" "$code" $((SECONDS - from)) "$limit" | tee -a "$results/stages.jsonl"
    tar -czf "$out/results.tar.gz.new" -C "$carried" results && mv "$out/results.tar.gz.new" "$out/results.tar.gz"
}

# for_each COMMAND NAME…: of each name, whether or not one before it failed.
for_each() {
    local command=$1 failed=0 name
    shift
    for name in "$@"; do "$command" "$name" || failed=1; done
    return $failed
}

# Of a model of $carried/models.
humaneval() {
    "$python" -m potstill eval "$carried/models/$1" --humaneval --no-judge "${humaneval_flags[@]}" \
        --out "$results/6-humaneval/$1"
}

# `check` says what the bits cost and how fast the teacher is.
quantised() { "$python" -m potstill check "$recipe" "${overrides[@]}" "teacher.weights=$1" --json > "$results/8-$1.json"; }

run_stage() {
    local long_s
    case $1 in
        1) stage 1 environment 20 sh -c '"$python" "$0/environment.py" "$carried" > "$results/1-environment.json"' "$here" ;;
        2)
            stage 2 tests 90 env PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 "$python" -m pytest -q -W default \
                -p no:cacheprovider -m gpu "${tests[@]}" "--junitxml=$results/2-tests.xml"
            ;;
        3) stage 3 loss 80 "$python" bench/gpu.py --only loss "${gpu_flags[@]}" --append "$results/3-loss.jsonl" --minutes 1.2 ;;
        4) stage 4 qwen 150 "$python" bench/gpu.py --only qwen "${gpu_flags[@]}" --append "$results/4-qwen.jsonl" --minutes 2.3 ;;
        5)
            stage 5 demo 40 "$python" bench/gpu.py --only demo "${gpu_flags[@]}" --append "$results/5-demo.jsonl" \
                --minutes 0.5 --demo "teacher.model=$carried/teacher" "${demo_fields[@]}"
            long_s=${long_s_of_tiny:-$(($(left) - HUMANEVAL_S))}
            stage 5 long "$long_s" "$python" bench/lease/long.py "$recipe" "${overrides[@]}" "${long_flags[@]}" \
                --results "$results" --work "$carried" --seconds "$((long_s - 5))"
            ;;
        6) stage 6 humaneval 90 bash -c '. "$carried/flags.sh"; for_each humaneval teacher untouched student' ;;
        7) stage 7 on-policy 5 sh -c 'echo "{\"not_run\": \"potstill has no on-policy rows yet\"}" | tee "$results/7-on-policy.json"' ;;
        8) stage 8 quantised 45 bash -c '. "$carried/flags.sh"; for_each quantised int8 int4' ;;
        *) refuse "no stage $1: they are 1 to 8" ;;
    esac
}

set_flags() {
    recipe=$here/long.yaml
    overrides=("corpus.path=$carried/ids.bin" "corpus.tokenizer=$carried/teacher" "teacher.model=$carried/teacher")
    # The student of an earlier lease.
    [ -d "$carried/student" ] && overrides+=("student={name: checkpoint, model: $carried/student}")
    gpu_flags=(--rounds 1) humaneval_flags=(--dtype bfloat16 --batch-rows 164) long_flags=() demo_fields=() long_s_of_tiny=
    tests=(tests/gpu tests/training/test_device.py)
    [ -n "$tiny" ] || return 0
    overrides+=("student.layers=1" "train.rows_per_step=2" "train.precision=float32" "teacher.dtype=float32"
        "corpus.tokens_per_row=64" "corpus.heldout_rows=4" "allow_weak_teacher=true" "train.device=cpu")
    gpu_flags=(--tiny --steps 3 --arms "ours, reference" plain)
    humaneval_flags=(--limit 3 --max-new-tokens 8 --device cpu)
    demo_fields=("student={name: cut, layers: 1}") long_flags=(--arm-steps 4 --most-steps 12 --mib 0.1) long_s_of_tiny=300
    tests=(tests/gpu)
}

main() {
    [ $# -ge 2 ] || refuse "give the folder that was carried here, and one for what goes back"
    carried=$(realpath -m "$1") out=$(realpath -m "$2") python=${PYTHON:-python3}
    shift 2
    tiny= slack=1 seconds=540 only="1 2 3 4 7 8 5 6"
    while [ $# -gt 0 ]; do
        case $1 in
            --tiny) tiny=1 slack=4; shift ;;
            --seconds) seconds=${2:?--seconds: how many}; shift 2 ;;
            --only) only=${2:?--only: which stages}; shift 2 ;;
            *) refuse "$1: not one of --tiny, --seconds, --only" ;;
        esac
    done
    [ -f "$carried/packed.json" ] || refuse "$carried: no packed.json in it. Join the parts there first: parts.py join"
    results=$carried/results
    mkdir -p "$results" "$out" "$carried/models"
    cd "$root" || exit 1
    set_flags
    export PYTHONPATH=$root/src:$carried/site PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
    export carried results python recipe
    # Stages that loop run in a shell of their own, so that a limit ends all of it.
    declare -p overrides humaneval_flags > "$carried/flags.sh"
    export -f humaneval quantised for_each

    SECONDS=0
    install > "$results/0-install.log" 2>&1 || echo "wheels are not installed: see 0-install.log"
    teacher > "$results/0-teacher.log" 2>&1 || echo "no teacher: see 0-teacher.log"
    ln -sfn "$carried/teacher" "$carried/models/teacher"
    local number
    for number in $only; do run_stage "$number"; done
    echo "$(left) s of $seconds left; results in $out/results.tar.gz, the student in $carried/back"
}

# Read whole before any of it runs, so that a checkout that changes meanwhile changes nothing.
main "$@"
exit
