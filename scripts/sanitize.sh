#!/usr/bin/env bash
# The GPU tests under NVIDIA's compute-sanitizer: memory accesses, races in shared memory, barriers.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage='scripts/sanitize.sh [--tools "TOOL ..."] [--jobs N] [--limit SECONDS] [--logs FOLDER]
                    [-- PYTEST ARGUMENTS]
  --tools  of memcheck, racecheck, synccheck and initcheck, one after the other; the first three
           without this. initcheck tells of memory that was read and never written; as tensors with
           gaps between their elements are copied whole, it leaves other layouts out.
  --jobs   processes that share the tests of a tool (8)
  --limit  seconds that a process may take (1500)
  --logs   where output and reports are kept (a new folder in /tmp)
What follows -- replaces the tests that run: generated and hand-written kernels, and short trainings.
PYTHON names the interpreter (python), SANITIZER the sanitizer (compute-sanitizer).'

tools="memcheck racecheck synccheck"
jobs=8
limit=1500
logs=
while [ $# -gt 0 ]; do
    case $1 in
        --tools) tools=$2; shift ;;
        --jobs) jobs=$2; shift ;;
        --limit) limit=$2; shift ;;
        --logs) logs=$2; shift ;;
        --) shift; break ;;
        --help) echo "$usage"; exit ;;
        *) echo "$usage" >&2; exit 2 ;;
    esac
    shift
done

python=${PYTHON:-python}
sanitizer=${SANITIZER:-compute-sanitizer}
if ! command -v "$sanitizer" >/dev/null; then
    echo "There is no $sanitizer on the PATH; it comes with the CUDA toolkit." >&2
    exit 2
fi
logs=${logs:-$(mktemp -d /tmp/flame-sanitize.XXXXXX)}
mkdir -p "$logs"

# Sizes of millions take hours where every access is looked at.
large="10000000 or 1000001 or 300000 or 100000 or 50257 or 50000 or 5000 or 4096 or 768"
quick="not ($large or sizes_that_depend or ten_thousand or memory_running_out)"
tests=(
    tests/gpu/test_generated.py tests/gpu/test_flash_attention.py tests/gpu/test_sorting.py
    tests/gpu/test_training.py tests/gpu/runtime/test_raw_kernel.py
)

# Tensors are allocated one by one, so that the sanitizer knows the bounds of each.
export FLAME_CUDA_POOL=0
export PYTHONUNBUFFERED=1 # what a process that was ended had to say is in its output

# NVIDIA's own kernels synchronise in ways that racecheck and initcheck do not follow, and some of
# them crash under racecheck. These words are in their names, and in none of ours.
vendor="cublas|cudnn|cutlass|nvjet|xmma|cask|gemv|splitK|nchw|nhwc|fprop|dgrad|wgrad|implicit_|sm[89]0_"

# run_part TOOL PART PYTEST-ARGUMENTS: one process, whose exit status is kept beside its output.
run_part() {
    local tool=$1 part=$2 name=$1.$2
    shift 2
    rm -f "$logs/$name".*
    local options=(
        --tool "$tool" --target-processes all --error-exitcode 99 --print-level warn
        # Some tests ask for what the driver refuses; that is no fault.
        --report-api-errors no --log-file "$logs/$name.%p.report"
        # For the host's it keeps Python's frames, and with them what a recorded step must let go.
        --show-backtrace device
    )
    case $tool in
        racecheck | initcheck) options+=(--kernel-name-exclude "regex=$vendor") ;;
    esac
    timeout --kill-after=20 "$limit" "$sanitizer" "${options[@]}" \
        "$python" -m pytest -p tests.shards --shard "$part/$jobs" -p no:cacheprovider -v "$@" \
        >"$logs/$name.output" 2>&1
    echo $? >"$logs/$name.status"
}

# tell TOOL PART: a line about what became of it; fails where something is wrong.
tell() {
    local name=$1.$2 status tests errors said
    status=$(cat "$logs/$name.status" 2>/dev/null || echo none)
    tests=$(grep -E '^=+ .* in [0-9.]+s' "$logs/$name.output" | tail -1 | tr -d =)
    errors=$(cat "$logs/$name".*.report 2>/dev/null |
        sed -nE 's/.* SUMMARY: .*\b([0-9]+) errors?\b.*/\1/p' | awk '{n += $1} END {print n + 0}')
    if grep -q ' / 0 selected' "$logs/$name.output"; then
        # The sanitizer takes it for a failure that a program never called CUDA.
        echo "$1 $2/$jobs: ok; no test fell to this part"
        return 0
    fi
    case $status in
        0) said=ok ;;
        99) said="FAILED: the sanitizer found errors" ;;
        124 | 137) said="FAILED: out of time in $(grep '::' "$logs/$name.output" | tail -1)" ;;
        *) said="FAILED: exit status $status" ;;
    esac
    grep -qs SUMMARY "$logs/$name".*.report || [ "${said:0:6}" = FAILED ] ||
        said="FAILED: the sanitizer wrote no report"
    [ "$errors" -eq 0 ] || [ "${said:0:6}" = FAILED ] || said="FAILED: the sanitizer found errors"
    echo "$1 $2/$jobs: $said;${tests:- no test ended; }($errors errors reported)"
    [ "$said" = ok ]
}

failed=0
for tool in $tools; do
    chosen=("$@")
    if [ $# -eq 0 ]; then
        chosen=("${tests[@]}" -k "$quick")
        [ "$tool" != initcheck ] || chosen=("${tests[@]}" -k "$quick and not layouts")
    fi
    begin=$SECONDS
    for part in $(seq "$jobs"); do
        run_part "$tool" "$part" "${chosen[@]}" &
    done
    wait
    for part in $(seq "$jobs"); do
        tell "$tool" "$part" || failed=$((failed + 1))
    done
    echo "$tool: $((SECONDS - begin)) s"
done
echo "Output and reports are in $logs"
if [ "$failed" -gt 0 ]; then
    echo "== $failed parts FAILED" >&2
    exit 1
fi
if ! grep -qE '[1-9][0-9]* passed' "$logs"/*.output; then
    echo "== no test ran; is there a GPU?" >&2
    exit 1
fi
echo "== all is well"
