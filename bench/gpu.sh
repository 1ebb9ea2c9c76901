#!/usr/bin/env bash
# One call on a machine with a GPU: build for it, test on it, look for memory errors and races, measure, one table last.
#
#   bench/gpu.sh OUTDIR [PART...]      PART: info build fragments test sanitize tune ops train
#                                      (default: all, in this order)
#
# Uses the interpreter in PYTHON (default: .venv's, else python3) and the packages that are there; installs none but
# fastconv itself. Each part's whole output is OUTDIR/<part>.log; a part that fails is named in the table at the end
# and makes the exit status 1, and the parts after it still run. The parts' time limits add up to 26 minutes and more:
# where one call may last ten, name the parts that fit.
set -uo pipefail
cd "$(dirname "$0")/.."

if [ $# -lt 1 ]; then
  sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
shift
[ $# -gt 0 ] || set -- info build fragments test sanitize tune ops train
[ -n "${PYTHON:-}" ] || PYTHON=$([ -x .venv/bin/python ] && echo "$PWD/.venv/bin/python" || echo python3)
export PYTHONUNBUFFERED=1
# tune measures into it, ops and train read it: nothing that was measured before this run counts.
export FASTCONV_CACHE_DIR=$out/measurements

part_info() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv
  git rev-parse HEAD
  "$PYTHON" -m torch.utils.collect_env
}

part_build() {
  FASTCONV_CUDA=${FASTCONV_CUDA:-1} "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps -e . &&
    "$PYTHON" -m fastconv info
}

# The layouts of mma.sync and ldmatrix that the kernels rely on, on this GPU.
part_fragments() {
  local nvcc
  nvcc=$("$PYTHON" -c 'import setup; print(setup.find_cuda_home() / "bin" / "nvcc")') &&
    "$nvcc" -std=c++17 -diag-suppress 20050 -arch=native -I csrc/cuda/kernels -I tests/simt tests/simt/fragments.cu -o "$out/fragments" &&
    "$out/fragments"
}

part_test() {
  timeout 300 "$PYTHON" -m pytest -q -x --maxfail=20 tests
}

part_sanitize() {
  local tool status=0
  command -v compute-sanitizer || return 1
  for tool in memcheck racecheck initcheck synccheck; do
    echo "== $tool"
    timeout 120 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
      "$PYTHON" -m pytest -q -m sanitize -k "not simt" tests || status=1
  done
  return $status
}

part_tune() {
  timeout 300 "$PYTHON" -m fastconv tune --model resnet50 --batch-size 128 --image-size 32 --device cuda \
    --output "$out/tune.md"
}

# Every operator against its peers; the rows and pictures are kept, the table is printed last.
part_ops() {
  timeout 150 "$PYTHON" bench/all.py --device cuda --out "$out/bench" --only conv batch_norm pooling cross_entropy \
    --minutes 2.3
}

part_train() {
  local precision batch status=0
  for precision in bf16 fp32; do
    for batch in 4 128 512; do
      timeout 60 "$PYTHON" bench/train_cifar10.py --backend compare --dataset synthetic --precision "$precision" \
        --batch-size "$batch" --max-steps 100 --device cuda --report "$out/train_${precision}_$batch" || status=1
    done
  done
  return $status
}

failed=0
table=""
for part in "$@"; do
  if ! declare -F "part_$part" >/dev/null; then
    echo "bench/gpu.sh: no part named $part (info build fragments test sanitize tune ops train)" >&2
    exit 2
  fi
  start=$SECONDS
  if "part_$part" >"$out/$part.log" 2>&1; then result=ok; else result=FAILED failed=1; fi
  table+=$(printf '%-10s %-7s %5d s  %s' "$part" "$result" $((SECONDS - start)) "$(tail -n 1 "$out/$part.log" | cut -c1-90)")$'\n'
done
printf '%s' "$table" | tee "$out/table.txt"
exit $failed
