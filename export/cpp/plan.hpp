// plan.json of an engine, its files checked by hash, and the rows of its prompts.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "json.hpp"
#include "tensor.hpp"

namespace inferix {

// Names of a program's inputs and outputs, in order.
struct ProgramEntry {
    std::filesystem::path path;
    std::vector<std::string> inputs, outputs;
};

struct Plan {
    std::filesystem::path folder;
    Json json;

    // Read a plan and check the hash of every file. UsageError for a folder that is no engine of this version, for a
    // file that is missing or is not the one that was exported, and for programs of another size than the plan's.
    static Plan read(const std::filesystem::path& folder);

    const Json& at(const std::string& key) const { return json.at(key); }
    bool has_program(const std::string& name) const { return at("programs").has(name); }
    ProgramEntry program(const std::string& name) const;
    // True where programs take what each frame of a pass sees, and its text.
    bool grouped() const;
    // Hash of the hashes of all files.
    std::string fingerprint() const;
};

// Rows [1, text_len, text_dim] of prompts: of the engine's words, or of whole prompts.
class PromptTable {
   public:
    explicit PromptTable(const Plan& plan);

    // UsageError for a prompt or a word that the engine does not have.
    Tensor encode(const std::string& prompt) const;
    // Rows of a text as the program `prompt` takes them; rows of zeros are the null caption. dropped: the branch of
    // guidance runs without the prompt.
    Tensor inputs(const Tensor& rows, bool dropped) const;
    // Rows of no prompt, zeros.
    Tensor nothing() const { return Tensor({1, length_, dim_}); }
    bool has_null() const { return !null_.data.empty(); }

   private:
    bool words_;
    std::vector<std::string> known_, skipped_;
    int64_t length_, dim_;
    Tensor rows_, null_;  // null_ [2, rows, dim]: of the null caption, and of that of a dropped prompt
};

std::string read_file(const std::filesystem::path& path);
std::string sha256(const std::string& bytes);
std::string file_sha256(const std::filesystem::path& path);

}  // namespace inferix
