// A stream of an exported engine: the block loop of export/run.py.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "backend.hpp"
#include "plan.hpp"
#include "tensor.hpp"
#include "timeline.hpp"

namespace inferix {

using Values = std::map<std::string, View>;
using Results = std::map<std::string, Tensor>;

// The programs and the plan of a folder; several streams can share one.
class Engine {
   public:
    // threads: of each program, 0 for the runtime's own number. UsageError for a folder that cannot be played.
    explicit Engine(const std::filesystem::path& folder, int threads = 0) : Engine(Plan::read(folder), threads) {}
    Engine(Plan plan, int threads);

    Results run(const std::string& program, const Values& values) const;
    bool has(const std::string& program) const { return programs_.contains(program); }

    const Plan plan;
    const Policy policy;
    const PromptTable prompts;

   private:
    struct Loaded {
        ProgramEntry entry;
        std::unique_ptr<Program> program;
    };
    std::unique_ptr<Backend> backend_;
    std::map<std::string, Loaded> programs_;
};

// A past under one prompt: its cross keys and values, and keys and values of the frames in each slot.
struct Branch {
    Branch(const Plan& plan, Results text);

    // Take the keys and values that a pass left for its frames, at these positions.
    void keep(const Frames& frames, const Frames& positions, Results fresh);
    // Bring the slots up to date for a pass that sees `past`, frames with their positions as the pass counts them.
    void bind(const std::map<int64_t, int64_t>& past);
    // Inputs of the past and the prompt.
    Values inputs() const;

    Results text;
    FixedWindow slots;
    std::vector<double> frequencies;
    Results past;                                // by `past_k_0`, ...: [window, tokens, heads, channels]
    Frames pending;                              // frames whose keys and values are in `fresh` and not yet in slots
    Results fresh;                               // by `new_k_0`, ...
    std::map<int64_t, int64_t> stored, shifts;   // position of a frame's keys, and how much further they are rotated
    std::map<int64_t, Results> originals;        // keys as stored, of frames that have been rotated further

   private:
    void rotate(int64_t slot, int64_t frame, int64_t shift);
};

// latents [F, C, h, w]; frames [T, H, W, 3] bytes, none if it was not decoded.
struct MadeBlock {
    int64_t index;
    Tensor latents;
    std::vector<uint8_t> frames;
    int64_t pictures = 0;
};

class Stream {
   public:
    // actions: of frames 1, 2, ... UsageError for a prompt or an action that the engine does not know.
    Stream(std::shared_ptr<const Engine> engine, const std::string& prompt, uint64_t seed = 0,
           const std::vector<std::string>& actions = {}, const std::optional<std::string>& negative = std::nullopt);

    // Follow another prompt from the next block on, as the preset's `prompt_switch` says.
    void prompt(const std::string& text);
    // Set the action of the next block's frames and all later ones.
    void act(const std::string& action);
    MadeBlock next_block(bool decode = true);

    // Write all state to a file, and continue from one: bit for bit on the same engine. A file is written whole or
    // not at all. UsageError for a file of another engine or a damaged one.
    void save(const std::filesystem::path& path) const;
    static Stream restore(std::shared_ptr<const Engine> engine, const std::filesystem::path& path);

    const Engine& engine() const { return *engine_; }

   private:
    explicit Stream(std::shared_ptr<const Engine> engine);  // without a prompt, to be restored

    struct Change {
        Tensor before, after;
        int64_t left, blocks;
    };

    void follow_prompt();
    Block denoise(Tensor& latents);
    void commit(const Block& block, const Tensor& latents);
    std::vector<uint8_t> decode(const Tensor& latents, int64_t& pictures);
    Results condition(const Tensor& rows) const;
    void keep(Branch& branch, const Pass& pass, Values values);
    std::map<int64_t, int64_t> positions(const Pass& pass) const;
    // Inputs of a pass but its latents; `made` holds those that are computed.
    Values pass_inputs(const Pass& pass, Branch& branch, double timestep, Results& made);
    int64_t action_number(const std::string& action) const;

    template <class Archive>
    void transfer(Archive& archive);

    std::shared_ptr<const Engine> engine_;
    uint64_t seed_ = 0;
    std::vector<std::string> names_;
    std::map<int64_t, int64_t> actions_;  // number of the action by the first frame that has it
    Timeline timeline_;
    Tensor rows_;
    std::optional<Change> change_;
    std::vector<Branch> branches_;
    std::map<int64_t, std::vector<float>> latents_;  // clean latents by frame, as far back as a recache goes
    std::vector<Tensor> state_;                      // of the decoder
    int64_t decoded_ = 0;
};

// Compare noise and windows with what the plan lists. UsageError for the first that differs.
void check_plan(const Plan& plan);

}  // namespace inferix
