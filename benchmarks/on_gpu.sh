#!/usr/bin/env bash
# Everything that needs a GPU:  benchmarks/on_gpu.sh RESULTS_DIR [STEP...]
# Steps: cuda_tests sanitizer neuron train_step vgg5_cifar10 (this one with LASNN_SJ_DATA); all by default.
# Logs and CSVs go to RESULTS_DIR. Needs the library's dependencies, CuPy, pytest and hypothesis; where no
# package index can be reached, WHEELS names a folder of wheels for what is missing (not torch or CuPy).
set -uo pipefail
out=${1:?usage: benchmarks/on_gpu.sh RESULTS_DIR [STEP...]}
shift
mkdir -p "$out"
out=$(cd "$out" && pwd)
wheels=${WHEELS:+$(cd "$WHEELS" && pwd)}
wanted=" $* "
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
failed=0

step() {  # step NAME SECONDS COMMAND...: one part, its log, and whether it went well
    local name=$1 limit=$2
    shift 2
    [[ $wanted = "  " || $wanted = *" ${name%%:*} "* ]] || return 0
    name=${name//:/_}
    echo "== $name"
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    local code=$?
    tail -n 4 "$out/$name.log"
    [ "$code" = 0 ] || { echo "   $name ended with $code"; failed=1; }
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/gpu.csv"
if [ -n "$wheels" ]; then
    site=$(mktemp -d)
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl || exit 1
    export PYTHONPATH="$PYTHONPATH:$site"
fi
"$python" - <<'END' || exit 1
import importlib.util, sys
needed = "cupy hypothesis matplotlib numba pytest safetensors sklearn spikingjelly tensorboard torch torchmetrics"
missing = [n for n in (needed + " torchvision tqdm tyro").split() if importlib.util.find_spec(n) is None]
if missing:
    sys.exit(f"missing Python packages: {' '.join(missing)}")
import torch
from lasnn_sj import neurons
print(torch.__version__, neurons.backend("cuda"))
sys.exit(not torch.cuda.is_available() or neurons.backend("cuda").name != "cupy")
END

step cuda_tests 400 "$python" -m pytest tests/neurons/test_cuda.py tests/neurons/test_op.py -p no:cacheprovider
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck; do
        # without torch's cache of memory, so that each tensor's end is seen
        step "sanitizer:$tool" 400 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$python" -m pytest tests/neurons/test_cuda.py -k device -x -p no:cacheprovider
    done
else
    echo "== compute-sanitizer is not installed: not run" | tee "$out/sanitizer.log"
fi
step neuron 400 "$python" benchmarks/neuron.py --device cuda --dtypes float32 bfloat16 --runs 21
step train_step 580 "$python" benchmarks/train_step.py --device cuda --width 1 --runs 11 --T 25 50 100 200
[ -z "${LASNN_SJ_DATA:-}" ] || step vgg5_cifar10 1200 "$python" examples/lasnn_cifar10.py paper --device cuda \
    --source "$LASNN_SJ_DATA/cifar10.npz" --run-dir "$out/vgg5" --recipe.teacher-epochs 15 \
    --recipe.teacher-lr 0.1 --recipe.ann-epochs 20 --recipe.ann-lr 0.05 --recipe.epochs 2 --recipe.batch 64
cp benchmarks/results/*_cuda.* "$out" 2>/dev/null
exit $failed
