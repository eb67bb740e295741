#!/usr/bin/env bash
# Every figure that the docs want from a GPU, in one go and in limited time: README.md beside this.
#
#   run.sh CARRIED OUT [--tiny] [--seconds N] [--only "1 3"]
#
# CARRIED is the folder that parts.py has joined, OUT takes results.tar.gz, written anew after each stage. No stage
# needs another's success, except that 6 has no student to ask where 5 has made none. Numbers are those of README.md;
# 5 and 6 come last, as 5 takes the time that the others have left.
set -uo pipefail
[ $# -ge 2 ] || { sed -n '2,5s/^# \{0,1\}//p' "$0"; exit 2; }
carried=$(realpath "$1") out=$(realpath -m "$2")
shift 2
tiny= seconds=540 only="1 2 3 4 7 8 5 6"
while [ $# -gt 0 ]; do
    case $1 in
        --tiny) tiny=1; shift ;;
        --seconds) seconds=$2; shift 2 ;;
        --only) only=$2; shift 2 ;;
        *) echo "run.sh: $1: not one of --tiny, --seconds, --only" >&2; exit 2 ;;
    esac
done
here=$(cd "$(dirname "$0")" && pwd) root=$(cd "$(dirname "$0")/../.." && pwd)
results=$carried/results python=${PYTHON:-python3}
HUMANEVAL_S=75 # kept for stage 6
mkdir -p "$results" "$out" "$carried/models"
cd "$root" || exit 1

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

# stage NUMBER NAME LIMIT COMMAND…: run it in at most LIMIT seconds, and note how it ended.
stage() {
    local number=$1 name=$2 limit=$3 from=$SECONDS code state
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

for_each() { # for_each COMMAND NAME…: of each name, whether or not one before it failed
    local command=$1 failed=0 name
    shift
    for name in "$@"; do "$command" "$name" || failed=1; done
    return $failed
}

humaneval() { # of a model of $carried/models
    "$python" -m potstill eval "$carried/models/$1" --humaneval --no-judge "${humaneval_flags[@]}" \
        --out "$results/6-humaneval/$1"
}

quantised() { # `check` says what the bits cost and how fast the teacher is
    "$python" -m potstill check "$recipe" "${overrides[@]}" "teacher.weights=$1" --json > "$results/8-$1.json"
}

recipe=$here/long.yaml
overrides=("corpus.path=$carried/ids.bin" "corpus.tokenizer=$carried/teacher" "teacher.model=$carried/teacher")
[ -d "$carried/student" ] && overrides+=("student={name: checkpoint, model: $carried/student}") # of an earlier lease
gpu_flags=() humaneval_flags=(--dtype bfloat16 --batch-rows 164) long_flags=() demo_fields=() tests=(-m gpu tests)
if [ -n "$tiny" ]; then
    overrides+=("student.layers=1" "train.rows_per_step=2" "train.precision=float32" "teacher.dtype=float32"
        "corpus.tokens_per_row=64" "corpus.heldout_rows=4" "allow_weak_teacher=true" "train.device=cpu")
    gpu_flags=(--tiny --steps 3 --arms "ours, reference" plain)
    humaneval_flags=(--limit 3 --max-new-tokens 8 --device cpu)
    demo_fields=("student.layers=1")
    long_flags=(--arm-steps 4 --most-steps 12 --mib 0.1)
    tests=(-m gpu tests/gpu)
fi
export -f humaneval quantised for_each
export PYTHONPATH=$root/src:$carried/site PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export carried results python recipe
# Arrays are not exported: the stages that loop get them as text.
declare -p overrides humaneval_flags > "$carried/flags.sh"

SECONDS=0
install > "$results/0-install.log" 2>&1 || echo "wheels are not installed: see 0-install.log"
teacher > "$results/0-teacher.log" 2>&1 || echo "no teacher: see 0-teacher.log"
ln -sfn "$carried/teacher" "$carried/models/teacher"
for number in $only; do
    case $number in
        1) stage 1 environment 20 sh -c '"$python" "$0/environment.py" "$carried" > "$results/1-environment.json"' "$here" ;;
        2) stage 2 tests 90 "$python" -m pytest -q -W default -p no:cacheprovider "${tests[@]}" --junitxml="$results/2-tests.xml" ;;
        3) stage 3 loss 50 "$python" bench/gpu.py --only loss "${gpu_flags[@]}" --append "$results/3-loss.jsonl" --minutes 0.7 ;;
        4) stage 4 qwen 110 "$python" bench/gpu.py --only qwen "${gpu_flags[@]}" --append "$results/4-qwen.jsonl" --minutes 1.6 ;;
        5)
            stage 5 demo 40 "$python" bench/gpu.py --only demo "${gpu_flags[@]}" --append "$results/5-demo.jsonl" --minutes 0.5 \
                --demo "teacher.model=$carried/teacher" "${demo_fields[@]}"
            [ -n "$tiny" ] && long_s=120 || long_s=$(($(left) - HUMANEVAL_S))
            stage 5 long "$long_s" "$python" bench/lease/long.py "$recipe" "${overrides[@]}" "${long_flags[@]}" \
                --results "$results" --work "$carried" --seconds "$((long_s - 5))"
            ;;
        6) stage 6 humaneval 90 bash -c '. "$carried/flags.sh"; for_each humaneval teacher untouched student' ;;
        7) stage 7 on-policy 5 sh -c 'echo "{\"not_run\": \"potstill has no on-policy rows yet\"}" | tee "$results/7-on-policy.json"' ;;
        8) stage 8 quantised 45 bash -c '. "$carried/flags.sh"; for_each quantised int8 int4' ;;
        *) echo "run.sh: no stage $number" >&2 ;;
    esac
done
echo "$(left) s of $seconds left; results in $out/results.tar.gz, the student in $carried/back"
