#!/usr/bin/env bash
# One call on a machine with a GPU: build for it, test on it, look for memory errors and races, measure, one table last.
#
#   bench/gpu.sh [--seconds N] OUTDIR [PART...]
#
#   PART: info build fragments test sanitize tune ops train plan pdl   (the default: these, in this order)
#         simt test_all ops_all train_fp32 compile streams        (by name only: they take longer)
#
# Uses the interpreter in PYTHON (default: .venv's, else python3) and the packages that are there; installs none but
# fastconv itself. Each part's whole output is OUTDIR/<part>.log. Every part has a time limit, the default parts' add up
# to less than the ten minutes that one call may last; --seconds (default 595) limits all parts together. A part that
# fails, runs out of time or finds none left is named so in the table, which comes last whatever happened, and makes the
# exit status 1; the parts after it still run.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

# Seconds, on 16 cores and one GPU. Estimates: no GPU has run them yet.
declare -A LIMIT=(
  [info]=15 [build]=150 [fragments]=20 [test]=100 [sanitize]=75 [tune]=50 [ops]=60 [train]=55 [plan]=40 [pdl]=30
  [simt]=600 [test_all]=600 [ops_all]=600 [train_fp32]=60 [compile]=600 [streams]=60
)
DEFAULT=(info build fragments test sanitize tune ops train plan pdl)

