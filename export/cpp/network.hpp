// Passes of one stream: texts and pasts of the branches of guidance. The same as export/network.py.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "guidance.hpp"
#include "past.hpp"
#include "plan.hpp"
#include "tensor.hpp"
#include "timeline.hpp"

namespace inferix {

class Engine;

// Cross keys and values of a text, by input name, as each branch takes it.
using Text = std::shared_ptr<const Results>;
using Texts = std::vector<Text>;

class Network {
   public:
    // The texts are still to be given, by `begin` or an archive.
    explicit Network(const Engine& engine);

    // Begin with the rows of a prompt, and those of a negative prompt.
    void begin(const Tensor& rows, const Tensor& negative);
    // Follow another prompt; a branch without the prompt keeps its own text.
    void follow(const Tensor& rows);
    // Run a pass over clean latents [F, C, h, w] of the past in the branches that follow the prompt.
    void recompute(const ScheduledPass& scheduled, const Tensor& latents);
    // Run a pass over latents [F, C, h, w] in the branches that it needs; returns the velocity, guided. texts_of: by
    // frame, where they are not those in force.
    Tensor run(
        const ScheduledPass& scheduled, const Tensor& latents, const std::map<int64_t, const Texts*>& texts_of = {});
    // Run all steps of a block over its noise [draws, F, C, h, w] in one program; returns clean latents.
    Tensor run_steps(const ScheduledPass& scheduled, const Tensor& noise);
    // True if a frame has the first action; never for models without actions.
    bool rests(int64_t frame) const;
    // The frame whose place `frame` still shows, as all after it are at rest; none if `frame` has another action or is
    // below 0, and for models without actions.
    std::optional<int64_t> resting_since(int64_t frame) const;

    template <class Archive>
    void transfer(Archive& archive) {
        archive(actions);
        for (Past& past : pasts_) past.transfer(archive);
    }

    Guidance guide;
    Texts texts, nulls;  // in force, by branch, and null captions, where passes over clean latents follow them
    std::map<int64_t, int64_t> actions{{0, 0}};  // number of the action by the first frame that has it

   private:
    Text condition(const Tensor& rows, bool dropped = false) const;
    void roll(const ScheduledPass& scheduled, Past& past) const;
    void roll(const ScheduledPass& scheduled);
    std::optional<Tensor> run_branch(
        size_t number, const Pass& run, const Tensor& latents, const std::map<int64_t, const Texts*>& texts);
    std::map<int64_t, int64_t> positions(const Pass& run) const;
    // Inputs of a branch's pass but its latents; `made` holds those that are computed.
    Values inputs(size_t number, const Pass& run, const std::map<int64_t, const Texts*>& texts, Results& made);
    void join_texts(const std::vector<Text>& of_frames, Values& values, Results& made) const;
    Tensor guided(std::map<size_t, Tensor> velocities, const Pass& run, const Shape& shape) const;
    Past& past_of(size_t number);

    const Engine& engine_;
    bool moving_, grouped_;
    std::vector<Past> pasts_;   // of the branches that have one, in their order
    std::vector<size_t> owns_;  // by branch: which of the pasts it sees; their number for none
    Past nothing_;              // of branches that see no past
};

// latents [F, C, h, w] of several blocks, one after the other.
Tensor joined(const std::vector<const Tensor*>& latents);
// Rows [begin, end) of the first axis.
Tensor rows_of(const Tensor& tensor, int64_t begin, int64_t end);
// A shape with one axis more, before the others.
Shape shape_after(int64_t first, const Shape& rest);

}  // namespace inferix
