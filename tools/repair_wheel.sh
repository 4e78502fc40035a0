#!/bin/sh
# repair_wheel.sh FOLDER WHEEL: puts the wheel into the folder under its manylinux tag.
# PyTorch's libraries and CUDA's runtime come with torch, so they are not copied in.
exec auditwheel repair --exclude 'libc10*.so' --exclude 'libtorch*.so' --exclude 'libcudart.so.*' --wheel-dir "$1" "$2"
