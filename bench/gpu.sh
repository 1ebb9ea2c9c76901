#!/usr/bin/env bash
# One call on a machine with a GPU: build for it, test on it, look for memory errors and races, measure, one table last.
#
#   bench/gpu.sh [--seconds N] OUTDIR [PART...]
#
#   PART: info build fragments test sanitize ops train plan pdl           (the default: these, in this order)
#         simt test_triton test_all tune ops_all train_fp32 compile streams  (by name only: they take longer)
#
# Uses the interpreter in PYTHON (default: .venv's, else python3) and the packages that are there; installs none but
# fastconv itself. Each part's whole output is OUTDIR/<part>.log. Every part has a time limit, the default parts' add up
# to less than the ten minutes that one call may last; --seconds (default 595) limits all parts together, and a part may
# take what is left over when those after it have theirs. A part that fails, runs out of time or finds none left is
# named so in the table, which comes last whatever happened, and makes the exit status 1; the parts after it still run.
#
# Backends are taken in their fixed order (FASTCONV_TUNE=0), unless FASTCONV_TUNE is set or tune is one of the parts
# named: measuring every call at its first use would be compiling Triton kernels for most of the time.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

# Seconds, on 16 cores and one GPU. Estimates: no GPU has run them yet.
declare -A LIMIT=(
  [info]=12 [build]=150 [fragments]=20 [test]=100 [sanitize]=55 [ops]=100 [train]=70 [plan]=55 [pdl]=30
  [simt]=600 [test_triton]=600 [test_all]=600 [tune]=600 [ops_all]=600 [train_fp32]=80 [compile]=600 [streams]=60
)
DEFAULT=(info build fragments test sanitize ops train plan pdl)
BY_NAME=(simt test_triton test_all tune ops_all train_fp32 compile streams)

# Of a log of pytest -v: "<number> <what>" a line. One that was cut off has no summary: then its tests, one by one.
counts_of() {
  if finished "$1"; then
    tail -n 1 "$1" | grep -oE '[0-9]+ (failed|error|passed|skipped)'
  else
    sed -nE 's/^tests\/.* (FAILED|ERROR|PASSED|SKIPPED)( .*)?$/1 \1/p' "$1" | tr '[:upper:]' '[:lower:]'
  fi
}
finished() {
  tail -n 1 "$1" | grep -qE '^=* ?(no tests ran|[0-9]+ [a-z]+).* in [0-9.]+s'
}
sum() { # "<number> <what>" lines
  awk '{ n[$2] += $1 }
    END { printf "%d failed, %d error, %d passed, %d skipped", n["failed"], n["error"], n["passed"], n["skipped"] }'
}

# One pytest process per file, $JOBS side by side; a line per file, then the sum of their counts, also of those so far
# when the time is up. Arguments: of pytest.
tests_by_file() {
  local logs=$out/tests/$part status=0
  mkdir -p "$logs" && rm -f "$logs"/*.log
  trap 'sum_of_files; exit 124' TERM # bash runs it when xargs, which gets the signal too, has ended
  printf '%s\n' "${files[@]}" | xargs -P "${JOBS:-12}" -I{} bash -c '
    file=$1 log=$2/$(basename "$1" .py).log; shift 2
    "$PYTHON" -m pytest -v -p no:cacheprovider --maxfail=20 "$@" "$file" >"$log" 2>&1
    code=$?
    [ $code -eq 5 ] && code=0  # nothing of this file is selected
    echo "$file: $(tail -n 1 "$log")"
    [ $code -eq 0 ] || tail -n 40 "$log"
    exit $code' _ {} "$logs" "$@" || status=1
  sum_of_files
  return $status
}
sum_of_files() {
  local log ended=0
  for log in "$logs"/*.log; do
    [ -e "$log" ] || return # ended before the first
    if finished "$log"; then ended=$((ended + 1)); else echo "$log was cut off: $(tail -n 1 "$log")"; fi
  done
  for log in "$logs"/*.log; do counts_of "$log"; done | sum
  [ $ended -eq ${#files[@]} ] && echo ", ${#files[@]} files" || echo ", $ended of ${#files[@]} files"
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

# The tests of the backend cuda: the operator suite and what is written for it alone. Only files that have some, for it
# takes longer to start Python than to run most files' tests; the largest first.
part_test() {
  local files
  mapfile -t files < <(grep -lE 'cuda|\b(backend|kernels|planner)[,)]' tests/test_*.py |
    grep -vE '_triton_|_training_program.py|_packaging.py|_gpu_script.py' | xargs ls -S)
  tests_by_file -k "cuda and not triton"
}

# As many again, and Triton compiles its kernels for most of them.
part_test_triton() {
  local files
  mapfile -t files < <(grep -lE 'triton|\bbackend[,)]' tests/test_*.py |
    grep -vE '_triton_interpreter.py|_triton_compile.py|_packaging.py|_gpu_script.py' | xargs ls -S)
  tests_by_file -k triton
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
  local tool code status=0 files uncached tools=(memcheck racecheck initcheck synccheck)
  local -A running=()
  command -v compute-sanitizer || return 1
  mapfile -t files < <(grep -l 'mark.sanitize' tests/test_*.py)
  trap 'sum_of_tools; exit 124' TERM
  for tool in "${tools[@]}"; do
    uncached=()
    # In PyTorch's cache of memory a read past a tensor's end hits another's, and old bytes pass for initialised ones.
    case $tool in memcheck | initcheck) uncached=(PYTORCH_NO_CUDA_MEMORY_CACHING=1) ;; esac
    env "${uncached[@]}" compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
      "$PYTHON" -m pytest -v -p no:cacheprovider -m sanitize -k "cuda and not simt" "${files[@]}" \
      >"$out/sanitize-$tool.log" 2>&1 &
    running[$tool]=$!
  done
  for tool in "${tools[@]}"; do
    wait "${running[$tool]}"
    code=$?
    echo "== $tool: exit status $code"
    tail -n 5 "$out/sanitize-$tool.log"
    [ $code -eq 0 ] || status=1
  done
  sum_of_tools
  return $status
}
sum_of_tools() {
  for tool in "${tools[@]}"; do
    grep -sE 'ERROR SUMMARY|RACECHECK SUMMARY' "$out/sanitize-$tool.log" | sed "s/^=*/$tool:/"
  done
  for tool in "${tools[@]}"; do
    printf '%s%s %d' "$([ "$tool" = "${tools[0]}" ] || echo ', ')" "$tool" \
      "$(grep -scE '^tests/.* PASSED( |$)' "$out/sanitize-$tool.log")"
  done
  echo ' passed'
}

