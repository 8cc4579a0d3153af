#!/bin/sh
# Everything a GPU is needed for, in less than nine minutes on a fresh machine:
# build, tests, sanitizer and benchmark of the operators. Logs and JSON go to
# the folder named by the first argument. Needs torch, nvcc and mmcv's headers.
set -eu
cd "$(dirname "$0")/.."
out=${1:-work_dirs/gpu_check}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" FORCE_CUDA=1
export TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$(nvidia-smi \
  --query-gpu=compute_cap --format=csv,noheader | head -n 1)}"
export MAX_JOBS="${MAX_JOBS:-$(nproc)}"
if [ -z "${CUDA_HOME:-}" ]; then
  # An nvcc on the path may be a wrapper script outside its toolkit.
  CUDA_HOME=$(nvcc --dryrun -c -x cu /dev/null 2>&1 |
    sed -n 's/^#\$ TOP=\(.*\)$/\1/p' | head -n 1)
  export CUDA_HOME
fi

"$python" setup.py build_ext --inplace > "$out/build.log" 2>&1 ||
  { tail -n 30 "$out/build.log"; exit 1; }
failed=0
"$python" -m pytest -q tests/test_ops_cuda.py > "$out/tests.log" 2>&1 || failed=1
tail -n 3 "$out/tests.log"
if command -v compute-sanitizer > /dev/null; then
  # Small cases that between them run every kernel; racecheck is the slower tool.
  attention='(test_attention and dtype2 and (2500 or 196-32-48-98-random))'
  selection='(test_selection_is_exact and dtype2 and False and (196 or 4000))'
  assignment='(test_assignment_is_exact and dtype2 and 48-32)'
  for tool in memcheck racecheck; do
    timeout 100 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" \
      -m pytest -q tests/test_ops_cuda.py -p no:cacheprovider \
      -k "$attention or $selection or $assignment" > "$out/$tool.log" 2>&1 ||
      failed=1
    echo "$tool: $(tail -n 1 "$out/$tool.log")"
  done
fi
"$python" tools/benchmark_op.py --out "$out" --rounds 20 --budget 0.2
exit $failed
