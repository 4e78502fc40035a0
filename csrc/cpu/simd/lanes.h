// How channels, their filters and the filters' gradients lie in vectors.
#pragma once
#include "cpu/simd/transpose.h"

namespace rkl::cpu::RKL_ISA {

// Which channel each lane of a vector stands for. Channel c has filter c % filters.
struct Lanes {
  int64_t channels;
  bool whole;  // every vector has kLanes channels; the last one overlaps its neighbour
  int64_t filters;

  int64_t vectors() const { return ceil_div(channels, kLanes); }
  // The index of lane 0 of a tap of vector v among weights or sums that lie as (vector, tap, lane).
  static int64_t at(int64_t v, int64_t tap, int64_t taps) { return (v * taps + tap) * kLanes; }
  // The index of a channel's tap among them, where vectors do not overlap.
  static int64_t at_channel(int64_t channel, int64_t tap, int64_t taps) {
    return at(channel / kLanes, tap, taps) + channel % kLanes;
  }
  // The first channel of a vector; 0 where vectors are not whole.
  int64_t at(int64_t v) const { return whole ? std::min(v * kLanes, channels - kLanes) : 0; }
  // How many images of few channels share a vector, and how many channels they have in all.
  int64_t images() const { return std::max<int64_t>(1, kLanes / channels); }
  int64_t used() const { return images() * channels; }

  // The channel of a lane; -1 where the lane is idle.
  int64_t channel(int64_t v, int lane) const {
    if (whole) return at(v) + lane;
    return v * kLanes + lane < used() ? v * kLanes + lane : -1;
  }
  // Whether a lane's sum counts. It does not where the last vector overlaps its neighbour, or the lane is idle.
  bool counts(int64_t v, int lane) const { return channel(v, lane) >= v * kLanes; }
};

// What a convolution multiplies by and does with its sums. Weights and bias are packed for the kernel that reads them.
struct Finish {
  const float* weights;
  const float* bias;
  Activation act;
  int64_t image_bytes = 0;  // bytes of the images that a band is cut from, whose outputs stay in a core's cache; else 0
  int64_t threads = torch::stable::get_num_threads();  // the call's: its workers may be told another number
};

// Vector v of filters (C, taps), or of a bias (C, 1), as (tap, lane) in fp32. It is made by transpositions: an element
// at a time, this took half of a call on small maps.
template <class T>
void as_lanes(const T* values, int taps, const Lanes& lanes, int64_t v, float* out) {
  for (int first = 0; first < taps; first += kLanes) {
    const int count = std::min(kLanes, taps - first);
    Vec tile[kLanes] = {};
    for (int lane = 0; lane < kLanes; ++lane)
      if (const int64_t c = lanes.channel(v, lane); c >= 0)
        tile[lane] = load_some(values + c % lanes.filters * taps + first, count);
    transpose(tile);
    for (int i = 0; i < count; ++i) store(out + (first + i) * kLanes, tile[i]);
  }
}

// Adds the slices' sums (slice, vector, tap, lane) in order: dweight (C, taps) and, from the last tap, dbias (C).
template <class T>
void reduce_sums(const float* sums, int64_t slices, int taps, const Lanes& lanes, T* dweight, T* dbias) {
  // Channels that share a filter fill whole vectors, or lie in the only vector. One task adds up all of them.
  const bool shared = lanes.used() > lanes.filters;
  const int64_t together = shared ? lanes.vectors() : 1;
  const int64_t vector = (taps + 1) * kLanes, size = together * vector, slice_size = lanes.vectors() * vector;
  torch::stable::parallel_for(
      0, lanes.vectors() / together, kGrain / (slices * size) + 1, [&](int64_t begin, int64_t end) {
        std::vector<double> total(size);
        for (int64_t task = begin; task < end; ++task) {
          std::fill(total.begin(), total.end(), 0.);
          for (int64_t slice = 0; slice < slices; ++slice) {
            const float* from = sums + slice * slice_size + task * size;
            for (int64_t i = 0; i < size; ++i) total[i] += from[i];
          }
          const auto sum = [&](int64_t c, int tap) -> double& { return total[Lanes::at_channel(c, tap, taps + 1)]; };
          for (int64_t c = lanes.filters; shared && c < lanes.used(); ++c)
            for (int tap = 0; tap <= taps; ++tap) sum(c % lanes.filters, tap) += sum(c, tap);
          for (int64_t at = 0; at < together * kLanes; ++at) {
            const int64_t v = task * together + at / kLanes, c = lanes.channel(v, int(at % kLanes));
            if (!lanes.counts(v, int(at % kLanes)) || c >= lanes.filters) continue;
            for (int tap = 0; dweight && tap < taps; ++tap) dweight[c * taps + tap] = T(float(sum(at, tap)));
            if (dbias) dbias[c] = T(float(sum(at, taps)));
          }
        }
      });
}

}  // namespace rkl::cpu::RKL_ISA