# 800 tiles of the convolutions, compiled one after another; it keeps each measurement, and a second run goes on there.
part_tune() {
  "$PYTHON" -m fastconv tune --model resnet50 --batch-size 128 --image-size 32 --device cuda --mode train \
    --output "$out/tune.md"
}

# Operators against their peers; the rows and pictures are kept. The short subjects first, what they leave is conv's.
part_ops() {
  "$PYTHON" bench/all.py --device cuda --out "$out/bench" --only pooling cross_entropy batch_norm conv --quick \
    --dtype bf16 --minutes "$(minutes)"
}
part_ops_all() {
  "$PYTHON" bench/all.py --device cuda --out "$out/bench" --minutes "$(minutes)"
}
minutes() { # of this part, less what the page takes
  awk -v limit="$limit" 'BEGIN { print (limit > 10 ? limit - 5 : limit) / 60 }'
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

# Batch sizes and steps: 40 to warm up, then more than the six pairs of blocks that a verdict needs. A block ends after
# 20 steps, and with an epoch, which has 16 at batch 128 and 4 at 512.
TRAIN=("4 200" "128 200" "512 100")
train() { # precision
  local run batch steps status=0
  for run in "${TRAIN[@]}"; do
    read -r batch steps <<<"$run"
    "$PYTHON" bench/train_cifar10.py --backend compare --dataset synthetic --precision "$1" --batch-size "$batch" \
      --max-steps "$steps" --device cuda --report "$out/train_${1}_$batch" || status=1
  done
  return $status
}
part_train() {
  train bf16
}
part_train_fp32() {
  train fp32
}

# Training step and inference as plans, beside the eager path's and stock's.
part_plan() {
  local status=0
  "$PYTHON" bench/train_step.py --device cuda --out "$out/bench_plan" --dtype bf16 --batch 4 128 --quick || status=1
  "$PYTHON" bench/inference.py --device cuda --out "$out/bench_plan" --dtype bf16 --batch 1 64 --quick || status=1
  "$PYTHON" bench/page.py "$out/bench_plan" || status=1
  return $status
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
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
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
  part=$2 limit=$3
  "part_$part"
  exit
fi
[ $# -gt 0 ] || set -- "${DEFAULT[@]}"
for part in "$@"; do
  if [ -z "${LIMIT[$part]:-}" ]; then
    echo "bench/gpu.sh: no part named $part (${DEFAULT[*]} ${BY_NAME[*]})" >&2
    exit 2
  fi
done
[[ " $* " = *" tune "* ]] || export FASTCONV_TUNE=${FASTCONV_TUNE-0}

failed=0 table=""
finish() {
  [ -z "$table" ] || printf '%s' "$table" | tee "$out/table.txt"
}
trap finish EXIT
trap 'failed=1; exit 1' INT TERM HUP
row() { # part, result, seconds, text
  table+=$(printf '%-10s %-11s %5d s  %s' "$1" "$2" "$3" "$4")$'\n'
}
wanted=0
for part in "$@"; do wanted=$((wanted + LIMIT[$part])); done
for part in "$@"; do
  wanted=$((wanted - LIMIT[$part])) # by the parts after this one
  limit=$((seconds - SECONDS - wanted))
  [ $limit -lt "${LIMIT[$part]}" ] && limit=${LIMIT[$part]}
  [ $((seconds - SECONDS)) -lt $limit ] && limit=$((seconds - SECONDS))
  if [ "$limit" -le 0 ]; then
    row "$part" "no time" 0 "" && failed=1
    continue
  fi
  start=$SECONDS
  # In the background, so that a signal to this script is heard at once and the table still comes.
  timeout --kill-after=3 "$limit" bash bench/gpu.sh "$out" --one "$part" "$limit" >"$out/$part.log" 2>&1 &
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
