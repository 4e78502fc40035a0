"""Export a model with this package's layers to ONNX, and compare ONNX Runtime's outputs with the model's.

    python examples/export_onnx.py [model.onnx]

The file contains only standard operators. Export the model and not a fused copy: a runtime fuses layers by itself.
"""

from __future__ import annotations

import sys

import onnxruntime
import torch
import torchvision

import rkl_kernels as rk


def main(path: str = "model.onnx") -> float:
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v2(num_classes=10, width_mult=0.35)
    rk.convert(model)
    model.eval()
    images = torch.randn(2, 3, 64, 64)
    batch = ({0: torch.export.Dim("batch", min=2)},)
    torch.onnx.export(model, (images,), path, dynamo=True, dynamic_shapes=batch, external_data=False, verbose=False)

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = torch.randn(5, 3, 64, 64)
    (answers,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.inference_mode():
        wanted = model(images)
    off = float((torch.from_numpy(answers) - wanted).abs().max() / wanted.abs().max())
    print(f"{path}: largest difference {off:.1e} of the largest answer")
    return off


if __name__ == "__main__":
    main(*sys.argv[1:])
