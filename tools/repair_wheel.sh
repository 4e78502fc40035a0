#!/bin/sh
# repair_wheel.sh FOLDER WHEEL: writes the wheel into the folder with its manylinux tag.
# PyTorch's libraries and the CUDA runtime come with torch, so they are not copied into the wheel.
exec auditwheel repair --exclude 'libc10*.so' --exclude 'libtorch*.so' --exclude 'libcudart.so.*' --wheel-dir "$1" "$2"
