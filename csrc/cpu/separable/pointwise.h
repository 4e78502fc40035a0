// The pointwise step and its gradients over whole NHWC images: by the kernels here, or by oneDNN's convolutions where
// plan.h says so.
#pragma once
#include <optional>

#include "activation.h"
#include "cpu/separable/plan.h"
#include "tensor_args.h"

namespace rkl::cpu {

// Whether oneDNN's convolutions serve images of `channels` channels. Where they do not, callers use matrix products.
bool convolves_images(int64_t channels);

// Whether pointwise() serves. Where it does not, callers use a matrix product.
bool makes_pointwise(int64_t channels, Dtype dtype);

// act(filter (C', C) times image (N, C, H, W) + bias). Either of the filter's strides may be 1.
Tensor pointwise(const Tensor& image, const Tensor& filter, const std::optional<Tensor>& bias, Activation act);

// The filter's gradient (C', C): dz (N, C', H, W) times hidden (N, C, H, W), summed over all pixels, as the plan says.
void filter_gradient(const Tensor& dz, const Tensor& hidden, FilterGradient how, void* out);

// The sum of each channel of an image: the bias's gradient.
void channel_sums(const void* image, void* out, int64_t pixels, int64_t channels, Dtype dtype);

}  // namespace rkl::cpu
