#!/usr/bin/env bash
# Run what needs a GPU, in parts with a time limit each:  benchmarks/on_gpu.sh first|train|more OUT
#
#   first  3 minutes   tests of kernels and recorded steps, a layer of neurons, training steps, memcheck
#   train  7 minutes   stage 3 of 3Conv2Linear on CIFAR-10 (stage3.py); needs DATA
#   more   10 minutes  more training steps and tests, compute-sanitizer on all kernel tests
#
# Logs, CSVs and weights go to OUT, a few files. A step that fails or overruns is stopped, keeps what it wrote and
# lets the next one run; the exit status is then 1. See benchmarks/README.md for the calls. Environment:
#   DEVICE=cpu   rehearse the part at toy size, in seconds
#   DATA         folder with CIFAR-10 and the teacher, see stage3.py
#   WHEELS       folder of wheels for packages that are missing (not torch or CuPy)
#   LIMIT        seconds of the whole part, instead of its own
set -uo pipefail
part=${1:-}
out=${2:-}
device=${DEVICE:-cuda}
case $part in
    first) limit=175 ;;
    train) limit=415 ;;
    more) limit=590 ;;
    *) echo "usage: benchmarks/on_gpu.sh first|train|more OUT" >&2; exit 2 ;;
esac
[ -n "$out" ] || { echo "OUT is missing: benchmarks/on_gpu.sh $part OUT" >&2; exit 2; }
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
data=${DATA:+$(cd "$DATA" && pwd)} || exit 2
[ "$part" != train ] || [ -n "$data" ] || { echo "DATA must name the folder with CIFAR-10" >&2; exit 2; }
wheels=${WHEELS:+$(cd "$WHEELS" && pwd)} || exit 2
[ "$device" = cuda ] || limit=600
limit=${LIMIT:-$limit}
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 RESULTS_DIR="$out"
log=$out/$part.log
failed=0
: >"$log"

say() { echo "$*" | tee -a "$log"; }

step() {  # step NAME SECONDS COMMAND...: at most so long, and no longer than the part may still take
    local name=$1 seconds=$2 left=$((limit - SECONDS))
    shift 2
    [ "$device" = cuda ] || seconds=$left
    [ "$left" -ge 2 ] || { say "== $name: no time left"; failed=1; return; }
    say "== $name"
    local begun=$SECONDS
    timeout -k 5 "$((seconds < left ? seconds : left))" "$@" 2>&1 | tee -a "$log" | tail -n 40
    local code=${PIPESTATUS[0]}
    say "   $name: status $code after $((SECONDS - begun)) s"
    [ "$code" = 0 ] || failed=1
}

if [ -n "$wheels" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl || exit 2
    export PYTHONPATH="$PYTHONPATH:$site"
fi
[ "$device" = cpu ] || nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee -a "$log"
"$python" - "$device" 2>&1 <<'END' | tee -a "$log"
import importlib.util, sys
device = sys.argv[1]
needed = "hypothesis matplotlib numba pytest safetensors sklearn spikingjelly tensorboard torch torchmetrics"
needed = [*needed.split(), "torchvision", "tqdm", "tyro", *(["cupy"] if device == "cuda" else [])]
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"missing Python packages: {' '.join(missing)}")
import torch
if device == "cuda" and not torch.cuda.is_available():
    sys.exit("no CUDA device; DEVICE=cpu rehearses this part at toy size")
from lasnn_sj import neurons
print(torch.__version__, neurons.backend(device))
sys.exit(device == "cuda" and neurons.backend(device).name != "cupy")
END
[ "${PIPESTATUS[0]}" = 0 ] || exit 2

pytest=("$python" -m pytest -p no:cacheprovider)
kernels=(tests/neurons/test_cuda.py -k device)
graph=(tests/training/test_graph.py -k "cuda or synchronises")
few=(tests/neurons/test_cuda.py -k "device and (no_neurons or layouts or every_size)")
toy=() parallel=()
if [ "$device" = cpu ]; then
    kernels=(tests/neurons/test_cuda.py -k width_keeps)
    graph=(tests/training/test_graph.py -k "stand-in-hybrid-True or synchronises")
    few=("${kernels[@]}")
    toy=(--width 0.05 --T 2 --batch 2 --runs 1 --no-memory)
elif "$python" -c "import xdist" 2>/dev/null; then
    parallel=(-n 8)  # the tests compile some 200 kernels
fi
have_sanitizer=$(command -v compute-sanitizer)

sanitize() {  # sanitize TOOL SECONDS TESTS...
    local tool=$1 seconds=$2
    shift 2
    [ -n "$have_sanitizer" ] || { say "== $tool: compute-sanitizer is not installed, not run"; return; }
    # without torch's cache of memory, so that each tensor's end is seen
    step "$tool" "$seconds" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool "$tool" --error-exitcode 9 "${pytest[@]}" "$@" -x
}

case $part in
    first)
        step kernels 60 "${pytest[@]}" "${parallel[@]}" "${kernels[@]}"
        step graph 40 "${pytest[@]}" "${parallel[@]}" "${graph[@]}" --show-capture=no
        if [ "$device" = cuda ]; then
            step neuron 40 "$python" benchmarks/neuron.py --device cuda --dtypes float32 bfloat16 --runs 11
            step train_step 90 "$python" benchmarks/train_step.py --device cuda --width 1 --runs 5 \
                --networks conv3_linear2 vgg5 vgg9 --batch 16 64 --precision float32 bfloat16 \
                --compile no graph --no-gradient
        else
            step neuron 40 "$python" benchmarks/neuron.py --sizes 4x100 --runs 1
            step train_step 90 "$python" benchmarks/train_step.py "${toy[@]}" --networks conv3_linear2 \
                --no-gradient
        fi
        sanitize memcheck 60 "${few[@]}"
        ;;
    train)
        minutes=$("$python" -c "print(($limit - $SECONDS - 20) / 60)")
        if [ "$device" = cuda ]; then
            step stage3 "$limit" "$python" benchmarks/stage3.py --data "$data" --out "$out" \
                --minutes "$minutes" --compile graph
        else
            step stage3 "$limit" "$python" benchmarks/stage3.py --data "$data" --out "$out" --device cpu \
                --minutes "$minutes" --T 2 --batch 8 --images 16 --test-images 8 --calibration-steps 20 \
                --most-epochs 2
        fi
        ;;
    more)
        if [ "$device" = cuda ]; then
            step train_step 240 "$python" benchmarks/train_step.py --device cuda --width 1 --runs 7 \
                --networks vgg5 vgg9 --T 25 50 100 200
        else
            step train_step 240 "$python" benchmarks/train_step.py "${toy[@]}" --networks vgg5
        fi
        sanitize racecheck 120 "${few[@]}"
        sanitize memcheck 200 "${kernels[@]}"
        sanitize initcheck 120 "${few[@]}"
        ;;
esac
exit $failed
