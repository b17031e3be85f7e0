// A forward pass as data: groups of latent frames, each with its timestep and what it sees. Integers only.
// The same as graphs/passes.py and the passes of schemes/block_schedule.py.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace inferix {

using Frames = std::vector<int64_t>;

bool contains(const Frames& frames, int64_t frame);
// begin, begin + 1, ... before end.
Frames range(int64_t begin, int64_t end);

// Frames of a pass that share a timestep and a context. context: the frames they see, ascending, and the rotary
// position of each of those. write: keys and values are left in the cache. denoised: the velocity is used; if not, the
// latents are clean. null_text: the frames follow the null caption.
struct Group {
    Frames frames;
    double timestep;
    Frames context, positions;
    bool write = true, denoised = true, null_text = false;

    int64_t position_of(int64_t frame) const;
    bool commits() const { return write && !denoised; }
};

// condition: what the network takes of the step besides timesteps.
struct Pass {
    std::vector<Group> groups;
    std::optional<double> condition;

    // All frames, in token order, and the timestep of each.
    Frames frames() const;
    std::vector<double> timesteps() const;
    // Frames of the groups that write, and of those that do not.
    Frames written(bool write = true) const;
    // The pass with each group seeing itself alone, at positions from 0, and leaving no keys and values.
    Pass without_past() const;
    // The pass without keys and values left in the cache.
    Pass read_only() const;
};

// A pass of a stream. beside: frames that the cache keeps although the pass does not see them. commits: the first
// group is the finished block before those that are denoised.
struct ScheduledPass {
    Pass run;
    Frames beside;
    bool commits = false;

    // Frames that the cache holds for the pass; none for a pass that writes nothing and changes no slot.
    std::optional<Frames> window() const;
};

}  // namespace inferix
