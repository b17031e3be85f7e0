// Guidance as data: how often a pass runs, which text and past each run sees, and how their velocities are joined.
// The same as schemes/guidance.py.
#pragma once

#include <map>
#include <optional>
#include <vector>

#include "json.hpp"
#include "pass.hpp"

namespace inferix {

// One run of the network over the frames of a pass. negative: it follows the negative prompt. sees_past: if not, each
// group of frames sees itself alone. reads: number of the branch whose past it reads and does not write; its own number
// for a past of its own.
struct Role {
    bool negative = false, sees_past = true;
    size_t reads = 0;
};

class Guidance {
   public:
    // sampler: of a plan's preset. One branch follows the prompt where it has no guidance.
    explicit Guidance(const Json& sampler);

    bool writes_past(size_t number) const { return branches[number].sees_past && branches[number].reads == number; }
    bool needs_negative() const;
    // Scales and weights of a frame's branches at a timestep; the weights sum to 1.
    const std::vector<double>& scales_at(double timestep) const;
    std::vector<double> weights_at(double timestep) const;
    // Numbers of the branches that have a weight for a denoised group of a pass.
    std::vector<size_t> branches_of(const Pass& run) const;
    // The pass as one branch runs it; none where it has no weight in it and no clean frames to commit to its past.
    std::optional<Pass> branch_run(const Pass& run, size_t number) const;

    std::vector<Role> branches;

   private:
    std::vector<std::pair<double, std::vector<double>>> scales_;  // (least timestep, scales), ascending from 0
};

}  // namespace inferix
