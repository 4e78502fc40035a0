// The pointwise step in one kernel: see pointwise.cu.
#pragma once
#include <cuda_runtime.h>

#include "activation.h"
#include "cuda/plan.h"

namespace rkl::cuda {

// Whether `pointwise` serves such a step. aligned: whether the image begins at a multiple of 16 bytes. The filter must;
// a new output does.
bool serves_pointwise(int64_t channels, int64_t outputs, Activation act, Dtype dtype, bool aligned,
                      const Device& device);

// out = act(image times the filter's transpose + bias): dense rows of (pixels, channels), (outputs, channels) and
// (pixels, outputs); bias may be null.
void pointwise(const void* image, const void* filter, const void* bias, Activation act, void* out, int64_t pixels,
               int64_t channels, int64_t outputs, Dtype dtype, const Device& device, cudaStream_t stream);

}  // namespace rkl::cuda
