// A stream of an exported engine: the block loop of export/run.py.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "backend.hpp"
#include "network.hpp"
#include "plan.hpp"
#include "tensor.hpp"
#include "timeline.hpp"

namespace inferix {

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

    // A block being denoised. seen: draws of noise, then velocities, which a row of the solver's matrix weighs. texts:
    // those that it follows; none for those in force.
    struct InFlight {
        std::vector<Tensor> seen;
        Tensor latents;
        Texts texts;
    };

    void follow_prompt();
    // Take steps until the first block in flight is clean; its latents, and the texts that it follows.
    Block denoise(Tensor& latents, Texts& texts);
    void admit(int64_t draws);
    void take_step(const ScheduledPass& scheduled, const Json& solver);
    // texts: none for those in force.
    void commit(const Block& block, const Tensor& latents, const Texts& texts = {});
    std::vector<uint8_t> decode(const Tensor& latents, int64_t& pictures);
    int64_t action_number(const std::string& action) const;

    template <class Archive>
    void transfer(Archive& archive);
    template <class Archive>
    void transfer_texts(Archive& archive);

    std::shared_ptr<const Engine> engine_;
    uint64_t seed_ = 0;
    std::vector<std::string> names_;
    Timeline timeline_;
    Tensor rows_;
    std::optional<Change> change_;
    Network network_;
    std::vector<Progress> progress_;  // of the blocks in flight
    std::vector<InFlight> flight_;    // the same blocks
    Tensor uncommitted_;              // latents of the last block, which the next one's first pass commits
    std::map<int64_t, std::vector<float>> latents_;  // clean latents by frame, as far back as a recache goes
    std::vector<Tensor> state_;                      // of the decoder
    int64_t decoded_ = 0;
};

// Compare noise and windows with what the plan lists. UsageError for the first that differs.
void check_plan(const Plan& plan);

}  // namespace inferix
