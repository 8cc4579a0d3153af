#!/usr/bin/env bash
# The extension for 64-bit ARM: cross-compiled, and its tests under qemu-user.
#
# On Debian 12 with g++-aarch64-linux-gnu, qemu-user and uv, where mmcv is installed for
# $PYTHON: fetches an ARM Python from Debian and an ARM torch from PyPI into a folder,
# compiles the portable kernels against them and runs tests of the CPU kernels. Emulated,
# all of them take hours, so without arguments it is those of the small sizes, which run
# every kernel in every type; arguments go to pytest in their place.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=$PWD/build/aarch64
root=$folder/root site=$folder/site package=$folder/package
mmcv=$("${PYTHON:-python}" -c 'import importlib.util as u; print(u.find_spec("mmcv").submodule_search_locations[0])')

if [[ ! -d $root ]]; then
  mkdir -p "$folder"/{debs,lists/partial,cache/archives/partial}
  arm=(-o APT::Architecture=arm64 -o APT::Architectures=arm64
    -o Dir::State::Lists="$folder/lists" -o Dir::Cache="$folder/cache"
    -o Dir::State::status=/dev/null)
  apt-get "${arm[@]}" update
  (cd "$folder/debs" && apt-get "${arm[@]}" download libc6 libgcc-s1 libstdc++6 libgomp1 \
    {python3.11,libpython3.11}-minimal libpython3.11-{stdlib,dev} libexpat1 zlib1g \
    libssl3 libffi8 libbz2-1.0 liblzma5 libsqlite3-0 libncursesw6 libtinfo6 \
    libreadline8 libuuid1 libcrypt1)
  for file in "$folder"/debs/*.deb; do dpkg -x "$file" "$root.part"; done
  mv "$root.part" "$root"
fi
if [[ ! -d $site ]]; then
  uv pip install --python-platform aarch64-manylinux_2_28 --python-version 3.11 \
    --only-binary :all: --target "$site.part" 'torch==2.8.*' numpy pytest
  mv "$site.part" "$site"
fi

rm -rf "$package"
mkdir -p "$package" "$folder/objects"
cp -r mmdgt "$package"
rm -f "$package"/mmdgt/*.so
objects=()
for source in csrc/*.cpp csrc/cpu/*.cpp; do
  object=$folder/objects/$(basename "$source" .cpp).o
  objects+=("$object")
  echo "aarch64: $source"
  aarch64-linux-gnu-g++ -std=c++17 -O3 -fPIC -fopenmp -Wall -Wno-unknown-pragmas \
    -DTORCH_EXTENSION_NAME=_ext -DTORCH_API_INCLUDE_EXTENSION_H -Icsrc \
    -isystem "$mmcv/ops/csrc/common" -isystem "$site/torch/include" \
    -isystem "$site/torch/include/torch/csrc/api/include" \
    -isystem "$root/usr/include/python3.11" -isystem "$root/usr/include" \
    -c "$source" -o "$object"
done
aarch64-linux-gnu-g++ -shared "${objects[@]}" -L"$site/torch/lib" \
  -lc10 -ltorch_cpu -ltorch -ltorch_python -Wl,--allow-shlib-undefined \
  -o "$package/mmdgt/_ext.cpython-311-aarch64-linux-gnu.so"

tests=("$@")
if ((!${#tests[@]})); then
  large='contiguous or 1531 or 197 or 196 or 77 or 31_elements or gradcheck'
  repeated='one_group and (float64 or float16 or 0.0) or its_parts and None'
  tests=(tests/test_ops_cpu.py tests/test_gelu_batch_norm.py
    -k "not ($large or $repeated)")
fi
PYTHONPATH=$package:$site PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1 \
  qemu-aarch64 -L "$root" "$root/usr/bin/python3.11" -m pytest -q -p no:cacheprovider \
  "${tests[@]}"
