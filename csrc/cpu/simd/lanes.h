// Channels, their filters and their filters' gradients as vectors.
#pragma once
#include "cpu/simd/transpose.h"

namespace rkl::cpu::RKL_ISA {

// Which channel a lane of a vector stands for.
struct Lanes {
  int64_t channels;
  bool nhwc;

  // Whether blocks read and write the images where they lie: channels lie together and fill a vector.
  bool in_place() const { return nhwc && channels >= kLanes; }
  int64_t vectors() const { return (channels + kLanes - 1) / kLanes; }
  // Where lane 0 of a vector's tap lies among weights or sums: the taps of a vector follow each other.
  static int64_t at(int64_t v, int64_t tap, int64_t taps) { return (v * taps + tap) * kLanes; }
  // Of a vector's first channel in images that are in place.
  int64_t at(int64_t v) const { return in_place() ? std::min(v * kLanes, last()) : 0; }
  int64_t last() const { return in_place() ? channels - kLanes : 0; }
  // Images whose channels share a vector: more than one where NCHW images have few channels.
  int64_t images() const { return nhwc ? 1 : std::max<int64_t>(1, kLanes / channels); }

  // In place, the last vector ends with the last channel. -1 for an idle lane.
  int64_t channel(int64_t v, int lane) const {
    if (in_place()) return std::min(v * kLanes, last()) + lane;
    if (images() > 1) return lane < images() * channels ? lane % channels : -1;
    return v * kLanes + lane < channels ? v * kLanes + lane : -1;
  }
  // Whether this lane's sum counts: not where the last vector overlaps its neighbour, nor where the lane is idle.
  bool counts(int64_t v, int lane) const { return channel(v, lane) >= v * kLanes; }
};

// What becomes of the sums of a convolution. Weights and bias as packed for whoever makes them.
struct Finish {
  const float* weights;
  const float* bias;
  Activation act;
};

// Of filters (C, taps), or of a bias (C, 1), a vector of channels as (tap, lane) in fp32. By transpositions: an element
// at a time it was half of a call on small maps.
template <class T>
void as_lanes(const T* values, int taps, const Lanes& lanes, int64_t v, float* out) {
  for (int first = 0; first < taps; first += kLanes) {
    const int count = std::min(kLanes, taps - first);
    Vec tile[kLanes] = {};
    for (int lane = 0; lane < kLanes; ++lane)
      if (const int64_t c = lanes.channel(v, lane); c >= 0) tile[lane] = load_some(values + c * taps + first, count);
    transpose(tile);
    for (int i = 0; i < count; ++i) store(out + (first + i) * kLanes, tile[i]);
  }
}

// All of them: (vector, tap, lane). Zeros where there are no values.
template <class T>
std::vector<float> as_lanes(const T* values, int taps, const Lanes& lanes) {
  std::vector<float> out(lanes.vectors() * taps * kLanes);
  for (int64_t v = 0; values && v < lanes.vectors(); ++v)
    as_lanes(values, taps, lanes, v, out.data() + Lanes::at(v, 0, taps));
  return out;
}

// The slices' sums (slice, vector, tap, lane) added in their order: the gradients (C, taps) and, of the last row, (C).
template <class T>
void reduce_sums(const float* sums, int64_t slices, int taps, const Lanes& lanes, T* dweight, T* dbias) {
  const int64_t size = (taps + 1) * kLanes, slice_size = lanes.vectors() * size;
  torch::stable::parallel_for(0, lanes.vectors(), kGrain / (slices * size) + 1, [&](int64_t begin, int64_t end) {
    std::vector<double> total(size);
    for (int64_t v = begin; v < end; ++v) {
      std::fill(total.begin(), total.end(), 0.);
      for (int64_t slice = 0; slice < slices; ++slice) {
        const float* from = sums + slice * slice_size + v * size;
        for (int64_t i = 0; i < size; ++i) total[i] += from[i];
      }
      // Where images share the vector, lane by lane of each channel.
      for (int lane = int(lanes.channels); lanes.images() > 1 && lane < kLanes; ++lane)
        for (int tap = 0; lanes.counts(v, lane) && tap <= taps; ++tap)
          total[tap * kLanes + lane % lanes.channels] += total[tap * kLanes + lane];
      for (int lane = 0; lane < std::min<int64_t>(kLanes, lanes.channels); ++lane) {
        if (!lanes.counts(v, lane)) continue;
        const int64_t c = lanes.channel(v, lane);
        const double* sum = total.data() + lane;
        for (int tap = 0; dweight && tap < taps; ++tap) dweight[c * taps + tap] = T(float(sum[tap * kLanes]));
        if (dbias) dbias[c] = T(float(sum[taps * kLanes]));
      }
    }
  });
}

}  // namespace rkl::cpu::RKL_ISA
