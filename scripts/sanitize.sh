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
They run after a tool has found a fault that is planted for it (tests/gpu/planted_faults.py).
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
# Kernels of cuDNN's that these run crash under racecheck, even where it is to look at no kernel.
crash="convolution_input_gradient or convolution_weight_gradient"
tests=(
    tests/gpu/test_generated.py tests/gpu/test_flash_attention.py tests/gpu/test_sorting.py
    tests/gpu/test_training.py tests/gpu/runtime/test_raw_kernel.py
)

# Tensors are allocated one by one, so that the sanitizer knows the bounds of each.
export FLAME_CUDA_POOL=0
export PYTHONUNBUFFERED=1 # what a process that was ended had to say is in its output

# our_kernels: a regular expression for the names of FLAME's kernels and of the tests' own: generated
# ones, those in texts, and those that `raw_op` makes to call them. The tool searches mangled names,
# and these are not mangled, so that the ends keep names that hold one of ours out.
our_kernels() {
    local names
    names=$(find flame/kernels tests/gpu \( -name '*.cu' -o -name '*.py' \) -exec cat {} + |
        tr '\n' ' ' | grep -oE '__global__[^(){};]*(__launch_bounds__ *\([^()]*\)[^(){};]*)?\(' |
        sed -E 's/[ (]+$//; s/.*[^A-Za-z0-9_]//' | sort -u | paste -sd '|')
    echo "^(flame_.*|($names)(_called)?)$"
}
ours=$(our_kernels)

# under TOOL NAME SECONDS COMMAND ...: runs it under the tool. Its output and exit status and the
# tool's reports are kept in files that begin with NAME.
under() {
    local tool=$1 name=$2 seconds=$3
    shift 3
    rm -f "$logs/$name".*
    local options=(
        --tool "$tool" --target-processes all --error-exitcode 99 --print-level warn
        # Some tests ask for what the driver refuses; that is no fault.
        --report-api-errors no --log-file "$logs/$name.%p.report"
        # For the host's it keeps Python's frames, and with them what a recorded step must let go.
        --show-backtrace device
    )
    case $tool in
        # NVIDIA's own kernels synchronise in ways that these two do not follow, and no list of
        # words knows the names of all of them.
        racecheck | initcheck) options+=(--kernel-name "regex=$ours") ;;
    esac
    timeout --kill-after=20 "$seconds" "$sanitizer" "${options[@]}" "$@" \
        >"$logs/$name.output" 2>&1
    echo $? >"$logs/$name.status"
}

# errors_of NAME: how many errors its reports count.
errors_of() {
    cat "$logs/$1".*.report 2>/dev/null |
        sed -nE 's/.* SUMMARY: .*\b([0-9]+) errors?\b.*/\1/p' | awk '{n += $1} END {print n + 0}'
}

# finds_what_is_planted TOOL: fails, and says so, where the tool does not find a fault that is there;
# that it finds none in the tests would then mean nothing.
finds_what_is_planted() {
    local name=$1.planted errors
    under "$1" "$name" 120 "$python" -m tests.gpu.planted_faults "$1"
    errors=$(errors_of "$name")
    if [ "$errors" -eq 0 ] || ! grep -q "at planted_$1" "$logs/$name".*.report; then
        echo "$1: FAILED: it does not find the fault that is planted for it;" \
            "exit status $(cat "$logs/$name.status"); $(tail -n 1 "$logs/$name.output")"
        return 1
    fi
    echo "$1: finds the fault that is planted for it ($errors errors reported)"
}

# run_part TOOL PART PYTEST-ARGUMENTS: one process.
run_part() {
    local tool=$1 part=$2
    shift 2
    under "$tool" "$tool.$part" "$limit" \
        "$python" -m pytest -p tests.shards --shard "$part/$jobs" -p no:cacheprovider -v "$@"
}

# tell TOOL PART: a line about what became of it; fails where something is wrong.
tell() {
    local name=$1.$2 status tests errors said
    status=$(cat "$logs/$name.status" 2>/dev/null || echo none)
    tests=$(grep -E '^=+ .* in [0-9.]+s' "$logs/$name.output" | tail -1 | tr -d =)
    errors=$(errors_of "$name")
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
    if ! finds_what_is_planted "$tool"; then
        failed=$((failed + 1))
        continue
    fi
    chosen=("$@")
    if [ $# -eq 0 ]; then
        chosen=("${tests[@]}" -k "$quick")
        case $tool in
            racecheck) chosen=("${tests[@]}" -k "$quick and not ($crash)") ;;
            initcheck) chosen=("${tests[@]}" -k "$quick and not layouts") ;;
        esac
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
