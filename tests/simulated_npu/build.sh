#!/usr/bin/env bash
# Build the fake CANN and the host kernels: bash build.sh PYTHON FOLDER
#
# PYTHON has torch and torch_npu; the libraries go to FOLDER, to be put on LD_LIBRARY_PATH.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
packages=$("$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
string_form=$(TORCH_DEVICE_BACKEND_AUTOLOAD=0 "$1" \
    -c 'import torch; print(int(torch.compiled_with_cxx11_abi()))')
torch=$packages/torch
cann=$packages/torch_npu/include
mkdir -p "$2"
cd "$2"

flags=(-O1 -fPIC -Wall -Wextra -isystem "$cann" -isystem "$cann/third_party/acl/inc")
for part in runtime operators unused; do
    gcc -std=gnu11 "${flags[@]}" -c "$here/cann/$part.c" -o "$part.o"
done
g++ -std=c++17 "${flags[@]}" -c "$here/cann/collectives.cpp" -o collectives.o
# shellcheck disable=SC2016
g++ -shared -Wl,-soname,libfakecann.so -Wl,-rpath,'$ORIGIN' -o libfakecann.so ./*.o -ldl -lrt
# torch_npu looks functions up by library: each is an empty one that leads to ours.
for name in ascendcl hccl acl_op_compiler ge_runner graph acl_tdt_channel opapi nnopbase; do
    echo | gcc -x c - -shared -fPIC -Wl,--no-as-needed -Wl,-soname,"lib$name.so" \
        -Wl,-rpath,'$ORIGIN' -o "lib$name.so" -L. -lfakecann
done
rm ./*.o

g++ -std=c++20 -O1 -fPIC -shared -D_GLIBCXX_USE_CXX11_ABI="$string_form" -isystem "$torch/include" \
    -isystem "$torch/include/torch/csrc/api/include" \
    "$here/host_kernels.cpp" -o libhost_kernels.so -L"$torch/lib" -ltorch_cpu -lc10
