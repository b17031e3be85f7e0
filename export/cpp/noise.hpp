// Normal noise of latent frames: Philox4x32-10 words and Box-Muller normals, a function of seed, frame and draw.
// Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
#pragma once

#include <cstdint>
#include <span>

#include "tensor.hpp"

namespace inferix {

// Normals [frames, shape...] of absolute latent frames.
Tensor normals(uint64_t seed, std::span<const int64_t> frames, uint32_t draw, const Shape& shape, uint32_t stream = 0);

}  // namespace inferix