# One pytest process per file, $JOBS side by side; a line per file, then the sum of their counts. Arguments: of pytest.
tests_by_file() {
  local logs=$out/tests status=0
  mkdir -p "$logs" && rm -f "$logs"/*.log
  printf '%s\n' "${files[@]}" | xargs -P "${JOBS:-8}" -I{} bash -c '
    file=$1 log=$2/$(basename "$1" .py).log; shift 2
    "$PYTHON" -m pytest -q -p no:cacheprovider --maxfail=20 "$@" "$file" >"$log" 2>&1
    code=$?
    [ $code -eq 5 ] && code=0  # nothing of this file is selected
    echo "$file: $(tail -n 1 "$log")"
    [ $code -eq 0 ] || tail -n 40 "$log"
    exit $code' _ {} "$logs" "$@" || status=1
  for what in failed error passed skipped; do
    printf '%s %s, ' "$(cat "$logs"/*.log | grep -E '^=* ?[0-9].* in [0-9.]+s' | grep -oE "[0-9]+ $what" |
      awk '{ n += $1 } END { print n + 0 }')" "$what"
  done
  echo "${#files[@]} files"
  return $status
}

part_info() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv
  git rev-parse HEAD
  "$PYTHON" -m torch.utils.collect_env
}

part_build() {
  FASTCONV_CUDA=${FASTCONV_CUDA:-1} MAX_JOBS=${MAX_JOBS:-16} \
    "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps -e . &&
    "$PYTHON" -m fastconv info --kernels &&
    "$PYTHON" -c 'from fastconv import _ext; print("built for", _ext.build_info()["archs"])'
}

# The layouts of mma.sync and ldmatrix that the kernels rely on, on this GPU.
part_fragments() {
  local nvcc
  nvcc=$("$PYTHON" -c 'import setup; print(setup.find_cuda_home() / "bin" / "nvcc")') &&
    "$nvcc" -std=c++17 -diag-suppress 20050 -arch=native -I csrc/cuda/kernels -I tests/simt tests/simt/fragments.cu -o "$out/fragments" &&
    "$out/fragments"
}

# Every test of the backends cuda and triton: the operator suite, and what is written for them alone.
part_test() {
  local files=()
  for file in tests/test_*.py; do
    case $file in
      *_triton_interpreter.py | *_triton_compile.py | *_training_program.py | *_packaging.py) ;;  # need no GPU
      *) files+=("$file") ;;
    esac
  done
  tests_by_file -k "cuda or triton"
}

part_test_all() {
  local files=(tests/test_*.py tests/simt/test_*.py)
  tests_by_file
}

part_simt() {
  local files=(tests/test_*.py)
  tests_by_file -k simt
}

part_sanitize() {
  local tool status=0
  local -A running=()
  command -v compute-sanitizer || return 1
  for tool in memcheck racecheck initcheck synccheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
      "$PYTHON" -m pytest -q -p no:cacheprovider -m sanitize -k "not simt" tests >"$out/sanitize-$tool.log" 2>&1 &
    running[$tool]=$!
  done
  for tool in "${!running[@]}"; do
    wait "${running[$tool]}"
    local code=$?
    echo "== $tool: exit status $code"
    tail -n 5 "$out/sanitize-$tool.log"
    [ $code -eq 0 ] || status=1
  done
  return $status
}

part_tune() {
  "$PYTHON" -m fastconv tune --model resnet50 --batch-size 128 --image-size 32 --device cuda --mode train \
    --output "$out/tune.md"
}

# Operators against their peers; the rows and pictures are kept.
part_ops() {
  "$PYTHON" bench/all.py --device cuda --out "$out/bench" --only conv batch_norm pooling cross_entropy --quick \
    --minutes 1
}
part_ops_all() {
  "$PYTHON" bench/all.py --device cuda --out "$out/bench" --minutes 9.5
}

# Whole networks against torch.compile in every mode; the rows lie beside those of ops_all, which has other peers.
part_compile() {
  local modes=(default reduce-overhead max-autotune) status=0
  "$PYTHON" bench/train_step.py --device cuda --out "$out/bench_compile" --dtype bf16 --batch 4 128 1024 \
    --compile "${modes[@]}" || status=1
  "$PYTHON" bench/inference.py --device cuda --out "$out/bench_compile" --dtype bf16 --batch 1 128 \
    --compile "${modes[@]}" || status=1
  "$PYTHON" bench/page.py "$out/bench_compile" || status=1
  return $status
}

train() { # precision, batch
  "$PYTHON" bench/train_cifar10.py --backend compare --dataset synthetic --precision "$1" --batch-size "$2" \
    --max-steps 50 --device cuda --report "$out/train_${1}_$2"
}
part_train() {
  local batch status=0
  for batch in 4 128 512; do train bf16 "$batch" || status=1; done
  return $status
}
part_train_fp32() {
  local batch status=0
  for batch in 4 128 512; do train fp32 "$batch" || status=1; done
  return $status
}

# Training step and inference as plans, beside the eager path's and stock's.
part_plan() {
  "$PYTHON" bench/train_step.py --device cuda --out "$out/bench_plan" --dtype bf16 --batch 4 128 --quick &&
    "$PYTHON" bench/inference.py --device cuda --out "$out/bench_plan" --dtype bf16 --batch 1 64 --quick &&
    "$PYTHON" bench/page.py "$out/bench_plan"
}

# Programmatic dependent launch: the same training step of the cuda backend without and with it.
part_pdl() {
  local pdl status=0
  for pdl in 0 1; do
    FASTCONV_TUNE=0 FASTCONV_PDL=$pdl "$PYTHON" bench/train_cifar10.py --backend fastconv --dataset synthetic \
      --precision bf16 --batch-size 4 --max-steps 100 --device cuda --report "$out/pdl_$pdl" || status=1
  done
  return $status
}

# The planned training step with its weight gradients on a second stream and without; rows beside those of stock's graph.
part_streams() {
  local streams status=0
  for streams in 1 2; do
    FASTCONV_STREAMS=$streams "$PYTHON" bench/train_step.py --device cuda --out "$out/streams_$streams" --dtype bf16 \
      --batch 4 128 --quick || status=1
  done
  return $status
}

usage() {
  sed -n '2,15s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

seconds=595
if [ "${1:-}" = --seconds ]; then
  [[ "${2:-}" =~ ^[0-9]+$ ]] || usage
  seconds=$2
  shift 2
fi
[ $# -ge 1 ] || usage
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
shift
[ -n "${PYTHON:-}" ] || PYTHON=$([ -x .venv/bin/python ] && echo "$PWD/.venv/bin/python" || echo python3)
export PYTHON PYTHONUNBUFFERED=1
# tune measures into it, ops and train read it: nothing that was measured before this run counts.
export FASTCONV_CACHE_DIR=$out/measurements

if [ "${1:-}" = --one ]; then # this script for one part, under its time limit
  "part_$2"
  exit
fi
[ $# -gt 0 ] || set -- "${DEFAULT[@]}"
for part in "$@"; do
  if [ -z "${LIMIT[$part]:-}" ]; then
    echo "bench/gpu.sh: no part named $part (${DEFAULT[*]} simt test_all ops_all train_fp32 compile streams)" >&2
    exit 2
  fi
done

failed=0 table=""
finish() {
  [ -z "$table" ] || printf '%s' "$table" | tee "$out/table.txt"
}
trap finish EXIT
trap 'failed=1; exit 1' INT TERM HUP
row() { # part, result, seconds, text
  table+=$(printf '%-10s %-11s %5d s  %s' "$1" "$2" "$3" "$4")$'\n'
}
for part in "$@"; do
  limit=${LIMIT[$part]}
  [ $((seconds - SECONDS)) -lt "$limit" ] && limit=$((seconds - SECONDS))
  if [ "$limit" -le 0 ]; then
    row "$part" "no time" 0 "" && failed=1
    continue
  fi
  start=$SECONDS
  # In the background, so that a signal to this script is heard at once and the table still comes.
  timeout --kill-after=3 "$limit" bash bench/gpu.sh "$out" --one "$part" >"$out/$part.log" 2>&1 &
  child=$!
  trap 'failed=1; kill "$child" 2>/dev/null; row "$part" interrupted $((SECONDS - start)) ""; exit 1' INT TERM HUP
  wait "$child"
  case $? in
    0) result=ok ;;
    124 | 137) result="out of time" failed=1 ;;
    *) result=FAILED failed=1 ;;
  esac
  row "$part" "$result" $((SECONDS - start)) "$(tail -n 1 "$out/$part.log" | tr -d '\r' | cut -c1-90)"
done
exit $failed
