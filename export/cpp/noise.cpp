#include "noise.hpp"

#include <array>
#include <cmath>
#include <numbers>

namespace inferix {
namespace {

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
        uint64_t first = uint64_t{0xD2511F53} * counter[0], second = uint64_t{0xCD9E8D57} * counter[2];
        counter = {uint32_t(second >> 32) ^ counter[1] ^ key0, uint32_t(second),
                   uint32_t(first >> 32) ^ counter[3] ^ key1, uint32_t(first)};
        key0 += 0x9E3779B9;
        key1 += 0xBB67AE85;
    }
    return counter;
}

double uniform(uint32_t word) { return float(word) * 0x1p-32f + 0x1p-33f; }

}  // namespace

Tensor normals(uint64_t seed, std::span<const int64_t> frames, uint32_t draw, const Shape& shape,
               uint32_t stream) {
    Shape whole{int64_t(frames.size())};
    whole.insert(whole.end(), shape.begin(), shape.end());
    Tensor made(whole);
    const int64_t count = made.stride();
    for (size_t index = 0; index < frames.size(); ++index) {
        float* values = made.data.data() + index * count;
        for (int64_t first = 0; first < count; first += 4) {
            auto words = philox({uint32_t(first / 4), uint32_t(frames[index]), draw, stream}, uint32_t(seed),
                                uint32_t(seed >> 32));
            for (int pair = 0; pair < 4; pair += 2) {
                double radius = std::sqrt(-2 * std::log(uniform(words[pair])));
                double angle = 2 * std::numbers::pi * uniform(words[pair + 1]);
                if (first + pair < count) values[first + pair] = float(radius * std::cos(angle));
                if (first + pair + 1 < count) values[first + pair + 1] = float(radius * std::sin(angle));
            }
        }
    }
    return made;
}

}  // namespace inferix
