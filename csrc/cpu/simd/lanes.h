// Channels, their filters and their filters' gradients as vectors.
#pragma once
#include "cpu/simd/transpose.h"

namespace rkl::cpu::RKL_ISA {

// Which channel a lane of a vector stands for, and under which filter: channel c is under filter c % filters.
struct Lanes {
  int64_t channels;
  bool whole;  // every vector: the last one overlaps its neighbour
  int64_t filters;

  int64_t vectors() const { return ceil_div(channels, kLanes); }
  // Where lane 0 of a vector's tap lies among weights or sums: the taps of a vector follow each other.
  static int64_t at(int64_t v, int64_t tap, int64_t taps) { return (v * taps + tap) * kLanes; }
  // Of a whole vector's first channel.
  int64_t at(int64_t v) const { return whole ? std::min(v * kLanes, channels - kLanes) : 0; }
  // Images of few channels that share a vector, and the channels of all of them.
  int64_t images() const { return std::max<int64_t>(1, kLanes / channels); }
  int64_t used() const { return images() * channels; }

  // -1 for an idle lane.
  int64_t channel(int64_t v, int lane) const {
    if (whole) return at(v) + lane;
    return v * kLanes + lane < used() ? v * kLanes + lane : -1;
  }
  // Whether this lane's sum counts: not where the last vector overlaps its neighbour, nor where the lane is idle.
  bool counts(int64_t v, int lane) const { return channel(v, lane) >= v * kLanes; }
};

// What becomes of the sums of a convolution. Weights and bias as packed for whoever makes them.
struct Finish {
  const float* weights;
  const float* bias;
  Activation act;
  int64_t image_bytes = 0;  // of the images that a band's are a part of, where its outputs stay in a core's cache
  int64_t threads = torch::stable::get_num_threads();  // of the call: its workers may be told another number
};

// Of filters (C, taps), or of a bias (C, 1), a vector of channels as (tap, lane) in fp32. By transpositions: an element
// at a time it was half of a call on small maps.
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

// All of them: (vector, tap, lane). Zeros where there are no values.
template <class T>
LineVector<float> as_lanes(const T* values, int taps, const Lanes& lanes) {
  LineVector<float> out(lanes.vectors() * taps * kLanes);
  for (int64_t v = 0; values && v < lanes.vectors(); ++v)
    as_lanes(values, taps, lanes, v, out.data() + Lanes::at(v, 0, taps));
  return out;
}

// The slices' sums (slice, vector, tap, lane) added in their order: the gradients (C, taps) and, of the last row, (C).
template <class T>
void reduce_sums(const float* sums, int64_t slices, int taps, const Lanes& lanes, T* dweight, T* dbias) {
  // Channels of one filter, which fill whole vectors or are in the only one, are added up by one task.
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
          const auto sum = [&](int64_t channel, int tap) -> double& {
            return total[Lanes::at(channel / kLanes, tap, taps + 1) + channel % kLanes];
          };
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
