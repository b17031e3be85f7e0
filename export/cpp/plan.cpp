#include "plan.hpp"

#include <algorithm>
#include <cctype>
#include <cstring>
#include <fstream>
#include <sstream>

#include "error.hpp"

namespace inferix {
namespace {

constexpr int first_version = 1, last_version = 4;

void check_files(const Plan& plan) {
    for (const auto& [name, facts] : plan.at("files").object) {
        std::filesystem::path path = plan.folder / name;
        std::string where = in_quotes(path.string());
        if (!std::filesystem::is_regular_file(path))
            throw UsageError(where + " is missing; copy the whole engine, or export it again");
        auto size = int64_t(std::filesystem::file_size(path)), expected = facts.at("bytes").integer();
        if (size != expected)
            throw UsageError(where + " has " + std::to_string(size) + " bytes, expected " + std::to_string(expected) +
                             "; copy it again or export again");
        if (std::string digest = file_sha256(path); digest != facts.at("sha256").string())
            throw UsageError(where + " has SHA-256 " + digest + ", expected " + facts.at("sha256").string() +
                             ": it is not the file that was exported; copy it again or export again");
    }
}

// UsageError for programs that were made for another size than the plan's.
void check_sizes(const Plan& plan) {
    const std::vector<int64_t> latent = plan.at("size").at("latent").integers();
    const std::vector<int64_t> picture = plan.at("size").at("picture").integers();
    if (latent.size() != 3 || picture.size() != 2)
        throw UsageError("plan.json in " + in_quotes(plan.folder.string()) + " has no size; export the engine again");
    for (const auto& [name, program] : plan.at("programs").object)
        for (const Json& input : program.at("inputs").items()) {
            const std::vector<Json>& shape = input.at("shape").items();
            if (input.at("name").string() != "latents") continue;
            for (size_t axis = 0; axis < 3; ++axis)
                if (shape.size() < 3 || shape[shape.size() - 3 + axis].integer() != latent[axis])
                    throw UsageError("program " + name + " of engine " + in_quotes(plan.folder.string()) +
                                     " was made for another size than the plan's " + std::to_string(picture[0]) + "x" +
                                     std::to_string(picture[1]) + "; copy the whole engine, or export it again");
        }
}

// A NumPy file of little-endian float32 in C order, the only kind that an export writes.
Tensor read_npy(const std::filesystem::path& path) {
    std::string bytes = read_file(path);
    auto bad = [&] { return UsageError(in_quotes(path.string()) + " is no array of float32; export the engine again"); };
    if (bytes.size() < 10 || bytes.compare(0, 6, "\x93NUMPY") != 0 || bytes[6] != 1) throw bad();
    size_t begin = 10 + uint8_t(bytes[8]) + 256 * uint8_t(bytes[9]);
    std::string header = bytes.substr(10, begin - 10);
    size_t open = header.find('('), close = header.find(')');
    if (header.find("<f4") == header.npos || header.find("False") == header.npos || close == header.npos) throw bad();
    Shape shape;
    std::stringstream sizes(header.substr(open + 1, close - open - 1));
    for (std::string size; std::getline(sizes, size, ',');)
        if (size.find_first_of("0123456789") != size.npos) shape.push_back(std::stoll(size));
    Tensor tensor(shape);
    if (begin > bytes.size() || bytes.size() - begin != tensor.data.size() * sizeof(float)) throw bad();
    std::memcpy(tensor.data.data(), bytes.data() + begin, bytes.size() - begin);
    return tensor;
}

std::string listed(const std::vector<std::string>& values, size_t most) {
    std::string made;
    for (size_t index = 0; index < std::min(most, values.size()); ++index)
        made += (index ? ", " : "") + in_quotes(values[index]);
    return made;
}

}  // namespace

std::string read_file(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    std::stringstream bytes;
    if (!file || !(bytes << file.rdbuf())) throw UsageError(in_quotes(path.string()) + " cannot be read");
    return bytes.str();
}

Plan Plan::read(const std::filesystem::path& folder) {
    std::string where = in_quotes(folder.string());
    if (!std::filesystem::is_regular_file(folder / "plan.json"))
        throw UsageError("engine " + where + " has no plan.json; expected a folder that inferix export wrote");
    Plan plan{folder, Json::parse(read_file(folder / "plan.json"), "plan.json in " + where)};
    if (plan.json.kind != Json::Kind::object || !plan.json.has("format") ||
        plan.at("format").string() != "inferix-engine")
        throw UsageError("plan.json in " + where + " is not the plan of an engine; export it again");
    if (int64_t version = plan.at("version").integer(); version < first_version || version > last_version)
        throw UsageError("engine " + where + " has version " + std::to_string(version) + "; expected " +
                         std::to_string(first_version) + " to " + std::to_string(last_version) +
                         ": export it again, or build the runner of then");
    if (plan.json.has("kv_dtype") && plan.at("kv_dtype").string() != "float32")
        throw UsageError("engine " + where + " has keys and values in " + plan.at("kv_dtype").string() +
                         " (kv_dtype), which this runner does not read; use inferix-run, or export it in float32");
    check_files(plan);
    check_sizes(plan);
    return plan;
}

ProgramEntry Plan::program(const std::string& name) const {
    const Json& entry = at("programs").at(name);
    ProgramEntry made{folder / entry.at("file").string(), {}, entry.at("outputs").strings()};
    for (const Json& input : entry.at("inputs").items()) made.inputs.push_back(input.at("name").string());
    return made;
}

bool Plan::grouped() const {
    const std::vector<Json>& inputs = at("programs").at("step").at("inputs").items();
    return std::ranges::any_of(inputs, [](const Json& input) { return input.at("name").string() == "text_of"; });
}

std::string Plan::fingerprint() const {
    std::string hashes;
    for (const auto& [name, facts] : at("files").object) hashes += facts.at("sha256").string();
    return sha256(hashes).substr(0, 16);
}

PromptTable::PromptTable(const Plan& plan) {
    const Json& text = plan.at("text");
    words_ = text.at("encoder").string() == "words";
    known_ = text.at(words_ ? "words" : "prompts").strings();
    if (words_) skipped_ = text.at("skipped").strings();
    length_ = text.at("length").integer();
    dim_ = text.at("dim").integer();
    rows_ = read_npy(plan.folder / text.at("rows").string());
    if (rows_.data.size() != known_.size() * size_t(words_ ? dim_ : length_ * dim_))
        throw UsageError("rows of prompts do not fit plan.json; export the engine again");
    if (text.has("null")) null_ = read_npy(plan.folder / text.at("null").string());
    const Shape& null = null_.shape;
    if (has_null() && (null.size() != 3 || null[0] != 2 || null[1] < length_ || null[2] != dim_))
        throw UsageError("rows of the null caption do not fit plan.json; export the engine again");
}

Tensor PromptTable::inputs(const Tensor& rows, bool dropped) const {
    if (!has_null()) return rows;
    auto null = null_.data.begin() + (dropped ? null_.stride() : 0);
    Tensor made({1, null_.shape[1], dim_}, std::vector<float>(null, null + null_.stride()));
    bool given = std::ranges::any_of(rows.data, [](float value) { return value != 0; });
    if (given) std::ranges::copy(rows.data, made.data.begin());
    return made;
}

Tensor PromptTable::encode(const std::string& prompt) const {
    Tensor rows({1, length_, dim_});
    if (!words_) {
        auto found = std::ranges::find(known_, prompt);
        if (found == known_.end())
            throw UsageError("prompt " + in_quotes(prompt) + " is not in the engine, which was made for " +
                             std::to_string(known_.size()) + " prompts such as " + listed(known_, 3) +
                             "; use one of them, or export with --prompt");
        std::copy_n(rows_.data.begin() + (found - known_.begin()) * length_ * dim_, length_ * dim_, rows.data.begin());
        return rows;
    }
    int64_t count = 0;
    std::string word;
    for (char next : prompt + " ") {
        if (std::isalpha(static_cast<unsigned char>(next))) {
            word += char(std::tolower(next));
            continue;
        }
        if (!word.empty() && std::ranges::find(skipped_, word) == skipped_.end()) {
            auto found = std::ranges::find(known_, word);
            if (found == known_.end())
                throw UsageError("the engine does not know " + in_quotes(word) + "; it knows " + listed(known_, 1000));
            auto row = rows_.data.begin() + (found - known_.begin()) * dim_;
            if (count < length_) std::copy_n(row, dim_, rows.data.begin() + count++ * dim_);
        }
        word.clear();
    }
    if (count == 0) throw UsageError("the engine knows no word of prompt " + in_quotes(prompt) + "; it knows " + listed(known_, 1000));
    return rows;
}

}  // namespace inferix
