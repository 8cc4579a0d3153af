#!/bin/sh
# Everything a GPU is needed for, in half an hour and in order of worth: what has been
# measured is in a file, should the machine go away. No step takes longer than it is
# given, and a step that fails keeps only those from running that need it.
#
#   BASE=main tools/gpu_check.sh [FOLDER OF THE RESULTS]
#
# BASE is a git revision, or a folder that holds a checkout: its kernels are timed
# beside those of the working tree. REHEARSE=1 does the same where there is no GPU: both
# take the kernels that `make emulate-build` has made (docs/cuda.md), inputs are small.
# Needs torch, nvcc and mmcv's headers; takes ncu, compute-sanitizer and timm where they
# are.
set -eu
self=$(realpath "$0")
cd "$(dirname "$self")/.."
out=$(realpath -m "${1:-work_dirs/gpu_check}")
base=${BASE:-HEAD}
python=${PYTHON:-python3}
parts='csrc mmdgt configs setup.py pyproject.toml README.md'
export MAX_JOBS="${MAX_JOBS:-$(nproc)}"

# Cases that between them run every kernel, for the sanitizers.
attention='(test_attention and dtype2 and (2500 or 196-32-48-98-random))'
selection='(test_selection_is_exact and dtype2 and False and (196 or 4000))'
assignment='(test_assignment_is_exact and dtype2 and 48-32)'
few='(test_attention_and_gradients and dtype1 and 2-2-196)'
every_kernel="$attention or $selection or $assignment or $few"

if [ "${REHEARSE:-0}" = 1 ]; then
  export MMDGT_EMULATED="$out/candidate" OMP_NUM_THREADS=1
  of_kernels='--device cpu --batch 1 --rounds 2 --budget 0 --sets A3'
  of_networks='--device cpu --sizes 64x64 --batches 1 --rounds 2'
  modes_of_networks='eager'
  exact='nothing_to_do'
  all='nothing_to_do'
else
  export FORCE_CUDA=1
  export TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$(nvidia-smi \
    --query-gpu=compute_cap --format=csv,noheader | head -n 1)}"
  if [ -z "${CUDA_HOME:-}" ]; then
    # An nvcc on the path may be a wrapper script outside its toolkit.
    CUDA_HOME=$(nvcc --dryrun -c -x cu /dev/null 2>&1 |
      sed -n 's/^#\$ TOP=\(.*\)$/\1/p' | head -n 1)
    export CUDA_HOME
  fi
  of_kernels='--sets A3,A,C,B,B3,C3'
  of_networks='--sizes 224x224 --batches 128 --rounds 10'
  modes_of_networks='compiled eager'
  exact='exact or few or hazards'
  all='test'
fi

began=$(date +%s)
failed=0
# step NAME SECONDS COMMAND...: writes NAME.log and says how it ended.
step() {
  name=$1 limit=$2
  shift 2
  code=0
  timeout -k 5 "$limit" "$@" > "$out/$name.log" 2>&1 || code=$?
  [ "$code" = 0 ] || failed=1
  printf '%4d s  %s: %s  %s\n' $(($(date +%s) - began)) "$name" \
    "$([ "$code" = 0 ] && echo done || echo "FAILED ($code)")" \
    "$(tail -n 1 "$out/$name.log" | cut -c 1-150)" | tee -a "$out/steps.log"
  return "$code"
}

build() {
  if [ "${REHEARSE:-0}" = 1 ]; then
    cp build/emulated/mmdgt/_ext*.so "$out/$1/mmdgt"
  else
    cd "$out/$1"
    exec "$python" setup.py -q build_ext --inplace
  fi
}

build_both() {
  build candidate &
  candidate=$!
  if diff -r "$out/base/csrc" "$out/candidate/csrc" > /dev/null; then
    wait "$candidate"
    cp "$out"/candidate/mmdgt/_ext*.so "$out/base/mmdgt"
  else
    (build base)
    wait "$candidate"
  fi
}

# pytest_of EXPRESSION: of the candidate's kernels.
pytest_of() {
  cd "$out/candidate"
  exec "$python" -m pytest -q -p no:cacheprovider --capture=sys \
    tests/test_ops_cuda*.py -k "$1"
}

# timeout starts programs, not functions: this script starts itself.
if [ "${2:-}" ]; then
  shift
  "$@"
  exit
fi

rm -rf "$out"
mkdir -p "$out/base" "$out/candidate"
# shellcheck disable=SC2086
tar -c --exclude='_ext*.so' $parts tests | tar -x -C "$out/candidate"
# shellcheck disable=SC2086
if [ -d "$base" ]; then
  tar -c --exclude='_ext*.so' -C "$base" $parts
else
  git archive "$base" $parts
fi | tar -x -C "$out/base"
own() { step "$1" "$2" sh "$self" "$out" "$3" ${4:+"$4"}; }

own build 420 build_both || { tail -n 30 "$out/build.log"; exit 1; }
export PYTHONPATH="$out/candidate"
own exact 60 pytest_of "$exact" || true
# shellcheck disable=SC2086
step kernels 230 "$python" tools/compare_kernels.py "$out/base" "$out/candidate" \
  --seconds 200 --out "$out/kernels.jsonl" $of_kernels || true
if command -v ncu > /dev/null; then
  step ncu 150 ncu --set detailed --csv --log-file "$out/ncu.csv" \
    --kernel-name 'regex:.*_kernel' "$python" tools/compare_kernels.py --once \
    --sets A3,A,C || true
fi
own tests 240 pytest_of "$all" || true
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck synccheck; do
    step "$tool" 100 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      sh "$self" "$out" pytest_of "$every_kernel" || true
  done
fi
for modes in $modes_of_networks; do
  # shellcheck disable=SC2086
  step "networks_$modes" 180 "$python" tools/benchmark_model.py \
    --models dgt_t,timm_swin_t --modes "$modes" --passes forward,train \
    --dtypes bfloat16 --out "$out" --name "networks_$modes" $of_networks || true
done
exit $failed
