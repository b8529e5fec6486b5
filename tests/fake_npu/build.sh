#!/usr/bin/env bash
# Builds the stand-in NPU plugin against the paddlepaddle wheel of the given python, into the given folder.
#   tests/fake_npu/build.sh PYTHON OUT_DIR [MORE.cc ...]        (some seconds, needs g++)
# Then run anything on it:
#   CUSTOM_DEVICE_ROOT=OUT_DIR FLAGS_use_stride_kernel=0 PYTHON ... (paddle.set_device("npu:0"))
#   ... -m paddle.distributed.launch --npus 0,1 script.py           (two ranks, collectives over shared memory)
# FAKE_DEVICE_COUNT (2), FAKE_DEVICE_MEM_MB (8192): how many devices it shows and how large each is.
set -euo pipefail
usage="usage: build.sh PYTHON OUT_DIR [MORE.cc ...]"
python=${1:?$usage} out=${2:?$usage}
shift 2
here=$(cd "$(dirname "$0")" && pwd)
paddle=$("$python" -c 'import importlib.util as u; print(u.find_spec("paddle").submodule_search_locations[0])')
mkdir -p "$out"
g++ -O2 -w -fPIC -shared -std=c++17 -I"$paddle/include" "$here/stand_in_npu.cc" "$here/multiply_grad.cc" "$@" \
    -o "$out/libpaddle-custom-npu.so" -lrt -pthread -L"$paddle/libs" -l:libphi_core.so \
    -Wl,-rpath,"$paddle/libs" -Wl,--allow-shlib-undefined
echo "$out/libpaddle-custom-npu.so"
