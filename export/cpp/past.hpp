// The past of a stream: the slot, keys and values of each frame. The same as export/past.py.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "plan.hpp"
#include "tensor.hpp"
#include "timeline.hpp"

namespace inferix {

using Values = std::map<std::string, View>;
using Results = std::map<std::string, Tensor>;

class Past {
   public:
    // frames: how many slots there are.
    Past(const Plan& plan, int64_t frames);

    // Take the keys and values that a pass left for its frames, at these positions.
    void keep(const Frames& frames, const Frames& positions, Results fresh);
    // Bring the slots up to date for a pass. cached: frames that have slots from now on; none for all there are.
    void roll(const std::optional<Frames>& cached);
    // Add inputs of a pass that sees `past`, frames with their positions as the pass counts them, to `values`; returns
    // their order. made: holds those that are copied.
    Frames bind(const std::map<int64_t, int64_t>& past, Values& values, Results& made);

    template <class Archive>
    void transfer(Archive& archive) {
        archive(slots_.frames, values_, pending_, fresh_, stored_, shifts_, originals_);
    }

   private:
    void rotate(int64_t slot, int64_t frame, int64_t shift);

    FixedWindow slots_;
    std::vector<double> frequencies_;
    int64_t half_;                                // channels between those of a pair; 0 for neighbours
    Results values_;                              // by `past_k_0`, ...: [slots, tokens, heads, channels]
    Frames pending_;                              // frames whose keys and values are in `fresh_` and not yet in slots
    Results fresh_;                               // by `new_k_0`, ...
    std::map<int64_t, int64_t> stored_, shifts_;  // position of a frame's keys, and how much further they are rotated
    std::map<int64_t, Results> originals_;        // keys as stored, of frames that have been rotated further
};

}  // namespace inferix
