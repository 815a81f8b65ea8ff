#!/usr/bin/env bash
# Everything that needs a GPU, in one run:  benchmarks/on_gpu.sh RESULTS_DIR
# Needs an environment with the library, CuPy, pytest and hypothesis; logs and CSVs go to RESULTS_DIR.
set -uo pipefail
out=${1:?usage: benchmarks/on_gpu.sh RESULTS_DIR}
cd "$(dirname "$0")/.."
mkdir -p "$out"
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
failed=0

step() {  # step NAME SECONDS COMMAND...: one part, its log, and whether it went well
    local name=$1 limit=$2
    shift 2
    echo "== $name"
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    local code=$?
    tail -n 4 "$out/$name.log"
    [ "$code" = 0 ] || { echo "   $name ended with $code"; failed=1; }
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/gpu.csv"
step cuda_tests 240 "$python" -m pytest tests/neurons/test_cuda.py tests/neurons/test_op.py -p no:cacheprovider
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck; do
        step "sanitizer_$tool" 240 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$python" -m pytest tests/neurons/test_cuda.py -k device -x -p no:cacheprovider
    done
else
    echo "== compute-sanitizer is not installed: not run" | tee "$out/sanitizer.log"
fi
step neuron 240 "$python" benchmarks/neuron.py --device cuda --dtypes float32 bfloat16 --runs 21
step train_step 240 "$python" benchmarks/train_step.py --device cuda --width 1 --runs 11 --T 25 50 100 200
[ -z "${LASNN_SJ_DATA:-}" ] || step vgg5_cifar10 1200 "$python" examples/lasnn_cifar10.py paper --device cuda \
    --source "$LASNN_SJ_DATA/cifar10.npz" --run-dir "$out/vgg5" --recipe.teacher-epochs 15 \
    --recipe.teacher-lr 0.1 --recipe.ann-epochs 20 --recipe.ann-lr 0.05 --recipe.epochs 2 --recipe.batch 64
cp benchmarks/results/*_cuda.* "$out" 2>/dev/null
exit $failed
