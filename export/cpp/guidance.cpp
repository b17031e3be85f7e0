#include "guidance.hpp"

#include <algorithm>

#include "error.hpp"

namespace inferix {

Guidance::Guidance(const Json& sampler) {
    const Json& given = sampler.at("guidance");
    if (sampler.at("boundary_ratio").real() != 0)
        throw UsageError("the engine has two experts, which this runner does not run; export another preset");
    if (given.kind != Json::Kind::null) {
        for (const Json& branch : given.at("branches").items()) {
            const Json& reads = branch.at("reads");
            size_t own = branches.size();
            branches.push_back({branch.at("text").string() == "negative", branch.at("sees_past").truth(),
                                reads.kind == Json::Kind::null ? own : size_t(reads.integer())});
        }
        for (const Json& entry : given.at("scales").items())
            scales_.emplace_back(entry.items().at(0).real(), entry.items().at(1).reals());
        return;
    }
    double scale = sampler.at("guidance_scale").real();
    branches.push_back({false, true, 0});
    if (scale != 1) branches.push_back({true, true, 1});
    scales_.emplace_back(0, scale == 1 ? std::vector<double>{} : std::vector<double>{scale});
}

bool Guidance::needs_negative() const {
    return std::ranges::any_of(branches, [](const Role& role) { return role.negative; });
}

const std::vector<double>& Guidance::scales_at(double timestep) const {
    auto above = std::ranges::find_if(scales_, [&](const auto& entry) { return entry.first > timestep; });
    return std::prev(above)->second;
}

std::vector<double> Guidance::weights_at(double timestep) const {
    std::vector<double> weights = scales_at(timestep);
    weights.push_back(1);
    for (size_t number = weights.size() - 1; number > 0; --number) weights[number] -= weights[number - 1];
    return weights;
}

std::vector<size_t> Guidance::branches_of(const Pass& run) const {
    std::vector<size_t> numbers;
    for (size_t number = 0; number < branches.size(); ++number)
        if (std::ranges::any_of(run.groups, [&](const Group& group) {
                return group.denoised && weights_at(group.timestep)[number] != 0;
            }))
            numbers.push_back(number);
    return numbers;
}

std::optional<Pass> Guidance::branch_run(const Pass& run, size_t number) const {
    if (writes_past(number) && std::ranges::any_of(run.groups, &Group::commits)) return run;
    auto weightless = [&](const Group& group) { return !group.denoised || weights_at(group.timestep)[number] == 0; };
    if (!branches[number].sees_past) {
        Pass alone = run;
        std::erase_if(alone.groups, weightless);
        if (alone.groups.empty()) return std::nullopt;
        return alone.without_past();
    }
    if (std::ranges::all_of(run.groups, weightless)) return std::nullopt;
    return branches[number].reads == number ? run : run.read_only();
}

}  // namespace inferix
